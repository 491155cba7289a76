"""Options that several commands share, their checks, and what is made of them; only the latter imports torch."""

import argparse
import importlib
import io
import re
import sys
from pathlib import Path

from .. import DEFAULT_MODEL
from ..hub.folders import check_place, whole_file
from ..modeling.sampling_options_dq import DEFAULT_NAMES, OPTION_NAMES, SamplingOptions
from ..pipelines.seeds import check_seed

SAMPLING_HELP = {
    "temperature": "Draw codes at this temperature, above 0.",
    "top_k": "Draw codes from this many of the most likely.",
    "top_p": "Draw codes from the most likely that together have this probability.",
    "position_temperature": "Draw positions at this temperature, above 0.",
    "position_top_k": "Draw positions from this many of the most likely.",
    "position_top_p": "Draw positions from the most likely that together have this probability.",
    "guidance_scale": "Strengthen class and prompt by classifier-free guidance, above 1; 1 means none, and less weakens them.",
}


def add_command(commands, name, run, description):
    """A sub-command whose function is `run(args)`."""
    command = commands.add_parser(name, help=description, description=description)
    command.set_defaults(run=run, parser=command)
    return command


def add_script(commands, name, module, options, description):
    """A command that passes all its arguments on to the `main` of a script; its parser.

    Args:
        module: of the script, `dq_hf.scripts.<module>`.
        options: name of the dataclass of its options in `dq_hf.scripts.arguments`.
    """
    module = f"dq_hf.scripts.{module}"
    description += f" All arguments are the script's own; several processes: `accelerate launch -m {module} ...`."
    # No argument looks like an option to this parser, not even --help.
    command = commands.add_parser(name, help=description, description=description, add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="See --help.")
    command.set_defaults(run=run_script, module=module, options=options)
    return command


def run_script(args):
    """Run a script as if it had been started by the command's name."""
    from ..scripts import arguments
    from ..training.options import make_parser, parse_options

    sys.argv = [f"dq-hf {args.command}", *args.arguments]
    parse_options(make_parser(getattr(arguments, args.options), args.module))  # before torch is imported
    importlib.import_module(args.module).main()


def add_group(commands, name, dest, description):
    """A command that has commands of its own, which are to be added to what this gives."""
    group = commands.add_parser(name, help=description, description=description)
    return group.add_subparsers(dest=dest, required=True, metavar=dest)


# Every command


def add_force_option(command, text="Overwrite files that exist."):
    """--force."""
    command.add_argument("--force", action="store_true", help=text)


def check_at_least_one(**numbers):
    """Raise ValueError for a number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def check_outputs(paths, force, make_folder=False):
    """Raise OSError or ValueError now, not after the work, if images of one format cannot be written to `paths`.

    Args:
        make_folder: the folder need not exist; it is made later.
    """
    from PIL import Image

    trial, file = Image.new("RGB", (64, 32)), io.BytesIO()
    try:
        trial.save(file, Image.registered_extensions()[paths[0].suffix.lower()])
        keeps_size = Image.open(file).size == trial.size  # icons have sizes of their own
    except Image.UnidentifiedImageError:  # such as PDF, which Pillow only writes
        keeps_size = True
    except (KeyError, OSError, ValueError):
        keeps_size = False
    if not keeps_size:
        raise ValueError(f"{paths[0]} must end like an image file that holds colours and any size, for example .png")
    for path in paths:
        check_output(path, force, make_folder)


def check_output(path, force, make_folder=False):
    """Raise OSError now, not after the work, if a file cannot be written, or must not be overwritten."""
    if path.exists() and not path.is_file() and not path.is_dir() or str(path) == "-":
        raise OSError(f"{path} must be the name of an ordinary file, not of a pipe or device")
    if path.exists() and not force:
        raise OSError(f"{path} exists; choose another name or give --force")
    if path.is_dir() or not (make_folder or path.parent.is_dir()):
        raise OSError(f"{path} cannot be written; its folder must exist, and it must be no folder itself")
    check_place(path)


def save_image(image, path, **options):
    """Write through a temporary file, so that what was there is lost only once the new image is whole."""
    with whole_file(path) as partial:
        image.save(partial, **options)


# Which model


def add_model_options(command):
    """Which model, and on which device."""
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="Use this model, a folder or a repository of the Hub (default: the embedded emoji model).",
    )
    add_device_option(command)


def add_device_option(command):
    """--device."""
    command.add_argument("--device", help="Run on this torch device (default: cuda if there is one, else cpu).")


def check_device(device):
    """The device to run on; ValueError if there is no such."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    return device


# Which images to generate


