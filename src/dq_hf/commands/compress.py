"""`dq-hf compress`: an image as a file of few bytes."""

from pathlib import Path

from ..hub.folders import whole_file
from .images import add_fine_ratio_option, read_image
from .options import add_command, add_force_option, add_model_options, check_device, check_output
from .sampling import name_or_id


def register(commands):
    command = add_command(
        commands,
        "compress",
        run,
        "Write an image of any size as a file of few bytes, which the same model reads again.",
    )
    command.add_argument("input", type=Path, metavar="IN.png", help="Read this image.")
    command.add_argument("output", type=Path, metavar="OUT.dq", help="Write this file.")
    add_model_options(command)
    command.add_argument(
        "--prior",
        choices=("static", "generator"),
        default="static",
        help="Code by how often each code is used, in milliseconds, or by the generator's probabilities: two fifths "
        "shorter, takes seconds, for images of the generator's size only (default static).",
    )
    command.add_argument("--class-label", help="With the generator: the image's class, a name or an id.")
    command.add_argument("--prompt", help="With the generator of a model with text: what the image shows.")
    rate = command.add_mutually_exclusive_group()
    add_fine_ratio_option(rate)
    rate.add_argument("--max-bytes", type=int, help="Code as finely as the file stays within this number of bytes.")
    add_force_option(command)


def run(args):
    check_output(args.output, args.force)
    image = read_image(args.input)
    device = check_device(args.device)

    from ..codec import compress
    from ..codec.container import GENERATOR, read_file
    from ..loading import load_pipeline, load_tokenizer

    load = load_pipeline if args.prior == "generator" else load_tokenizer
    model = load(args.model).to(device)
    label = args.class_label
    if label is not None and args.prior == "generator":
        label = name_or_id(label, model.transformer.config)
    data = compress(
        model,
        image,
        args.prior,
        args.fine_ratio,
        args.max_bytes,
        label,
        args.prompt,
        model_id=None if Path(args.model).exists() else str(args.model),
    )
    with whole_file(args.output) as partial:
        partial.write_bytes(data)

    header, payload, _ = read_file(data)
    print(f"prior  {'generator' if header.flag == GENERATOR else 'static'}")
    print(f"bytes  {len(data)} ({len(payload)} of codes and grain map, {len(data) - len(payload)} around them)")
    print(f"bits   {8 * len(data) / (header.height * header.width):.3f} a pixel")
