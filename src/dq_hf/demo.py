"""A page to look at, `dq-hf demo`: sample images code by code, and see what coding an image of your own costs.

It runs on this machine alone and asks nothing from elsewhere. Every visitor waits for the one model's turn.
"""

import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import DQImageProcessor, DQPipeline
from .cli import find_model, holds_both, load_vae
from .codec.cost import coding_cost, peak_signal_to_noise_ratio, reconstruct
from .modeling.configuration_dqvae import DQVAEConfig
from .modeling.grain_map_dq import expand_grain_map
from .pictures import GRAIN_COLOURS, draw_grain_map, image_grid

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f'the demo needs gradio; install it with pip install "dq_hf[demo]" ({error})') from error

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none of them runs a program of its own
MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 25_000_000  # a camera's picture; 300 MB as float32
MAX_ASPECT_RATIO = 16  # the shorter side is scaled to the model's, the longer one grows with it
MAX_WAITING = 20  # visitors in the queue
SECONDS_KEPT = 3600  # uploads and pictures on the disk
MAX_SEED = 2**31 - 1

VIEW_SIDE = 384  # of the pictures, about, in pixels
NUM_FRAMES = 24  # of a sample that grows
NUM_STRIP_FRAMES, STRIP_SIDE = 8, 128
NO_CODE_YET = (226, 226, 226)
ORDER_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])  # first to last
PAINTED_SHARE = 0.1  # of a region that makes it painted; less is the brush's blurred edge

NO_IMAGE = "Drop an image into the box, or take the sample of the other tab."
CSS = """
.pixels img, .pixels canvas {image-rendering: pixelated}
.picture label[data-testid="block-label"] {position: static; width: 100%; border: 0}
.legend span {display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.35em}
.legend span:nth-of-type(n + 2) {margin-left: 1.5em}
.figures table {width: 100%; font-variant-numeric: tabular-nums}
"""


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
    """What is shown of a reconstruction.

    Args:
        coding: PIL image enlarged, with a frame for each code.
        image: PIL image enlarged, the reconstruction.
        figures: Markdown.
    """

    coding: Image.Image
    image: Image.Image
    figures: str


def serve(model, device="cpu", host="127.0.0.1", port=7860):
    """Load a model and serve its page until interrupted.

    Args:
        model: folder or Hub id, of both stages or of a tokenizer alone (nothing can be sampled then).
        device: where it runs.
        host, port: where the page is; port 0: any free one.

    Raises:
        OSError, ValueError: a model that cannot be loaded, or an address that cannot be listened at.
    """
    port = check_address(host, port)
    vae, pipe = load_models(model, device)
    page = make_page(vae, pipe, title=Path(model).resolve().name)
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        max_file_size=MAX_UPLOAD_BYTES,
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"http://{'localhost' if host == '0.0.0.0' else host}:{port}", flush=True)
    page.block_thread()


