"""`dq-hf convert`: a checkpoint of the paper's release as a folder that this package loads."""

from pathlib import Path

from .options import add_command, add_force_option


def register(commands):
    command = add_command(commands, "convert", run, "Convert a checkpoint of the paper's release.")
    command.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="CONFIG.yml",
        help="Read the configuration of that checkpoint's training.",
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="MODEL.ckpt",
        help="Read this checkpoint; no code in it is run.",
    )
    command.add_argument(
        "--thresholds",
        type=Path,
        metavar="FILE.json",
        help="Take entropy thresholds from this table (default: the one that the configuration names, beside it or in a "
        "folder above).",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="Write this folder.")
    add_force_option(command, "Write into a folder that has files.")


def run(args):
    from ..release import convert_checkpoint

    model = convert_checkpoint(args.config, args.checkpoint, args.output, args.force, args.thresholds, report=print)
    print(f"{args.output}: {type(model).__name__}, {model.num_parameters():,} parameters")
