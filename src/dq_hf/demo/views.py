"""What the web demo shows, computed without gradio: frames of a growing sample, reconstructions and edits."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..metrics.code_statistics import count_bits
from ..metrics.psnr import psnr
from ..modeling.configuration_dqvae import DQVAEConfig
from ..modeling.grain_map_dq import count_codes, repeat_cells
from ..modeling.image_processing_dq import DQImageProcessor
from ..pictures import (
    GRAIN_COLOURS,
    NO_CODE_YET,
    draw_codes,
    draw_grain_map,
    draw_order,
    enlarge,
    grey_out,
)

VIEW_SIDE = 384  # of the pictures, about, in pixels
NUM_FRAMES = 24  # of a sample that grows
PAINTED_SHARE = 0.1  # of a region that makes it painted; less is the brush's blurred edge


@dataclass
class Frame:
    """A sample on its way.

    Args:
        image: PIL image, grey where no code is yet.
        coding: PIL image enlarged, with a frame for each code.
        order: PIL image enlarged, dark for the first code and bright for the last.
        grain_map: (h, w) long; meaningless where no code is yet.
        num_steps: elements of the stream so far, start and end tokens included.
    """

    image: Image.Image
    coding: Image.Image
    order: Image.Image
    grain_map: torch.Tensor
    num_steps: int


@dataclass
class View:
    """What is shown of a reconstruction or an edit.

    Args:
        coding: PIL image enlarged, with a frame for each code.
        image: PIL image enlarged, the reconstruction or the edited image.
        figures: Markdown.
    """

    coding: Image.Image
    image: Image.Image
    figures: str


def introduction(config: DQVAEConfig):
    """One sentence about the tokenizer."""
    height, width = config.image_height_width
    sides = " or ".join(f"{side}x{side}" for side in config.granularities)
    return f"Images of {width}x{height} pixels; a code stands for {sides} pixels and is one of {config.codebook_size}."


def legend(config: DQVAEConfig):
    """HTML: which colour frames which granularity."""
    entries = []
    for granularity, side in enumerate(config.granularities):
        red, green, blue, _ = GRAIN_COLOURS[granularity % len(GRAIN_COLOURS)]
        codes = 4**granularity
        text = f"{side}x{side} pixels a code, {codes} code{'s' if codes > 1 else ''} a region"
        entries.append(f'<span style="background: rgb({red}, {green}, {blue})"></span>{text}')
    return "".join(entries)


@torch.no_grad()
def sample_frames(pipe, class_label, seed, num_frames=NUM_FRAMES, prompt=None, **options):
    """Sample one image and give about `num_frames` `Frame`s as its codes come; the last one is finished.

    Args:
        pipe: `DQPipeline`.
        class_label: an id, None for a model without classes.
        prompt: a text for a model with a text encoder, else None.
        seed: the image is that of `torch.Generator().manual_seed(seed)`.
        options: sampling options of the pipeline, and `grain_map`.
    """
    config = pipe.transformer.config
    every = max(1, config.longest_stream // num_frames)
    generator = torch.Generator().manual_seed(seed)
    order = torch.full((1, *config.grid_sizes[-1]), -1, device=pipe.device)  # steps until a code came; -1: not yet
    options |= pipe.encode_prompt(prompt)
    for step, state in enumerate(pipe.transformer.generate_steps(class_label, generator=generator, **options)):
        codes, grain_map = state.grids()
        present = state.taken.view_as(codes)
        order = torch.where(present & (order < 0), step, order)
        if (step + 1) % every == 0:
            image = pipe.image_processor.post_process(pipe.vae.decode_each(codes, present).sample)[0]
            yield draw_frame(image, state.fine_grain_map.view_as(codes)[0], grain_map[0], order[0], step + 1)
    image = pipe.image_processor.post_process(pipe.vae.decode_each(codes).sample)[0]
    yield draw_frame(image, state.fine_grain_map.view_as(codes)[0], grain_map[0], order[0], step + 1)


def draw_frame(image, fine_grain_map, grain_map, order, num_steps):
    """A `Frame` of a decoded image, (H, W) and (h, w) granularities, and (H, W) steps, -1 for no code."""
    present, scale = order >= 0, view_scale(image.size)
    num_granularities = (len(fine_grain_map) // len(grain_map)).bit_length()
    return Frame(
        image=grey_out(image, present),
        coding=draw_codes(image, fine_grain_map.where(present, NO_CODE_YET), num_granularities, scale),
        order=grey_out(draw_order(order, (image.width * scale, image.height * scale)), present),
        grain_map=grain_map.cpu(),
        num_steps=num_steps,
    )


@torch.no_grad()
def reconstruct_painted(vae, pixel_values, painting=None, shares=None):
    """Reconstruct an image, with the finest codes where something is painted; gives a `View`.

    Args:
        vae: `DQVAEModel`.
        pixel_values: (1, 3, height, width).
        painting: value of the editor, or None.
        shares: of the regions at each granularity but the coarsest; None: the router decides.
    """
    config = vae.config
    encoded = vae.encode(pixel_values, fine_ratio=shares)
    rows = {"the router" if shares is None else "the chosen share": encoded}
    painted = painted_regions(painting, encoded.grain_map.shape[1:]).to(vae.device)
    if painted.any():
        grain_map = encoded.grain_map.masked_fill(painted, len(config.granularities) - 1)
        rows["the same, finest where painted"] = vae.encode(pixel_values, grain_map=grain_map)
    table = []
    for decided_by, encoded in rows.items():
        decoded = vae.decode_codes(encoded.codes).sample.float().clamp(-1, 1)
        cells = {"decided by": decided_by, **cost_cells(encoded.grain_map[0], config)}
        cells["PSNR"] = f"{psnr(decoded, pixel_values).item():.2f} dB"
        if painted.any():
            inside = repeat_cells(painted, config.granularities[0])
            within = psnr(decoded[..., inside][..., None], pixel_values[..., inside][..., None]).item()
            cells["PSNR where painted"] = f"{within:.2f} dB"
        table.append(cells)
    original, image = DQImageProcessor().post_process(torch.cat([pixel_values, decoded]))
    return View(
        coding=draw_grain_map(original, encoded.grain_map[0].cpu(), view_scale(original.size)),
        image=enlarged(image),
        figures=markdown_table(table),
    )


def edit_painted(inpaint, pixel_values, painting, class_label, seed, prompt=None, **options):
    """Draw the painted regions of an image again; gives a `View`.

    Args:
        inpaint: `DQInpaintPipeline`.
        pixel_values: (1, 3, height, width).
        painting: value of the editor, or None.
        class_label, seed, prompt: as in `sample_frames`.
        options: of the pipeline.

    Raises:
        ValueError: nothing is painted.
    """
    config = inpaint.vae.config
    painted = painted_regions(painting, inpaint.transformer.config.grid_sizes[0])
    if not painted.any():
        raise ValueError("nothing is painted; paint over what is to be drawn again")
    output = inpaint(
        prompt=prompt,
        class_labels=class_label,
        image=DQImageProcessor().post_process(pixel_values)[0],
        mask_image=repeat_cells(painted, config.granularities[0]),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    image, grain_map = output.images[0], output.grain_maps[0].cpu()
    cells = {"regions drawn again": f"{int(painted.sum())} of {painted.numel()}", **cost_cells(grain_map, config)}
    return View(
        coding=draw_grain_map(image, grain_map, view_scale(image.size)),
        image=enlarged(image),
        figures=markdown_table([cells]),
    )


def cost_cells(grain_map, config):
    """Cells of a table, by their headings, that say what a grain map (h, w) costs with a `DQVAEConfig`."""
    num_codes, num_granularities = int(count_codes(grain_map[None])), len(config.granularities)
    code_bits, map_bits = count_bits(num_codes, grain_map.numel(), config.codebook_size, num_granularities)
    num_regions = torch.bincount(grain_map.flatten(), minlength=num_granularities).tolist()
    num_pixels = grain_map.numel() * config.granularities[0] ** 2
    return {
        **{f"{side}x{side} regions": str(count) for side, count in zip(config.granularities, num_regions)},
        "codes": f"{num_codes} of at most {grain_map.numel() * 4 ** (num_granularities - 1)}",
        "bits": f"{code_bits + map_bits:.0f} ({code_bits:.0f} codes + {map_bits:.0f} grain map)",
        "bits a pixel": f"{(code_bits + map_bits) / num_pixels:.3f}",
    }


def markdown_table(rows):
    """A table of rows with the same headings."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_pixel_values(vae, picture):
    """A PIL image scaled and cropped to the model's size, (1, 3, height, width) on its device."""
    return DQImageProcessor.for_model(vae.config)(picture)["pixel_values"].to(vae.device)


def painted_regions(painting, grid):
    """Bool (h, w): the regions of which the editor's value has at least `PAINTED_SHARE` painted."""
    painted = np.zeros(grid, dtype=bool)
    for layer in (painting or {}).get("layers") or []:
        alpha = layer.convert("RGBA").getchannel("A").resize(grid[::-1], Image.BOX)
        painted |= np.asarray(alpha) >= PAINTED_SHARE * 255
    return torch.from_numpy(painted)


def painted_detail(painting, config):
    """Grain map (h, w) long with the finest codes where something is painted and the coarsest elsewhere; None without.

    Args:
        painting: value of the editor, or None.
        config: `DQTransformerConfig`.
    """
    painted = painted_regions(painting, config.grid_sizes[0])
    return painted * (len(config.grid_sizes) - 1) if painted.any() else None


def view_scale(size, side=VIEW_SIDE):
    """The whole number that brings the longer side of an image of this size nearest to `side`."""
    return max(1, round(side / max(size)))


def enlarged(image, side=VIEW_SIDE):
    """The image at about this longer side, pixel by pixel."""
    return enlarge(image, view_scale(image.size, side))