def check_address(host, port):
    """The port, or a free one for 0; OSError now, not after the model is loaded, if it cannot be listened at."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must lie in 0 ... 65535, got {port}")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host") from error


def load_models(model, device):
    """(`DQVAEModel`, `DQPipeline` or None) of a folder or Hub id, in evaluation mode."""
    if not holds_both(model):
        return load_vae(model).to(device).eval(), None
    pipe = DQPipeline.from_pretrained(find_model(model)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe.vae, pipe


def make_page(vae, pipe=None, title="dq_hf"):
    """The page, a `gradio.Blocks`.

    Args:
        vae: `DQVAEModel`.
        pipe: `DQPipeline` with this tokenizer; None: without the tab that samples.
        title: the model's name.
    """
    # No number of visitors calls the model more than once at a time.
    turn = dict(concurrency_id="model", concurrency_limit=1)
    with gr.Blocks(
        title=f"{title} · dq_hf",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(SECONDS_KEPT, SECONDS_KEPT),
    ) as page:
        gr.Markdown(f"# Variable-length image coding: {title}\n{describe(vae.config)}")
        gr.HTML(legend(vae.config), elem_classes="legend")
        with gr.Tabs():
            if pipe is not None:
                with gr.Tab("Generate"):
                    sample = add_generate_tab(pipe, turn)
            with gr.Tab("Reconstruct"):
                add_reconstruct_tab(vae, turn, sample if pipe is not None else None)
    page.queue(max_size=MAX_WAITING)
    return page


def describe(config: DQVAEConfig):
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


def add_generate_tab(pipe, turn):
    """The components that sample; gives the picture of the finished sample, for the other tab."""
    config = pipe.transformer.config
    defaults = config.sampling_defaults
    names = [(config.id2label[i], i) for i in range(config.num_classes)]
    sample = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            label = gr.Dropdown(names, value=0 if names else None, label="Class", visible=bool(names))
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, scale=3)
                dice = gr.Button("Random", min_width=60, scale=1, size="md")
            guidance = gr.Slider(
                1,
                8,
                defaults.get("guidance_scale", 1.0),
                step=0.1,
                label="Guidance scale",
                info="how much the class counts; 1: no guidance",
                visible=config.class_dropout > 0,
            )
            temperature = gr.Slider(0.1, 2, defaults.get("temperature", 1.0), step=0.05, label="Temperature of codes")
            position_temperature = gr.Slider(
                0.1, 2, defaults.get("position_temperature", 1.0), step=0.05, label="Temperature of positions"
            )
            top_p = gr.Slider(0.05, 1, defaults.get("top_p", 1.0), step=0.01, label="Top-p of codes")
            button = gr.Button("Sample", variant="primary")
        with gr.Column(scale=4):
            with gr.Row():
                image = picture("Sample")
                coding = picture("Grain map: a frame for each code")
                order = picture("Coding order: dark first, bright last")
            figures = gr.Markdown("Press *Sample*: codes are drawn from coarse to fine.", elem_classes="figures")
            strip = picture("From coarse to fine", height=200)

    def run_sample(label, seed, guidance, temperature, position_temperature, top_p):
        with told():
            options = dict(temperature=temperature, position_temperature=position_temperature, top_p=top_p)
            if config.class_dropout > 0:
                options["guidance_scale"] = guidance
            if seed is None:
                raise ValueError(f"the seed must be a whole number in 0 ... {MAX_SEED}, got none")
            frames = []
            for frame in sample_frames(pipe, label, int(seed), **options):
                frames.append(frame)
                text = f"Element {frame.num_steps} of at most {config.longest_stream} …"
                yield enlarged(frame.image), frame.coding, frame.order, text, gr.skip(), gr.skip()
            chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, NUM_STRIP_FRAMES).round().astype(int)]
            film = image_grid([enlarged(frame.image, STRIP_SIDE) for frame in chosen], NUM_STRIP_FRAMES)
            cost = coding_cost(frame.grain_map, pipe.vae.config)
            text = markdown_table([cost_cells(cost, frame.grain_map, pipe.vae.config)])
            yield enlarged(frame.image), frame.coding, frame.order, text, film, frame.image

    button.click(
        run_sample,
        [label, seed, guidance, temperature, position_temperature, top_p],
        [image, coding, order, figures, strip, sample],
        api_name="sample",
        show_progress_on=figures,
        **turn,
    )
    random_seed = "() => Math.floor(Math.random() * 2147483648)"
    dice.click(None, None, seed, js=random_seed, api_visibility="private")
    return sample


def add_reconstruct_tab(vae, turn, sample):
    """The components that reconstruct; `sample` holds the other tab's picture, or is None without that tab."""
    granularities = vae.config.granularities
    height, width = vae.config.image_height_width
    pixel_values = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            file = gr.File(label="Image", file_types=["image"], height=150)
            take = gr.Button("Take the sample", visible=sample is not None)
            by_router = gr.Checkbox(True, label="The router decides", visible=len(granularities) > 1)
            shares = [
                gr.Slider(
                    0,
                    1,
                    0.5 / len(granularities[1:]),
                    step=0.01,
                    label=f"Share of regions with codes of {side}x{side} pixels",
                )
                for side in granularities[1:]
            ]
            gr.Markdown("Regions that you paint over get the finest codes.")
            erase = gr.Button("Erase what is painted")
        with gr.Column(scale=4):
            with gr.Row():
                scale = view_scale((width, height))
                brush_size = granularities[0] * scale // 2  # a radius: a dab is as wide as a region
                editor = gr.ImageEditor(
                    label="Paint here",
                    type="pil",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    eraser=gr.Eraser(default_size=brush_size),
                    brush=gr.Brush(default_size=brush_size, colors=["#dc2828"], color_mode="fixed"),
                    canvas_size=(width * scale, height * scale),
                    fixed_canvas=True,
                    buttons=[],
                    elem_classes="pixels",
                )
                coding = picture("Grain map: a frame for each code")
                image = picture("Reconstruction")
            figures = gr.Markdown(NO_IMAGE, elem_classes="figures")

    def open_picture(picture):
        with told():
            values = to_pixel_values(vae, picture)
            return values, blank_editor(values)

    def run_file(path):
        with told():
            return open_picture(read_upload(path))

    def run_take(picture):
        with told():
            if picture is None:
                raise ValueError("there is no sample yet; press Sample in the other tab first")
            return open_picture(picture)

    def run_erase(values):
        return None if values is None else blank_editor(values)

    def run_reconstruct(values, painting, by_router, *shares):
        if values is None:
            return None, None, NO_IMAGE
        with told():
            view = reconstruct_painted(vae, values, painting, None if by_router else list(shares))
        return view.coding, view.image, view.figures

    def run_shares(values, painting, *shares):
        return run_reconstruct(values, painting, False, *shares)

    private = dict(api_visibility="private")
    update = dict(
        fn=run_reconstruct,
        inputs=[pixel_values, editor, by_router, *shares],
        outputs=[coding, image, figures],
        trigger_mode="always_last",
        show_progress_on=figures,
        **turn,
    )
    opening = dict(outputs=[pixel_values, editor], show_progress="hidden")
    opened = file.upload(run_file, file, api_name="open", **opening)
    for ended in (opened.success, opened.failure):  # the box takes the next one, whatever became of this one
        ended(lambda: None, None, file, queue=False, show_progress="hidden", **private)
    opened.success(**update, **private)
    if sample is not None:
        take.click(run_take, sample, **private, **opening).success(**update, **private)
    by_router.input(**update, api_name="reconstruct")
    for share in shares:
        share.input(None, None, by_router, js="() => false", **private)
        share.input(**{**update, "fn": run_shares, "inputs": [pixel_values, editor, *shares]}, **private)
    editor.input(**update, **private)
    erase.click(run_erase, pixel_values, editor, show_progress="hidden", **private).success(**update, **private)


