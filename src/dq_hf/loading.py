"""The tokenizer of a folder or repository."""

from pathlib import Path

from transformers import AutoConfig

from . import DQConfig, DQVAEModel


def load_tokenizer(model, **options):
    """The `DQVAEModel` of a folder or repository, which may be a tokenizer alone or hold both models."""
    joint = isinstance(AutoConfig.from_pretrained(model), DQConfig)
    if joint and Path(model).is_dir():
        model, joint = str(Path(model) / "vae"), False
    return DQVAEModel.from_pretrained(model, subfolder="vae" if joint else "", **options)