def add_generation_options(command, num_images):
    """Which model, which images of it, and how they are drawn."""
    add_model_options(command)
    command.add_argument(
        "--class-label",
        nargs="+",
        metavar="CLASS",
        help="Generate these classes in turn, given as names or ids; a wrong name is answered by the names that there are "
        "(default: every class).",
    )
    texts = command.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="Generate images of this text, for a model trained with captions; give it again for more texts, which come in "
        "turn (default: no text).",
    )
    texts.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="Generate images of the lines of this text file, in turn; an empty line is no text.",
    )
    command.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="Let guidance lead away from this text (default: from no text).",
    )
    command.add_argument(
        "-n",
        "--num-images",
        type=int,
        help=f"Generate this many images (default {num_images}, or one for each prompt and class that is given, if more).",
    )
    command.set_defaults(default_num_images=num_images)
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Seed the random numbers; the same seed gives the same images (default %(default)s).",
    )
    command.add_argument(
        "--lookahead",
        type=int,
        default=1,
        metavar="N",
        help="Read guesses of the next fine codes in each pass, N in all; the images stay the same, and where a pass of N "
        "elements costs little more than one of a single element, they come sooner (default %(default)s).",
    )
    add_sampling_options(command)


def add_sampling_options(command):
    """How codes and positions are drawn."""
    sampling = command.add_argument_group("sampling", "The model's configuration decides what is left out here.")
    for name in DEFAULT_NAMES:
        kind = int if name.endswith("top_k") else float
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=SAMPLING_HELP[name])
    sampling.add_argument(
        "--fine-positions",
        choices=("fixed", "free"),
        default="fixed",
        help="Let the finest codes fill what is left in a fixed order, or draw their positions too (default fixed).",
    )


def check_generation(args):
    """Raise ValueError if the number of images, the seed, the lookahead or a sampling option cannot be."""
    if args.prompts_file is not None:
        args.prompt = read_prompts(args.prompts_file)
    num_inputs = max(len(args.prompt or ()), len(args.class_label or ()))
    if args.num_images is None:
        args.num_images = max(args.default_num_images, num_inputs)
    check_at_least_one(num_images=args.num_images, lookahead=args.lookahead)
    if args.num_images < num_inputs:
        raise ValueError(f"-n must be at least {num_inputs}, for each prompt and class, got {args.num_images}")
    check_seed(args.seed)
    chosen_sampling(args)


def read_prompts(path):
    """The lines of a text file; OSError or ValueError if there are none, or it is no text in UTF-8."""
    from ..data.image_folders import lines_of

    try:
        prompts = lines_of(path)
    except ValueError as error:
        raise ValueError(f"--prompts-file {error}") from error
    if prompts == [""]:
        raise ValueError(f"--prompts-file {path} must hold at least one line, it is empty")
    return prompts


def chosen_sampling(args):
    """The sampling options that were given, {name: value}; ValueError at one out of range."""
    given = {name: getattr(args, name) for name in OPTION_NAMES if getattr(args, name) is not None}
    SamplingOptions.of(given)
    return given


def chosen_inputs(args, config, numbers):
    """What the images of these numbers are of, prompts and classes in turn: arguments of `DQPipeline`, None where not given.

    Raises:
        ValueError: a class that the `DQTransformerConfig` does not have.
    """
    from ..pipelines.class_labels import class_ids

    labels = None
    if args.class_label is not None or config.num_classes:
        names = args.class_label or list(range(config.num_classes))
        ids = class_ids([name_or_id(name, config) for name in names], config)
        labels = [ids[number % len(ids)] for number in numbers]
    prompts = args.prompt and [args.prompt[number % len(args.prompt)] for number in numbers]
    return {"prompt": prompts, "negative_prompt": args.negative_prompt, "class_labels": labels}


def pipeline_arguments(args, config, numbers):
    """As `chosen_inputs`, and how many images without any, how they are drawn, and how far to look ahead."""
    inputs = chosen_inputs(args, config, numbers)
    if inputs["prompt"] is inputs["class_labels"] is None:
        inputs["num_images_per_prompt"] = len(numbers)
    return inputs | chosen_sampling(args) | {"lookahead": args.lookahead}


def name_or_id(name, config):
    """A class given on the command line: a number is an id, unless it is a name."""
    return int(name) if name not in config.label2id and re.fullmatch("-?[0-9]+", str(name)) else name


# Which image to encode


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


def fine_ratio(args):
    """One share as a number, more as the list, None as None."""
    return args.fine_ratio[0] if args.fine_ratio and len(args.fine_ratio) == 1 else args.fine_ratio


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


# Which data set


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