def picture(label, **options):
    """A component that shows a picture, pixel by pixel."""
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=["picture", "pixels"],
        min_width=220,
        **options,
    )


@contextmanager
def told():
    """What a visitor did wrong becomes a message on the page."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def sample_frames(pipe, class_label, seed, num_frames=NUM_FRAMES, **options):
    """Sample one image and give about `num_frames` `Frame`s as its codes come; the last one is finished.

    Args:
        pipe: `DQPipeline`.
        class_label: name or id, None for an unconditional model.
        seed: the image is that of `torch.Generator().manual_seed(seed)`.
        options: sampling options of the pipeline.
    """
    grid_sizes = pipe.transformer.config.grid_sizes
    every = max(1, pipe.transformer.config.longest_stream // num_frames)
    order = torch.full((1, *grid_sizes[-1]), -1, device=pipe.device)

    def run(emit):
        def on_step_end(pipe, step, _, tensors):
            nonlocal order
            taken = tensors["taken"].view_as(order)
            order = torch.where(taken & (order < 0), step, order)
            if (step + 1) % every:
                return emit(None)
            codes, fine_grain_map = (tensors[name].view_as(order) for name in ("codes", "grain_map"))
            vectors = pipe.vae.quantizer.lookup(codes) * taken[:, None]  # zeros for what is still to come
            image = pipe.image_processor.post_process(pipe.vae.decode(vectors).sample)[0]
            emit(draw_frame(image, fine_grain_map[0].cpu(), grid_sizes[0], order[0].cpu(), step + 1))

        output = pipe(
            class_labels=class_label,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step_end,
            callback_on_step_end_tensor_inputs=("codes", "grain_map", "taken"),
            **options,
        )
        fine_grain_map = expand_grain_map(output.grain_maps, len(grid_sizes))[0].cpu()
        emit(draw_frame(output.images[0], fine_grain_map, grid_sizes[0], order[0].cpu(), int(order.max()) + 2))

    for frame in emitted(run):
        if frame is not None:
            yield frame


def emitted(run):
    """What `run(emit)` emits in a thread of its own, as it comes; once nobody listens, the next `emit` ends it."""
    items, left = queue.SimpleQueue(), threading.Event()

    def emit(item):
        if left.is_set():
            raise InterruptedError("nobody listens any more")
        items.put((item,))

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, emit)
        result.add_done_callback(lambda _: items.put(()))
        try:
            while item := items.get():
                yield item[0]
        finally:
            left.set()
        result.result()  # raises what `run` raised


def draw_frame(image, fine_grain_map, coarse_grid, order, num_steps):
    """A `Frame` of a decoded image, (H, W) granularities, the coarse grid's size and (H, W) steps, -1 for no code."""
    rows, columns = coarse_grid
    side = fine_grain_map.shape[0] // rows
    grain_map = fine_grain_map.view(rows, side, columns, side).amax((1, 3))
    todo = Image.fromarray((order.numpy() < 0).astype(np.uint8) * 255)

    def without_todo(picture):
        picture = picture.copy()
        picture.paste(NO_CODE_YET, mask=todo.resize(picture.size, Image.NEAREST))
        return picture

    share = order.numpy() / max(1, int(order.max())) * (len(ORDER_COLOURS) - 1)
    anchors = np.arange(len(ORDER_COLOURS))
    colours = np.stack([np.interp(share, anchors, channel) for channel in ORDER_COLOURS.T], axis=-1)
    colours = Image.fromarray(colours.round().astype(np.uint8)).resize(image.size, Image.NEAREST)
    scale = view_scale(image.size)
    return Frame(
        image=without_todo(image),
        coding=without_todo(draw_grain_map(image, grain_map, scale)),
        order=without_todo(enlarged(colours)),
        grain_map=grain_map,
        num_steps=num_steps,
    )


