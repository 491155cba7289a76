"""Options that several commands share, their checks, and what is made of them; only the latter imports torch."""

import argparse
import importlib
import io
import sys

from .. import DEFAULT_MODEL
from ..hub.folders import check_place, whole_file


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
