"""`dq-hf edit`: masked regions of an image, drawn again."""

from pathlib import Path

from .images import add_resize_option, read_image
from .options import add_command, add_force_option, check_at_least_one, check_device, check_outputs, save_image
from .sampling import add_generation_options, check_generation, pipeline_arguments


def register(commands):
    command = add_command(commands, "edit", run, "Draw masked regions of an image again, given all others.")
    command.add_argument("input", type=Path, metavar="IN.png", help="Read this image.")
    command.add_argument(
        "output", type=Path, metavar="OUT.png", help="Write this image; several are written as a grid."
    )
    command.add_argument(
        "--mask",
        type=Path,
        required=True,
        metavar="MASK.png",
        help="Draw again what is white here, widened to whole regions; an image of the same size.",
    )
    add_resize_option(command)
    add_generation_options(command, num_images=1)
    command.add_argument(
        "--num-candidates",
        type=int,
        default=1,
        help="Draw each image so many times and keep one, by how well it suits what is not drawn again (default %(default)s).",
    )
    command.add_argument(
        "--no-overlay",
        action="store_true",
        help="Show the whole image as the decoder gives it, instead of the image's own pixels outside.",
    )
    add_force_option(command)


def run(args):
    check_at_least_one(num_candidates=args.num_candidates)
    check_generation(args)
    check_outputs([args.output], args.force)
    image, mask = read_image(args.input), read_image(args.mask)
    device = check_device(args.device)

    import torch

    from ..loading import load_pipeline
    from ..modeling.grain_map_dq import count_codes
    from ..pictures import image_grid
    from ..pipelines.inpaint import DQInpaintPipeline

    pipe = DQInpaintPipeline.from_pipe(load_pipeline(args.model).to(device))
    pipe.set_progress_bar_config(desc="edit", unit="code")
    config = pipe.transformer.config
    if config.num_classes and args.class_label is None:
        raise ValueError("this model draws images of a class: say which by --class-label")
    height, width = pipe.vae.config.image_height_width
    if image.size != (width, height) and not args.resize:
        raise ValueError(
            f"this model edits images of {width}x{height} pixels, got {image.width}x{image.height}; give --resize, or "
            "resize image and mask"
        )
    output = pipe(
        image=image,
        mask_image=mask,
        **pipeline_arguments(args, config, range(args.num_images)),
        num_candidates=args.num_candidates,
        overlay=not args.no_overlay,
        generator=torch.Generator().manual_seed(args.seed),
    )
    save_image(image_grid(output.images), args.output)
    regenerated = output.regenerated[0]
    codes = ", ".join(map(str, count_codes(output.grain_maps).tolist()))
    print(f"{args.output}: {int(regenerated.sum())} of {regenerated.numel()} regions drawn again, {codes} codes")
