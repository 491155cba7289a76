"""`dq-hf encode`: the script that encodes a data set once, for the training of a generator."""

from .options import add_script


def register(commands):
    add_script(
        commands,
        "encode",
        "encode_dataset",
        "EncodeArguments",
        "Encode a data set with a tokenizer, for train-generator.",
    )
