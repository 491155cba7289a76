"""`dq-hf`: finds the command, runs it, and says in one line what went wrong."""

import argparse
import sys

from ..quiet import quiet_imports
from ..unknown_options import refuse_unknown
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
INTERRUPTED = 130  # exit status, as shells have it for Ctrl-C


def main(arguments=None):
    """Run one command; an expected failure ends with exit status 1 and one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):  # names of any signs, whatever the terminal takes
        sys.stdout.reconfigure(errors="backslashreplace")
    args, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        refuse_unknown(args.parser, unknown)
    try:
        with quiet_imports():
            args.run(args)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"dq-hf {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"dq-hf {args.command}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def make_parser():
    """Commands and their options."""
    parser = argparse.ArgumentParser(
        prog="dq-hf", description="Dynamic vector quantisation of images: use, measure and train the models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.register(commands)
    return parser
