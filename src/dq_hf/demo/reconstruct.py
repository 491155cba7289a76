"""The tab that shows what coding an image costs, with the finest codes where a visitor paints."""

import gradio as gr

from .components import PRIVATE, ImageSource, number, open_painting, paint_editor, picture, served, told
from .views import reconstruct_painted

NO_IMAGE = "Drop an image into the box."


def add_reconstruct_tab(vae, turn, sample):
    """The components that reconstruct.

    Args:
        vae: `DQVAEModel`.
        turn: options of an event that calls the model.
        sample: the picture of the tab that samples; None without that tab.
    """
    finer = vae.config.granularities[1:]
    pixel_values = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            source = ImageSource.add(has_samples=sample is not None)
            by_router = gr.Checkbox(True, label="The router decides", visible=len(finer) > 0)
            sliders = [
                gr.Slider(
                    0,
                    1,
                    0.5 / len(finer),
                    step=0.01,
                    label=f"Share of regions with codes of {side}x{side} pixels",
                )
                for side in finer
            ]
            gr.Markdown("Regions that you paint over get the finest codes.")
            erase = gr.Button("Erase what is painted")
        with gr.Column(scale=4):
            with gr.Row():
                editor = paint_editor("Paint here", vae.config)
                coding = picture("Grain map: a frame for each code")
                image = picture("Reconstruction")
            figures = gr.Markdown(NO_IMAGE, elem_classes="figures")

    def run_reconstruct(values, painting, by_router, *shares):
        with told():
            painting = open_painting(editor, painting)
            if not isinstance(by_router, bool):
                raise TypeError("whether the router decides must be true or false")
            shares = [number(*each) for each in zip(sliders, shares)]
            if values is None:
                return None, None, NO_IMAGE
            view = reconstruct_painted(vae, values, painting, None if by_router else shares)
        return served(view.coding), served(view.image), view.figures

    def run_shares(values, painting, *shares):
        return run_reconstruct(values, painting, False, *shares)

    update = dict(
        fn=run_reconstruct,
        inputs=[pixel_values, editor, by_router, *sliders],
        outputs=[coding, image, figures],
        preprocess=False,  # `run_reconstruct` checks what was sent
        trigger_mode="always_last",
        show_progress_on=figures,
        **turn,
    )
    source.connect(vae, sample, [pixel_values, editor], erase, "open", update)
    by_router.input(**update, api_name="reconstruct")
    for slider in sliders:
        slider.input(None, None, by_router, js="() => false", **PRIVATE)
        slider.input(**{**update, "fn": run_shares, "inputs": [pixel_values, editor, *sliders]}, **PRIVATE)
    editor.input(**update, **PRIVATE)
