"""`dq-hf generate`: images from a model."""

import math
from pathlib import Path

from .options import add_command, add_force_option, check_at_least_one, check_device, check_outputs, save_image
from .sampling import add_generation_options, check_generation, pipeline_arguments


def register(commands):
    command = add_command(commands, "generate", run, "Sample images, as one picture or as single files.")
    add_generation_options(command, num_images=16)
    command.add_argument(
        "--batch-size", type=int, default=16, help="Generate this many images at a time (default %(default)s)."
    )
    command.add_argument("--show-grain-map", action="store_true", help="Draw the coding beside each image.")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--output", type=Path, metavar="GRID.png", help="Write all images into this picture, as a grid."
    )
    where.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="Write each image into a file of its own, from 00000.png on."
    )
    add_force_option(command)


def run(args):
    check_at_least_one(batch_size=args.batch_size)
    check_generation(args)
    if args.output is not None:
        paths = [args.output]
    else:
        paths = [args.output_dir / f"{i:05d}.png" for i in range(args.num_images)]
    check_outputs(paths, args.force, make_folder=args.output_dir is not None)
    device = check_device(args.device)

    import torch

    from ..loading import load_pipeline
    from ..pictures import draw_grain_map, enlarge, image_grid

    pipe = load_pipeline(args.model).to(device)
    pipe.set_progress_bar_config(desc="generate", unit="code")
    scale = math.ceil(8 / pipe.vae.config.granularities[-1])  # frames of at least 8 pixels, one size for all
    generator = torch.Generator().manual_seed(args.seed)
    pictures = []
    for first in range(0, args.num_images, args.batch_size):
        numbers = range(first, min(first + args.batch_size, args.num_images))
        output = pipe(**pipeline_arguments(args, pipe.transformer.config, numbers), generator=generator)
        for image, grain_map in zip(output.images, output.grain_maps):
            if args.show_grain_map:
                image = image_grid([enlarge(image, scale), draw_grain_map(image, grain_map, scale)], columns=2)
            if args.output_dir is not None:
                args.output_dir.mkdir(parents=True, exist_ok=True)
                save_image(image, paths[len(pictures)])
            pictures.append(image)
    if args.output is not None:
        save_image(image_grid(pictures), args.output)
    print(args.output or f"{args.output_dir}: {args.num_images} images")
