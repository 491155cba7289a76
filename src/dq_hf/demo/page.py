"""The page of the web demo, `dq-hf demo`: sample images code by code, and see what coding an image of your own costs.

It runs on this machine alone and loads nothing from other servers. Every visitor waits for the one model's turn.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..loading import load_models
from ..pictures import image_grid
from .views import (
    MAX_PROMPT,
    MAX_SEED,
    MAX_UPLOAD_BYTES,
    MAX_UPLOAD_PIXELS,
    blank_editor,
    check_class,
    check_number,
    check_painting,
    check_prompt,
    check_seed,
    cost_cells,
    count_values,
    describe,
    enlarged,
    legend,
    markdown_table,
    read_upload,
    reconstruct_painted,
    sample_frames,
    to_pixel_values,
    view_scale,
)

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        f'the demo needs gradio; install it with pip install -c constraints.txt -e ".[demo]" ({error})'
    ) from error

MAX_WAITING = 20  # visitors in the queue
MAX_VALUES = 200  # in one request, those inside of lists and objects included
SECONDS_KEPT = 3600  # uploads and pictures on the disk

PROMPTS = ("a red heart", "a blue circle", "a snail, flat style", "a smiling face with sunglasses")  # examples
NUM_STRIP_FRAMES, STRIP_SIDE = 8, 128

NO_IMAGE = "Drop an image into the box, or take the sample of the other tab."
UNREADABLE = (
    "This cannot be read: number, order and types must be those that the page's API description (?view=api) lists."
)
CSS = """
.pixels img, .pixels canvas {image-rendering: pixelated}
.picture label[data-testid="block-label"] {position: static; width: 100%; border: 0}
.legend span {display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.35em}
.legend span:nth-of-type(n + 2) {margin-left: 1.5em}
.figures table {width: 100%; font-variant-numeric: tabular-nums}
"""


def serve(model, device="cpu", host="127.0.0.1", port=7860):
    """Load a model and serve its page until interrupted.

    Args:
        model: folder or Hub id, of both stages or of a tokenizer alone (nothing can be sampled then).
        device: where it runs.
        host, port: where the page is.

    Raises:
        OSError, ValueError: a model that cannot be loaded, or an address that cannot be listened at.
    """
    Image.MAX_IMAGE_PIXELS = (
        MAX_UPLOAD_PIXELS // 2
    )  # Pillow refuses more than twice as many, in all that visitors send
    vae, pipe = load_models(model)
    (pipe or vae).to(device)
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


class Page(gr.Blocks):
    """Blocks that say so where they cannot read what was sent, instead of an empty error."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        try:
            if len(inputs) != len(block_fn.inputs) or count_values(inputs) > MAX_VALUES:
                raise ValueError(f"expected {len(block_fn.inputs)} values, got {len(inputs)}")
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # of pydantic and gradio, which name paths of this machine
            raise gr.Error(UNREADABLE, print_exception=False) from error