def reconstruct_painted(vae, pixel_values, painting=None, shares=None):
    """Reconstruct an image, with the finest codes where something is painted; gives a `View`.

    Args:
        vae: `DQVAEModel`.
        pixel_values: (1, 3, height, width).
        painting: value of the editor, or None.
        shares: of the regions at each granularity but the coarsest; None: the router decides.
    """
    config = vae.config
    rows = {"the router" if shares is None else "the chosen share": reconstruct(vae, pixel_values, fine_ratio=shares)}
    (chosen,) = rows.values()
    painted = painted_regions(painting, chosen.grain_map.shape).to(vae.device)
    if painted.any():
        grain_map = chosen.grain_map.masked_fill(painted, len(config.granularities) - 1)
        rows["the same, finest where painted"] = reconstruct(vae, pixel_values, grain_map=grain_map[None])
    table = []
    for decided_by, row in rows.items():
        cells = {"decided by": decided_by, **cost_cells(row.cost, row.grain_map, config), "PSNR": f"{row.psnr:.2f} dB"}
        if painted.any():
            side = config.granularities[0]
            inside = painted.repeat_interleave(side, 0).repeat_interleave(side, 1)
            psnr = peak_signal_to_noise_ratio(row.pixel_values[..., inside], pixel_values[..., inside])
            cells["PSNR where painted"] = f"{psnr:.2f} dB"
        table.append(cells)
    original, image = DQImageProcessor().post_process(torch.cat([pixel_values, row.pixel_values]))
    return View(
        coding=draw_grain_map(original, row.grain_map.cpu(), view_scale(original.size)),
        image=enlarged(image),
        figures=markdown_table(table),
    )


