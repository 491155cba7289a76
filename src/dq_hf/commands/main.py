"""`dq-hf`: finds the command, runs it, and says in one line what went wrong."""

import argparse

from ..quiet import quiet_imports
from ..refusals import errors_in_one_line, refuse_unknown
from . import (
    calibrate,
    compress,
    convert,
    decompress,
    demo,
    draw,
    edit,
    encode,
    evaluate,
    generate,
    reconstruct,
    train_generator,
    train_router,
    train_tokenizer,
)

COMMANDS = (
    generate,
    edit,
    reconstruct,
    compress,
    decompress,
    draw,
    demo,
    train_tokenizer,
    train_router,
    encode,
    train_generator,
    evaluate,
    calibrate,
    convert,
)


def main(arguments=None):
    """Run one command; an expected failure ends with exit status 1 and one line on stderr."""
    args, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        refuse_unknown(args.parser, unknown)
    with errors_in_one_line(f"dq-hf {args.command}"), quiet_imports():
        args.run(args)


def make_parser():
    """Commands and their options."""
    parser = argparse.ArgumentParser(
        prog="dq-hf", description="Dynamic vector quantisation of images: use, measure and train the models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.register(commands)
    return parser
