"""Draw the figures of editing.md: what the embedded model makes of masks and of prescribed grain maps.

python docs/draw_editing.py --output_dir docs/images
"""

import argparse
from pathlib import Path

import datasets
import torch
from draw_figures import DOTS_PER_INCH, EMOJI, smooth
from matplotlib.figure import Figure
from PIL import Image

from dq_hf import DEFAULT_MODEL, DQInpaintPipeline, DQPipeline
from dq_hf.pictures import draw_grain_map

NUM_SAMPLES = 5
# Split and row of a held-out image, the masked box as (left, top, right, bottom) in pixels, and the prompt.
EDITS = (
    ("test", 212, (12, 40, 52, 56), "grinning face, flat style"),
    ("test_pairs", 372, (0, 32, 64, 64), "hamburger, noto style"),
    ("test_pairs", 516, (32, 0, 64, 64), "cow face, 3d style"),
)
CANDIDATES = (1, 16)
STEERED = ("grinning face, 3d style", 4)  # prompt and seed of the steered image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="docs/images", type=Path, help="where the pictures go (%(default)s)")
    args = parser.parse_args()
    pipe = DQPipeline.from_pretrained(DEFAULT_MODEL)
    pipe.set_progress_bar_config(disable=True)
    draw_steering(pipe).savefig(args.output_dir / "steering.png")
    edit = DQInpaintPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    draw_edits(edit, datasets.load_dataset(str(EMOJI))).savefig(args.output_dir / "editing.png")


def new_panels(rows, columns, titles):
    """A figure, and its rows of panels without axes, with titles above the first row."""
    figure = Figure((1.6 * columns, 1.6 * rows + 0.4), dpi=DOTS_PER_INCH)
    panels = figure.subplots(rows, columns, squeeze=False)
    top = 1 - 0.38 / figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=top, wspace=0.05, hspace=0.05)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, title in zip(panels[0], titles):
        axes.set_title(title, fontsize=10)
    return figure, panels


def draw_edits(pipe, emoji):
    """Two rows an image: the image and its mask, then samples of one candidate each, or of many."""
    titles = ["image", "mask", *(f"seed {seed}" for seed in range(NUM_SAMPLES))]
    figure, panels = new_panels(len(CANDIDATES) * len(EDITS), len(titles), titles)
    for i, (split, row, box, prompt) in enumerate(EDITS):
        image = pipe.image_processor.post_process(pipe.image_processor(emoji[split][row]["image"])["pixel_values"])[0]
        mask = Image.new("L", image.size)
        mask.paste(255, box)
        for panel_row, num_candidates in zip(panels[len(CANDIDATES) * i :], CANDIDATES):
            output = pipe(
                image=image,
                mask_image=mask,
                prompt=[prompt] * NUM_SAMPLES,
                num_candidates=num_candidates,
                generator=[torch.Generator().manual_seed(seed) for seed in range(NUM_SAMPLES)],
            )
            panel_row[0].imshow(smooth(image))
            shown = Image.composite(Image.new("RGB", image.size, (200, 200, 200)), image, mask)
            panel_row[1].imshow(smooth(shown))
            for axes, result in zip(panel_row[2:], output.images):
                axes.imshow(smooth(result))
            panel_row[0].text(4, 376, prompt, fontsize=8, va="bottom")
            text = "1 candidate" if num_candidates == 1 else f"{num_candidates} candidates"
            panel_row[1].text(4, 376, text, fontsize=8, va="bottom")
    return figure


def draw_steering(pipe):
    """One seed: as the model likes, with three prescribed grain maps, and with three shares; the coding below."""
    prompt, seed = STEERED
    rows, columns = pipe.transformer.config.grid_sizes[0]
    centre, top = torch.zeros(rows, columns, dtype=torch.long), torch.zeros(rows, columns, dtype=torch.long)
    centre[2:6, 2:6], top[: rows // 2] = 1, 1
    settings = {
        "the model": {},
        "all coarse": dict(grain_map=torch.zeros_like(top)),
        "fine above": dict(grain_map=top),
        "fine inside": dict(grain_map=centre),
        **{f"{share:.0%} fine": dict(fine_ratio=share) for share in (0.2, 0.5, 0.8)},
    }
    figure, panels = new_panels(2, len(settings), settings)
    for (above, below), options in zip(panels.T, settings.values()):
        output = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options)
        above.imshow(smooth(output.images[0]))
        faded = Image.blend(output.images[0], Image.new("RGB", output.images[0].size, "white"), 0.5)
        below.imshow(draw_grain_map(faded, output.grain_maps[0], scale=6))
    return figure


if __name__ == "__main__":
    main()
