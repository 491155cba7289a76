"""`dq-hf train-tokenizer`: the script that trains a DQ-VAE."""

from .options import add_script


def register(commands):
    add_script(
        commands,
        "train-tokenizer",
        "train_dqvae",
        "TokenizerArguments",
        "Train a tokenizer (DQ-VAE, stage 1) on images.",
    )
