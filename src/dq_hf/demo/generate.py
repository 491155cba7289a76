"""The tab that samples images code by code, with detail where a visitor paints it."""

import gradio as gr
import numpy as np
import torch

from ..pictures import image_grid
from .components import (
    PRIVATE,
    add_condition,
    blank_editor,
    number,
    open_painting,
    paint_editor,
    picture,
    served,
    slider,
    told,
)
from .views import cost_cells, enlarged, markdown_table, painted_detail, sample_frames

NUM_STRIP_FRAMES, STRIP_SIDE = 8, 128


def add_generate_tab(pipe, turn):
    """The components that sample; gives the picture of the finished sample, for the other tabs.

    Args:
        pipe: `DQPipeline`.
        turn: options of an event that calls the model.
    """
    config = pipe.transformer.config
    defaults = config.sampling_defaults
    is_variable = len(config.grid_sizes) > 1
    sample = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            condition = add_condition(pipe)
            temperature = slider(0.1, 2, defaults.get("temperature", 1.0), step=0.05, label="Temperature of codes")
            position_temperature = slider(
                0.1, 2, defaults.get("position_temperature", 1.0), step=0.05, label="Temperature of positions"
            )
            top_p = slider(0.05, 1, defaults.get("top_p", 1.0), step=0.01, label="Top-p of codes")
            sliders = dict(temperature=temperature, position_temperature=position_temperature, top_p=top_p)
            button = gr.Button("Sample", variant="primary")
            gr.Markdown(
                "Regions that you paint over get the finest codes, all others the coarsest. With nothing painted the "
                "model decides.",
                visible=is_variable,
            )
            erase = gr.Button("Erase what is painted", visible=is_variable)
        with gr.Column(scale=4):
            with gr.Row():
                white = torch.ones(1, 3, *pipe.vae.config.image_height_width)
                editor = paint_editor(
                    "Detail", pipe.vae.config, value=blank_editor(white), min_width=220, visible=is_variable
                )
                image = picture("Sample")
                coding = picture("Grain map: a frame for each code")
                order = picture("Coding order: dark first, bright last")
            figures = gr.Markdown("Press *Sample*: codes are drawn from coarse to fine.", elem_classes="figures")
            strip = picture("From coarse to fine", height=200)

    def pictures(frame):
        return [served(image) for image in (enlarged(frame.image), frame.coding, frame.order)]

    def run_sample(label, seed, guidance, temperature, position_temperature, top_p, painting, prompt=None):
        with told():
            arguments = condition.read(label, seed, guidance, prompt)
            options = dict(temperature=temperature, position_temperature=position_temperature, top_p=top_p)
            options = {name: number(sliders[name], value) for name, value in options.items()}
            grain_map = painted_detail(open_painting(editor, painting), config)
            frames = []
            for frame in sample_frames(pipe, grain_map=grain_map, **arguments, **options):
                frames.append(frame)
                text = f"Element {frame.num_steps} of at most {config.longest_stream} …"
                yield *pictures(frame), text, gr.skip(), gr.skip()
            chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, NUM_STRIP_FRAMES).round().astype(int)]
            film = image_grid([enlarged(frame.image, STRIP_SIDE) for frame in chosen], NUM_STRIP_FRAMES)
            text = markdown_table([cost_cells(frame.grain_map, pipe.vae.config)])
            yield *pictures(frame), text, served(film), frame.image

    button.click(
        run_sample,
        [condition.label, condition.seed, condition.guidance, *sliders.values(), editor, *condition.prompts],
        [image, coding, order, figures, strip, sample],
        api_name="sample",
        preprocess=False,  # `run_sample` checks what was sent
        show_progress_on=figures,
        **turn,
    )
    erase.click(lambda: blank_editor(white), None, editor, queue=False, show_progress="hidden", **PRIVATE)
    return sample
