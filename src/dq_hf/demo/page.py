"""The page of the web demo, `dq-hf demo`: sample images code by code, edit them, and see what coding them costs.

It runs on this machine alone and loads nothing from other servers. Every visitor waits for the one model's turn.
"""

from pathlib import Path

from PIL import Image

from ..loading import load_models
from .checks import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS, count_values
from .views import introduction, legend

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        f'the demo needs gradio; install it with pip install -c constraints.txt -e ".[demo]" ({error})'
    ) from error

from .edit import add_edit_tab
from .generate import add_generate_tab
from .reconstruct import add_reconstruct_tab

MAX_WAITING = 20  # visitors in the queue
MAX_SESSIONS = 200  # visitors whose images are kept; each takes about 200 KB
MAX_VALUES = 200  # in one request, those inside of lists and objects included
SECONDS_KEPT = 3600  # uploads and pictures on the disk

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
    Image.MAX_IMAGE_PIXELS = MAX_UPLOAD_PIXELS // 2  # of all that visitors send; Pillow refuses twice as many
    vae, pipe = load_models(model)
    (pipe or vae).to(device)
    page = make_page(vae, pipe, title=Path(model).resolve().name)
    launch(page, host, port)
    print(f"http://{'localhost' if host == '0.0.0.0' else host}:{port}", flush=True)
    page.block_thread()


def launch(page, host="127.0.0.1", port=None):
    """Serve a page of `make_page` in a thread of its own, with limits on what visitors send and what is kept of them.

    Args:
        page: `gradio.Blocks`.
        host, port: where it is; None: any free port from 7860 on.

    Returns:
        Its address, with a slash at the end.
    """
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=MAX_SESSIONS,
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


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
        pipe: `DQPipeline` with this tokenizer; None: without the tabs that sample and edit.
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
        gr.Markdown(f"# Variable-length image coding: {title}\n{introduction(vae.config)}")
        gr.HTML(legend(vae.config), elem_classes="legend")
        sample = None
        with gr.Tabs():
            if pipe is not None:
                with gr.Tab("Generate"):
                    sample = add_generate_tab(pipe, turn)
                with gr.Tab("Edit"):
                    add_edit_tab(pipe, turn, sample)
            with gr.Tab("Reconstruct"):
                add_reconstruct_tab(vae, turn, sample)
    page.queue(max_size=MAX_WAITING)
    return page
