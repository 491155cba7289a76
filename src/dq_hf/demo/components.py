"""What several tabs of the web demo are made of: components of the page, and how they are connected."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from transformers import PreTrainedTokenizerBase

from ..modeling.configuration_dqtransformer import DQTransformerConfig
from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.text_dq import unknown_words
from .checks import MAX_DEMO_SEED, MAX_PROMPT, check_painting, check_prompt, read_number, read_upload
from .views import enlarged, to_pixel_values, view_scale

PROMPTS = ("red heart, flat style", "grinning face, 3d style", "keycap: 4, 3d style", "pizza, noto style")  # examples
PRIVATE = dict(api_visibility="private")


@contextmanager
def told():
    """What a visitor did wrong becomes a message on the page."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def served(image):
    """Path of an image's file for the browser.

    Components that get an image write its file themselves, over one of equal content that a browser may be reading.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        image.save(path)
        return save_file_to_cache(path, get_upload_folder())


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


def paint_editor(label, config, **options):
    """A component that is painted on, of the size of the pictures; a dab of its brush is as wide as a region."""
    height, width = config.image_height_width
    scale = view_scale((width, height))
    radius = config.granularities[0] * scale // 2
    return gr.ImageEditor(
        label=label,
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        eraser=gr.Eraser(default_size=radius),
        brush=gr.Brush(default_size=radius, colors=["#dc2828"], color_mode="fixed"),
        canvas_size=(width * scale, height * scale),
        fixed_canvas=True,
        buttons=[],
        elem_classes="pixels",
        **options,
    )


def number(component, value):
    """The number that a visitor sent for a component with bounds, an int where its steps are 1.

    Raises:
        TypeError, ValueError: anything else, named by the component's label.
    """
    return read_number(component.label, value, component.minimum, component.maximum, whole=component.step == 1)


def blank_editor(pixel_values):
    """Value of the editor: the image, with nothing painted."""
    path = served(enlarged(DQImageProcessor().post_process(pixel_values)[0]))
    return {"background": path, "layers": [], "composite": path}


def open_painting(editor, painting):
    """The editor's value, with PIL images, of what a visitor sent; None where that is empty.

    Raises:
        TypeError, ValueError: anything else.
    """
    check_painting(painting)
    try:
        return editor.preprocess(editor.data_model.model_validate(painting)) if painting else None
    except Exception as error:  # Pillow's decoders raise almost any kind on damaged data
        raise ValueError("what is painted is damaged or too large") from error


@dataclass
class ConditionInputs:
    """The components that say what is drawn: a class, a seed, a guidance scale, a prompt.

    Args:
        config: `DQTransformerConfig`.
        tokenizer: of prompts; None: no prompt is taken.
        label, seed, guidance, prompt: the components; those that the model does not take are invisible.
    """

    config: DQTransformerConfig
    tokenizer: PreTrainedTokenizerBase | None
    label: gr.Dropdown
    seed: gr.Number
    guidance: gr.Slider
    prompt: gr.Textbox

    @property
    def prompts(self):
        """The last inputs of an event: the prompt, where one is taken."""
        return [] if self.tokenizer is None else [self.prompt]

    def read(self, label, seed, guidance, prompt=None):
        """Arguments of `sample_frames` and `edit_painted`, of what a visitor sent.

        Raises:
            TypeError, ValueError: what the components do not give.
        """
        if self.tokenizer is not None:
            check_prompt(prompt)
            if words := unknown_words(self.tokenizer, [prompt]):
                gr.Warning(f"The model does not know {', '.join(words)}, and reads all such words alike.")
        if self.config.num_classes > 0:
            label = read_number(self.label.label, label, 0, self.config.num_classes - 1, whole=True)
        elif label is not None:
            raise ValueError("this model has no classes, and takes none")
        arguments = dict(class_label=label, seed=number(self.seed, seed), prompt=prompt)
        if is_guided(self.config):
            arguments["guidance_scale"] = number(self.guidance, guidance)
        return arguments


def add_condition(pipe):
    """The `ConditionInputs` of a pipeline, in the present column."""
    config = pipe.transformer.config
    names = [(config.id2label[i], i) for i in range(config.num_classes)]
    tokenizer = None if pipe.text_encoder is None else pipe.tokenizer
    has_prompts = tokenizer is not None
    prompt = gr.Textbox("", label="Prompt", info="empty: no text", max_length=MAX_PROMPT, visible=has_prompts)
    if has_prompts:
        gr.Examples([[text] for text in PROMPTS], prompt, label="Examples", **PRIVATE)
    label = gr.Dropdown(names, value=0 if names else None, label="Class", visible=bool(names))
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_DEMO_SEED, min_width=120, scale=3)
        dice = gr.Button("Random", min_width=60, scale=1, size="md")
    guidance = slider(
        1,
        8,
        config.sampling_defaults.get("guidance_scale", 1.0),
        step=0.1,
        label="Guidance scale",
        info="how much class and prompt count; 1: no guidance",
        visible=is_guided(config),
    )
    dice.click(None, None, seed, js="() => Math.floor(Math.random() * 2147483648)", **PRIVATE)
    return ConditionInputs(config, tokenizer, label, seed, guidance, prompt)


def slider(lowest, highest, value, **options):
    """A slider that has its first value between its ends."""
    return gr.Slider(min(lowest, value), max(highest, value), value, **options)


def is_guided(config):
    """Whether a generator was trained such that guidance does something."""
    return config.class_dropout > 0 or config.text_length is not None


@dataclass
class ImageSource:
    """The components from which an image comes: a box for files, and a button for the sample of another tab."""

    file: gr.File
    take: gr.Button

    @classmethod
    def add(cls, has_samples):
        """In the present column."""
        file = gr.File(label="Image", file_types=["image"], height=150)
        return cls(file, gr.Button("Take the sample", visible=has_samples))

    def connect(self, vae, sample, opened, erase, api_name, update):
        """Let images come to the editor.

        Args:
            vae: `DQVAEModel`.
            sample: the other tab's picture, a `gradio.State`; None without that tab.
            opened: the components of the opened image: pixel values (1, 3, height, width), a `gradio.State`, and the editor.
            erase: the button that erases what is painted.
            api_name: of the endpoint that opens a file.
            update: the event that follows each change of the editor.
        """
        pixel_values, editor = opened

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

        quiet = dict(show_progress="hidden")
        read = self.file.upload(run_file, self.file, opened, api_name=api_name, **quiet)
        for ended in (read.success, read.failure):  # the box takes the next one, whatever became of this one
            ended(lambda: None, None, self.file, queue=False, **quiet, **PRIVATE)
        read.success(**update, **PRIVATE)
        if sample is not None:
            self.take.click(run_take, sample, opened, **quiet, **PRIVATE).success(**update, **PRIVATE)
        erase.click(run_erase, pixel_values, editor, **quiet, **PRIVATE).success(**update, **PRIVATE)
