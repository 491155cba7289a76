"""Options of the training scripts: those that both stages have, their ranges, and what a resumed run makes of a change."""

import ast
import gc
import importlib.util
import math
from argparse import RawDescriptionHelpFormatter
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from ..refusals import errors_in_one_line, refuse_unknown

EMOJI = "examples/data/emoji"  # in a checkout of the repository
SMALL = "small"  # the text encoder that is made for a run
REFUSED = (  # when a run is resumed, another value than the checkpoint's is an error; that of any other option counts from there
    *("streaming", "label_column", "length_buckets", "seed", "start_from", "decoder_only", "compile"),
    *("image_size", "granularities", "router", "fine_ratios", "calibration_images", "block_out_channels"),
    *("layers_per_block", "norm_num_groups", "z_channels", "codebook_size", "codebook_dim"),
    *("disc_channels", "disc_layers", "disc_norm", "disc_lecam", "ema_decay", "vae", "weight_decay", "class_dropout"),
    *("hidden_size", "num_attention_heads", "num_position_layers", "num_content_layers", "fine_order"),
    *("caption_column", "text_encoder", "train_text_encoder", "text_length", "text_dropout"),
)


def as_typed(value):
    """An option's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def option(default, text):
    """A dataclass field with its help, which ends with the default, unless that is None or `MISSING`."""
    text = text if default in (None, MISSING) else f"{text} Default: {as_typed(default)}."
    chosen = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text.replace("%", "%%")}, **chosen)


def size_option(default, text):
    """A field that is None where it is not given: a new model then has the default, and another one its own size."""
    return option(None, f"{text} Default: {as_typed(default)}, or what the model of --start_from has.")


@dataclass(kw_only=True)
class ImageOptions:
    """Options of the images that are read, for training or into a code cache."""

    data: str = option(EMOJI, "Images: a folder, a table (Parquet, CSV or JSON Lines), or a data set of the Hub.")
    train_split: str = option("train", "Split to train on.")
    image_column: str = option("image", "Column with the images.")
    max_broken_share: float = option(
        0.01, "Images that cannot be read are left out; it is an error if their share is larger than this."
    )
    crop: Literal["center", "random"] = option(
        "center",
        "Images are scaled until they cover the size; what is cut out of a training image then: its center, or a random part.",
    )
    no_flip_column: str | None = option(
        None,
        "Column of booleans or whole numbers that is true for images that are never mirrored, such as those of letters. "
        "Default: none.",
    )
    batch_size: int = option(32, "Images of a forward pass, in each process.")
    num_workers: int = option(0, "Processes that read images, for each process that trains or encodes.")
    seed: int = option(0, "Seed of all that is random.")

    def __post_init__(self):
        require(self, 1, "batch_size")
        require(self, 0, "num_workers", "seed")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below {2**32}, as numpy demands, got {self.seed}")
        require_share(self, "max_broken_share")
        self.no_flip_column = None if self.no_flip_column == "none" else self.no_flip_column


@dataclass(kw_only=True)
class RunOptions(ImageOptions):
    """Options that both stages have."""

    output_dir: str = option(
        MISSING, "Folder of the run: checkpoints, log, pictures, and the finished model in model/."
    )
    test_split: list[str] = option(
        ["test"], "Held-out splits to measure on; the first is the one that counts for the model and its card."
    )
    max_test_images: int = option(1000, "Measure on at most this many held-out images.")
    streaming: bool = option(False, "Read a data set of the Hub that does not fit on the disk as it comes.")
    horizontal_flips: bool = option(True, "Mirror half of the training images.")

    gradient_accumulation_steps: int = option(1, "Forward passes of a step.")
    learning_rate: float = option(5e-4, "Highest learning rate, after the warm-up; it falls to 0 along a cosine.")
    warmup_steps: int = option(100, "Steps in which the learning rate rises to its highest.")
    max_grad_norm: float = option(1.0, "Longer gradients are scaled down to this norm.")
    max_steps: int = option(4000, "Steps of the whole run.")
    gradient_checkpointing: bool = option(False, "Use less memory and more time.")
    compile: bool = option(False, "Compile the heavy parts of the models with torch.compile.")

    log_every: int = option(20, "Steps between two rows of log.jsonl.")
    save_every: int = option(500, "Steps between two checkpoints.")
    save_minutes: float = option(15.0, "Minutes after which a checkpoint is saved in any case; 0 means never.")
    keep_checkpoints: int = option(2, "Newest checkpoints that are kept.")
    sample_every: int = option(500, "Steps between two measurements on held-out images, each with a picture.")
    resume: str = option(
        "auto",
        "auto goes on from the newest checkpoint of --output_dir, never wants a folder without checkpoints, and the "
        "folder of a checkpoint goes on from that one.",
    )
    report_to: str | None = option(
        None,
        "Tracker of accelerate that gets the rows of the log, too, such as tensorboard or trackio; none means none.",
    )
    push_to_hub: str | None = option(None, "Repository of the Hub for the finished model, such as user/name.")

    def __post_init__(self):
        super().__post_init__()
        require(self, 1, "max_test_images", "gradient_accumulation_steps", "max_steps")
        require(self, 1, "log_every", "save_every", "keep_checkpoints", "sample_every")
        require(self, 0, "learning_rate", "warmup_steps", "save_minutes")
        require_each(self, ["max_grad_norm"], lambda norm: 0 < norm < math.inf, "be more than 0")
        require_different(self, "test_split")
        self.report_to = None if self.report_to == "none" else self.report_to


def require(args, least, *names):
    """Raise `ValueError` unless these options are None or finite, and at least so much; a list in each of its values."""
    require_each(args, names, lambda value: least <= value < math.inf, f"be {least} or more")


def require_share(args, *names):
    """Raise `ValueError` unless these options are None or in [0, 1]."""
    require_each(args, names, lambda value: 0 <= value <= 1, "lie in [0, 1]")


def require_probability(args, *names):
    """Raise `ValueError` unless these options are None or in [0, 1)."""
    require_each(args, names, lambda value: 0 <= value < 1, "lie in [0, 1)")


def require_different(args, name):
    """Raise `ValueError` if a list has a value twice."""
    values = getattr(args, name)
    require_each(args, [name], lambda value: values.count(value) == 1, "name each only once")


def require_each(args, names, holds, what):
    """Raise `ValueError` unless each value of these options is None, or `holds` is true of it."""
    for name in names:
        given = getattr(args, name)
        if not all(value is None or holds(value) for value in (given if isinstance(given, list) else [given])):
            raise ValueError(f"--{name} must {what}, got {as_typed(given)}")


def check_data(data, output_dir):
    """Raise `ValueError` where the images of the repository are meant and are not there, or the output would join the images."""
    if Path(data).is_dir() and Path(output_dir).resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(
            f"--output_dir {output_dir} lies in --data {data}, where its files would be taken for images; choose another"
        )
    if data == EMOJI and not Path(data).exists():
        raise ValueError(
            f"--data {EMOJI} is a folder of the repository, which is not in {Path.cwd()}; start the script from the "
            "repository's folder, or give --data, a folder of images or a data set of the Hub"
        )


def settle_sizes(args, defaults, model=None):
    """Give the sizes that the user left out their values.

    Args:
        defaults: {option: value} of a new model.
        model: {option: value} of the model to go on from, if there is one.

    Raises:
        ValueError: a size that was given and that the model to go on from does not have.
    """
    for name, value in (defaults if model is None else model).items():
        if model is not None and getattr(args, name) not in (None, value):
            raise ValueError(
                f"--{name} is {value} in the model of --start_from, got {getattr(args, name)}; leave it out"
            )
        if getattr(args, name) is None:
            setattr(args, name, value)


def make_parser(options, module):
    """The parser of a script's options, without importing the script.

    Args:
        options: dataclass of them.
        module: name of the script's module, whose docstring is the description.
    """
    source = Path(importlib.util.find_spec(module).origin).read_text("utf-8")
    description = ast.get_docstring(ast.parse(source))
    return HfArgumentParser(options, description=description, formatter_class=RawDescriptionHelpFormatter)


def parse_options(parser, arguments=None):
    """The options that a script is given; ends with exit status 2 at what it does not have, or ValueError at a bad value."""
    options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        refuse_unknown(parser, unknown)
    return options


def run_script(script, options, module, arguments=None):
    """Parse the options of a script and run it; an expected failure ends with exit status 1 and one line on stderr.

    Args:
        script: called with the options.
        options, module: as for `make_parser`.
        arguments: words of the command line. Default: this process's.
    """
    from .checkpoints import CheckpointError
    from .progress import NotFiniteError

    parser = make_parser(options, module)
    with errors_in_one_line(parser.prog, CheckpointError, NotFiniteError):
        script(parse_options(parser, arguments))
    leave_process_group()


def leave_process_group():
    """Once nothing of a script is left.

    The destructor of a DDP model that outlives its process group holds Python's lock, while it waits for gloo's threads, which
    may need the lock (pytorch/pytorch#56297).
    """
    import torch

    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