def cost_cells(cost, grain_map, config):
    """Cells of a table, by their headings, for a `CodingCost` and its grain map (h, w)."""
    num_regions = torch.bincount(grain_map.flatten(), minlength=len(config.granularities)).tolist()
    num_pixels = grain_map.numel() * config.granularities[0] ** 2
    return {
        **{f"{side}x{side} regions": str(count) for side, count in zip(config.granularities, num_regions)},
        "codes": f"{cost.num_codes} of at most {grain_map.numel() * 4 ** (len(config.granularities) - 1)}",
        "bits": f"{cost.bits:.0f} ({cost.code_bits:.0f} codes + {cost.map_bits:.0f} grain map)",
        "bits a pixel": f"{cost.bits / num_pixels:.3f}",
    }


def markdown_table(rows):
    """A table of rows with the same headings."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_upload(path):
    """The image in an uploaded file, or ValueError with a message for who uploaded it."""
    name = Path(path).name
    if Path(path).stat().st_size > MAX_UPLOAD_BYTES:
        raise ValueError(f"{name} is larger than {MAX_UPLOAD_BYTES // 2**20} MB; make it smaller")
    too_many_pixels = f"has more than {MAX_UPLOAD_PIXELS // 10**6} million pixels; make it smaller"
    try:
        with Image.open(path, formats=UPLOAD_FORMATS) as file:
            width, height = file.size
            if width * height > MAX_UPLOAD_PIXELS:
                problem = too_many_pixels
            elif max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                problem = (
                    f"is {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other; crop it"
                )
            else:
                return file.copy()
    except Image.DecompressionBombError:
        problem = too_many_pixels
    except Exception:  # Pillow's decoders raise almost any kind on damaged data
        formats = f"{', '.join(UPLOAD_FORMATS[:-1])} or {UPLOAD_FORMATS[-1]}"
        problem = f"is damaged, or no image; expected {formats}"
    raise ValueError(f"{name} {problem}")


def to_pixel_values(vae, picture):
    """A PIL image scaled and cropped to the model's size, (1, 3, height, width) on its device."""
    height, width = vae.config.image_height_width
    return DQImageProcessor(size={"height": height, "width": width})(picture)["pixel_values"].to(vae.device)


def blank_editor(pixel_values):
    """Value of the editor: the image, with nothing painted."""
    image = enlarged(DQImageProcessor().post_process(pixel_values)[0])
    return {"background": image, "layers": [], "composite": image}


def painted_regions(painting, grid):
    """Bool (h, w): the regions of which the editor's value has at least `PAINTED_SHARE` painted."""
    painted = np.zeros(grid, dtype=bool)
    for layer in (painting or {}).get("layers") or []:
        alpha = layer.convert("RGBA").getchannel("A").resize(grid[::-1], Image.BOX)
        painted |= np.asarray(alpha) >= PAINTED_SHARE * 255
    return torch.from_numpy(painted)


def view_scale(size, side=VIEW_SIDE):
    """The whole number that brings the longer side of an image of this size nearest to `side`."""
    return max(1, round(side / max(size)))


def enlarged(image, side=VIEW_SIDE):
    """The image at about this longer side, pixel by pixel."""
    scale = view_scale(image.size, side)
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)
