"""`dq-hf decompress`: the image of a file that `dq-hf compress` wrote."""

from pathlib import Path

from .. import DEFAULT_MODEL
from .options import add_command, add_device_option, add_force_option, check_device, check_outputs, save_image


def register(commands):
    command = add_command(commands, "decompress", run, "Make an image of a file that dq-hf compress wrote.")
    command.add_argument("input", type=Path, metavar="IN.dq", help="Read this file.")
    command.add_argument("output", type=Path, metavar="OUT.png", help="Write this image.")
    command.add_argument(
        "--model",
        help="Use this model, a folder or a repository of the Hub; it must be the one that wrote the file (default: the "
        "repository that the file names, else the embedded emoji model).",
    )
    add_device_option(command)
    add_force_option(command)


def run(args):
    check_outputs([args.output], args.force)
    data = args.input.read_bytes()
    device = check_device(args.device)

    from ..codec import decompress
    from ..codec.container import GENERATOR, read_file
    from ..loading import load_pipeline, load_tokenizer

    header, _, _ = read_file(data)
    name = args.model or header.model_id or DEFAULT_MODEL
    load = load_pipeline if header.flag == GENERATOR else load_tokenizer
    image = decompress(load(name).to(device), data)
    save_image(image, args.output)
    print(f"{args.output}: {image.width}x{image.height}, by {name}")
