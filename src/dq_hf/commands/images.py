"""Options of commands that read images, one or a data set; only what is made of them imports torch."""

import argparse
from pathlib import Path

from .options import add_model_options, check_device, check_outputs


def add_encoding_options(command):
    """Which image goes where, and how it is encoded."""
    command.add_argument("input", type=Path, metavar="IN.png", help="Read this image.")
    command.add_argument("output", type=Path, metavar="OUT.png", help="Write this image.")
    add_model_options(command)
    add_fine_ratio_option(command)
    add_resize_option(command)


def add_resize_option(command):
    """Whether an image of another size than the model's is to be made fit."""
    command.add_argument(
        "--resize", action="store_true", help="Scale and crop the image to the size that the model was trained with."
    )


def add_fine_ratio_option(command, text=None):
    """--fine-ratio of an encoder, or with another help text."""
    text = text or (
        "Code this share of the regions finely, from 0 to 1, one share for each granularity but the coarsest (default: the "
        "router decides)."
    )
    command.add_argument("--fine-ratio", type=share, nargs="+", help=text)


def share(text):
    """A number of the command line; what is none may be the name of a file that follows."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; put this option behind the files") from None


def check_encoding(args):
    """Raise OSError or ValueError if there is no image to read, or it cannot be written."""
    check_outputs([args.output], args.force)
    if not args.input.exists():
        raise OSError(f"{args.input} does not exist")


def read_image(path):
    """The PIL image of a file; OSError if there is none."""
    from ..data.images import decode_image

    if not path.exists():
        raise OSError(f"{path} does not exist")
    try:
        return decode_image(str(path))
    except ValueError as error:
        raise OSError(f"{path} is damaged, or no image: {error}") from error


def open_image(args):
    """The tokenizer, its processor, and the image as `pixel_values`."""
    device = check_device(args.device)
    image = read_image(args.input)

    from ..loading import load_tokenizer
    from ..modeling.image_processing_dq import DQImageProcessor

    vae = load_tokenizer(args.model).to(device)
    processor = DQImageProcessor.for_model(vae.config, do_resize=args.resize)
    pixel_values = processor(image)["pixel_values"].to(device)
    factor = vae.config.granularities[0]
    if any(side % factor for side in pixel_values.shape[2:]):
        (height, width), (found_height, found_width) = vae.config.image_height_width, pixel_values.shape[2:]
        raise ValueError(
            f"image sides must be multiples of {factor}, got {found_width}x{found_height}; "
            f"give --resize for {width}x{height}, or resize the file"
        )
    return vae, processor, pixel_values


def add_data_options(command, split):
    """Which images of a data set."""
    add_source_options(command, split)
    command.add_argument(
        "--streaming",
        action="store_true",
        help="Read the images only as they are needed, for data that does not fit on the disk.",
    )
    add_broken_option(command)


def add_broken_option(command):
    """--max-broken-share."""
    command.add_argument(
        "--max-broken-share",
        type=float,
        default=0.01,
        help="Skip and name images that cannot be read, up to this share of all (default %(default)s).",
    )


def add_source_options(command, split):
    """Where a data set is, which images of it, and how many at a time."""
    command.add_argument(
        "--data",
        required=True,
        help="Read images from this folder, table (Parquet, CSV or JSON Lines) or data set of the Hub.",
    )
    command.add_argument("--split", default=split, help="Read this split of the data (default %(default)s).")
    command.add_argument("--image-column", default="image", help="Read images from this column (default %(default)s).")
    command.add_argument(
        "--batch-size", type=int, default=32, help="Process this many images at a time (default %(default)s)."
    )


def read_images(args, vae_config, seed=None):
    """The images of `add_data_options`, with counts of those read, and a loader of their `pixel_values`.

    Args:
        seed: of a random order, anew in each epoch; None: as they come.
    """
    from torch.utils.data import DataLoader

    from ..data.images import ImageCollator, load_images
    from ..data.streams import StreamedImages
    from ..modeling.image_processing_dq import DQImageProcessor

    collate = ImageCollator(DQImageProcessor.for_model(vae_config), args.image_column)
    dataset = load_images(args.data, args.split, args.image_column, args.streaming)
    if not args.streaming:
        dataset = (dataset if seed is None else dataset.shuffle(seed=seed)).to_iterable_dataset()
    order = {"shuffle_buffer": 0} if seed is None else {"seed": seed}
    images = StreamedImages(dataset, args.image_column, args.max_broken_share, **order)
    return images, DataLoader(images, args.batch_size, collate_fn=collate)


def add_budget_option(command):
    """--fine-ratio of a router that is to be calibrated."""
    add_fine_ratio_option(
        command,
        "Set the router's thresholds for this share of the regions at each granularity but the coarsest (default: the "
        "model's own budget).",
    )


def budget(args, config):
    """Shares of `add_budget_option`, for a model with this configuration."""
    from ..modeling.grain_map_dq import check_shares

    if args.fine_ratio is None:
        return config.budget_targets
    return check_shares("--fine-ratio", args.fine_ratio, len(config.granularities))


def calibrate_router(args, vae, shares):
    """Set a router's thresholds so that these shares of the images' regions are finer, and print both."""
    from ..training.calibration import calibrate

    images, loader = read_images(args, vae.config)
    achieved = calibrate(vae, (batch["pixel_values"] for batch in loader), shares)
    vae.config.budget_targets = shares
    unit = " nats" if vae.config.router == "entropy" else ""
    print(f"thresholds  {' '.join(f'{value:.7f}' for value in vae.router.thresholds)}{unit}")
    num_images = images.num_rows - images.num_broken
    print(f"achieved    {' '.join(f'{share:.4f}' for share in achieved)} of the regions of {num_images} images")