def make_page(vae, pipe=None, title="dq_hf"):
    """The page, a `gradio.Blocks`.

    Args:
        vae: `DQVAEModel`.
        pipe: `DQPipeline` with this tokenizer; None: without the tab that samples.
        title: the model's name.
    """
    # No number of visitors calls the model more than once at a time.
    turn = dict(concurrency_id="model", concurrency_limit=1)
    with Page(
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


def add_generate_tab(pipe, turn):
    """The components that sample; gives the picture of the finished sample, for the other tab."""
    config = pipe.transformer.config
    defaults = config.sampling_defaults
    names = [(config.id2label[i], i) for i in range(config.num_classes)]
    has_prompts = pipe.text_encoder is not None and pipe.tokenizer is not None
    is_guided = config.class_dropout > 0 or config.text_length is not None
    sample = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            prompt = gr.Textbox(label="Prompt", info="empty: no text", max_length=MAX_PROMPT, visible=has_prompts)
            if has_prompts:
                gr.Examples([[text] for text in PROMPTS], prompt, label="Examples", api_visibility="private")
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
                info="how much class and prompt count; 1: no guidance",
                visible=is_guided,
            )
            temperature = gr.Slider(0.1, 2, defaults.get("temperature", 1.0), step=0.05, label="Temperature of codes")
            position_temperature = gr.Slider(
                0.1, 2, defaults.get("position_temperature", 1.0), step=0.05, label="Temperature of positions"
            )
            top_p = gr.Slider(0.05, 1, defaults.get("top_p", 1.0), step=0.01, label="Top-p of codes")
            sliders = dict(
                guidance_scale=guidance,
                temperature=temperature,
                position_temperature=position_temperature,
                top_p=top_p,
            )
            button = gr.Button("Sample", variant="primary")
        with gr.Column(scale=4):
            with gr.Row():
                image = picture("Sample")
                coding = picture("Grain map: a frame for each code")
                order = picture("Coding order: dark first, bright last")
            figures = gr.Markdown("Press *Sample*: codes are drawn from coarse to fine.", elem_classes="figures")
            strip = picture("From coarse to fine", height=200)

    def run_sample(label, seed, guidance, temperature, position_temperature, top_p, prompt=None):
        with told():
            if has_prompts:
                check_prompt(prompt)
            check_class(label, config)
            check_seed(seed)
            options = dict(temperature=temperature, position_temperature=position_temperature, top_p=top_p)
            if is_guided:
                options["guidance_scale"] = guidance
            for name, value in options.items():
                check_number(name, value, sliders[name].minimum, sliders[name].maximum)
            frames = []
            for frame in sample_frames(pipe, label, int(seed), prompt=prompt, **options):
                frames.append(frame)
                text = f"Element {frame.num_steps} of at most {config.longest_stream} …"
                yield enlarged(frame.image), frame.coding, frame.order, text, gr.skip(), gr.skip()
            chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, NUM_STRIP_FRAMES).round().astype(int)]
            film = image_grid([enlarged(frame.image, STRIP_SIDE) for frame in chosen], NUM_STRIP_FRAMES)
            text = markdown_table([cost_cells(frame.grain_map, pipe.vae.config)])
            yield enlarged(frame.image), frame.coding, frame.order, text, film, frame.image

    button.click(
        run_sample,
        [label, seed, *sliders.values(), *[prompt] * has_prompts],
        [image, coding, order, figures, strip, sample],
        api_name="sample",
        preprocess=False,  # `run_sample` checks what was sent
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
            if path is None:
                raise ValueError("there is no image; upload one")
            return open_picture(read_upload(path))

    def run_take(picture):
        with told():
            if picture is None:
                raise ValueError("there is no sample yet; press Sample in the other tab first")
            return open_picture(picture)

    def run_erase(values):
        return None if values is None else blank_editor(values)

    def run_reconstruct(values, painting, by_router, *shares):
        with told():
            check_painting(painting)
            if not isinstance(by_router, bool):
                raise TypeError("whether the router decides must be true or false")
            for share in shares:
                check_number("a share", share, 0, 1)
            if values is None:
                return None, None, NO_IMAGE
            view = reconstruct_painted(vae, values, open_painting(painting), None if by_router else list(shares))
        return view.coding, view.image, view.figures

    def open_painting(painting):
        try:
            return painting and editor.preprocess(editor.data_model.model_validate(painting))
        except Exception as error:  # Pillow's decoders raise almost any kind on damaged data
            raise ValueError("what is painted is damaged or too large") from error

    def run_shares(values, painting, *shares):
        return run_reconstruct(values, painting, False, *shares)

    private = dict(api_visibility="private")
    update = dict(
        fn=run_reconstruct,
        inputs=[pixel_values, editor, by_router, *shares],
        outputs=[coding, image, figures],
        preprocess=False,  # `run_reconstruct` checks what was sent
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
