"""`dq-hf encode`: a folder of images as a table of codes, or a data set once, for the training of a generator."""

import argparse
from pathlib import Path

from ..refusals import refuse_unknown
from .images import add_broken_option, add_fine_ratio_option, add_resize_option
from .options import add_force_option, add_model_options, add_script, check_device, check_output, run_script

USAGE = """dq-hf encode FOLDER --output CODES.parquet [options]
       dq-hf encode --output_dir CACHE [options of the script; --help after it shows them]"""

OTHER_SETS = "Parquet files and sets of the Hub see Dataset.map in docs/tokens.md, or --data with --output_dir"


def register(commands):
    description = (
        "Encode a folder of images of any sizes as a table, one row an image with file name, height, width, codes and grain "
        "map. With --output_dir, encode a data set for train-generator."
    )
    command = add_script(commands, "encode", "encode_dataset", "EncodeArguments", description)
    command.set_defaults(run=run, parser=table_parser(command.description))


def table_parser(description):
    """The parser of the options for a table."""
    parser = argparse.ArgumentParser("dq-hf encode", USAGE, description, allow_abbrev=False)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="Encode the images in this folder and its folders."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="CODES.parquet", help="Write this Parquet file.")
    add_model_options(parser)
    add_fine_ratio_option(parser)
    add_resize_option(parser)
    add_broken_option(parser)
    add_force_option(parser)
    return parser


def run(args):
    """The script where `--output_dir` is given, else the table."""
    options = {argument.partition("=")[0] for argument in args.arguments}
    if not options & {"--output_dir", "--output-dir"}:
        if "--data" in options:
            raise ValueError("--data is for --output_dir; a table takes a folder: dq-hf encode FOLDER --output ...")
        options, unknown = args.parser.parse_known_args(args.arguments)
        if unknown:
            refuse_unknown(args.parser, unknown)
        write_table(options)
    elif "--output" in options:
        raise ValueError("give either --output, for a table, or --output_dir, for a code cache, not both")
    elif not args.arguments[0].startswith("-"):
        raise ValueError(f"with --output_dir the images are given by --data {args.arguments[0]}")
    else:
        run_script(args)


def write_table(args):
    """Write the Parquet file."""
    if args.output.suffix != ".parquet":
        raise ValueError(f"--output must end in .parquet, got {args.output}")
    check_output(args.output, args.force)
    if not args.folder.is_dir():
        raise OSError(f"{args.folder} must be a folder of images; for {OTHER_SETS}")
    device = check_device(args.device)

    from tqdm.auto import tqdm

    from ..codec.rows import encode_rows, row_schema
    from ..data.codes import write_codes
    from ..data.image_folders import image_names, stream_images
    from ..data.streams import StreamedImages
    from ..hub.folders import whole_file
    from ..loading import load_tokenizer

    names = image_names(args.folder)
    if not names:
        raise OSError(f"{args.folder} must hold images, such as .png or .jpg files; it has none. For {OTHER_SETS}")
    vae = load_tokenizer(args.model).to(device)
    images = StreamedImages(stream_images(args.folder, names), max_share=args.max_broken_share, shuffle_buffer=0)
    with whole_file(args.output) as partial, tqdm(images, desc="encode", total=len(names)) as progress:
        tables = encode_rows(vae, ((row["file_name"], row["image"]) for row in progress), args.fine_ratio, args.resize)
        write_codes(partial, row_schema(vae, str(args.model)), tables)
    print(f"{args.output}: {images.num_rows - images.num_broken} images")
