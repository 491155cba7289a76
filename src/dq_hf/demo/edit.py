"""The tab in which a visitor paints over a part of an image, says what should be there, and has it drawn again."""

import gradio as gr

from ..pipelines.inpaint import DQInpaintPipeline
from .components import ImageSource, add_condition, number, open_painting, paint_editor, picture, served, told
from .views import edit_painted

HINT = (
    "Drop an image into the box, or take the sample of the other tab; paint over a part of it and press *Draw again*."
)


def add_edit_tab(pipe, turn, sample):
    """The components that edit.

    Args:
        pipe: `DQPipeline`.
        turn: options of an event that calls the model.
        sample: the picture of the tab that samples.
    """
    inpaint = DQInpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    pixel_values = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            source = ImageSource.add(has_samples=True)
            condition = add_condition(pipe)
            candidates = gr.Slider(
                1, 16, 4, step=1, label="Candidates", info="so many are drawn, to keep what suits the rest"
            )
            button = gr.Button("Draw again", variant="primary")
            gr.Markdown("Regions that you paint over are drawn again; all others stay.")
            erase = gr.Button("Erase what is painted")
        with gr.Column(scale=4):
            with gr.Row():
                editor = paint_editor("Paint here", pipe.vae.config)
                coding = picture("Grain map: a frame for each code")
                image = picture("Edited")
            figures = gr.Markdown(HINT, elem_classes="figures")

    def run_edit(values, painting, label, seed, guidance, num_candidates, prompt=None):
        with told():
            arguments = condition.read(label, seed, guidance, prompt)
            arguments["num_candidates"] = number(candidates, num_candidates)
            painting = open_painting(editor, painting)
            if values is None:
                raise ValueError("there is no image; upload one, or take a sample")
            view = edit_painted(inpaint, values, painting, **arguments)
        return served(view.coding), served(view.image), view.figures

    outputs = [coding, image, figures]
    button.click(
        run_edit,
        [
            pixel_values,
            editor,
            condition.label,
            condition.seed,
            condition.guidance,
            candidates,
            *condition.prompts,
        ],
        outputs,
        api_name="edit",
        preprocess=False,  # `run_edit` checks what was sent
        show_progress_on=figures,
        **turn,
    )
    clear = dict(fn=lambda: (None, None, HINT), inputs=None, outputs=outputs, show_progress="hidden")
    source.connect(pipe.vae, sample, [pixel_values, editor], erase, "open_to_edit", clear)
