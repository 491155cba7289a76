"""Options of commands that sample: which images, and how they are drawn; only what is made of them imports torch."""

import re
from pathlib import Path

from ..modeling.sampling_options_dq import DEFAULT_NAMES, OPTION_NAMES, SamplingOptions
from ..pipelines.seeds import check_seed
from .options import add_model_options, check_at_least_one

SAMPLING_HELP = {
    "temperature": "Draw codes at this temperature, above 0.",
    "top_k": "Draw codes from this many of the most likely.",
    "top_p": "Draw codes from the most likely that together have this probability.",
    "position_temperature": "Draw positions at this temperature, above 0.",
    "position_top_k": "Draw positions from this many of the most likely.",
    "position_top_p": "Draw positions from the most likely that together have this probability.",
    "guidance_scale": "Strengthen class and prompt by classifier-free guidance, above 1; 1 means none, and less weakens them.",
}


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
