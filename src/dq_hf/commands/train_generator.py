"""`dq-hf train-generator`: the script that trains a DQ-Transformer."""

from .options import add_script


def register(commands):
    add_script(
        commands,
        "train-generator",
        "train_dqtransformer",
        "GeneratorArguments",
        "Train a generator (DQ-Transformer, stage 2) on codes.",
    )
