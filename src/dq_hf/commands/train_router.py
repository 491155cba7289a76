"""`dq-hf train-router`: a tokenizer whose router has learned where finer codes help."""

from pathlib import Path

from ..hub.folders import check_output_folder, check_place
from ..pipelines.seeds import check_seed
from .images import add_budget_option, add_data_options, budget, calibrate_router, read_images
from .options import add_command, add_device_option, check_at_least_one, check_device


def register(commands):
    command = add_command(
        commands, "train-router", run, "Teach a trained tokenizer a router that knows where finer codes help."
    )
    command.add_argument(
        "--model",
        required=True,
        help="Begin with this tokenizer, a folder or a repository of the Hub, which is not changed.",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="Write the tokenizer with the new router there."
    )
    add_data_options(command, split="train")
    add_budget_option(command)
    command.add_argument(
        "--steps", type=int, default=300, help="Learn from this many batches of images (default %(default)s)."
    )
    command.add_argument(
        "--seed", type=int, default=0, help="Seed the new weights and the order of the images (default %(default)s)."
    )
    add_device_option(command)


def run(args):
    check_at_least_one(batch_size=args.batch_size, steps=args.steps)
    check_seed(args.seed)
    check_output_folder(args.output)
    check_place(args.output)
    device = check_device(args.device)

    import torch

    from ..loading import load_tokenizer
    from ..modeling.image_processing_dq import DQImageProcessor
    from ..training.router import learn_router

    vae = load_tokenizer(args.model, dtype=torch.float32).to(device)
    config = vae.config
    shares = budget(args, config)
    torch.manual_seed(args.seed)
    vae = learn_router(vae, endless(*read_images(args, config, args.seed)), args.steps)
    calibrate_router(args, vae, shares)
    vae.save_pretrained(args.output)
    DQImageProcessor.for_model(config).save_pretrained(args.output)
    print(f"written     {args.output}")


def endless(images, loader):
    """Batches of `pixel_values`, one epoch after the other; ends only where there are no images."""
    epoch = 0
    while epoch == 0 or images.num_rows > images.num_broken:
        images.set_epoch(epoch)
        yield from (batch["pixel_values"] for batch in loader)
        epoch += 1
