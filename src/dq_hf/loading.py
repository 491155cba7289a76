"""The tokenizer, or both models, of a folder or a repository of the Hub; all files of a repository are of one commit."""

from pathlib import Path

from transformers import AutoConfig

from .modeling.hub_dq import loading_from, pin_revision
from .public import DQConfig, DQPipeline, DQVAEModel


def load_config(model, revision=None):
    """The configuration that a folder or repository begins with, and the commit that it is of (None: a folder)."""
    with loading_from(model, revision=revision):
        revision = pin_revision(model, revision=revision)
        return AutoConfig.from_pretrained(model, revision=revision), revision


def load_tokenizer(model, revision=None, **options):
    """The `DQVAEModel` of a folder or repository, which may be a tokenizer alone or hold both models.

    Args:
        model: path or Hub id.
        revision: branch, tag or commit of a repository.
        options: of `DQVAEModel.from_pretrained`.

    Raises:
        OSError, ValueError: as `DQVAEModel.from_pretrained`.
    """
    config, revision = load_config(model, revision)
    subfolder = "vae" if isinstance(config, DQConfig) else ""
    return DQVAEModel.from_pretrained(model, revision=revision, subfolder=subfolder, **options)


def load_pipeline(model, revision=None):
    """The `DQPipeline` of a folder or repository with both models; errors as of `DQPipeline.from_pretrained`."""
    folder = model if Path(model).is_dir() else DQPipeline.download(model, revision=revision)
    return DQPipeline.from_pretrained(folder)


def load_models(model):
    """(`DQVAEModel`, `DQPipeline`) of a folder or repository; (`DQVAEModel`, None) where it holds a tokenizer alone."""
    config, revision = load_config(model)
    if not isinstance(config, DQConfig):
        return DQVAEModel.from_pretrained(model, revision=revision).eval(), None
    pipe = load_pipeline(model, revision)
    return pipe.vae, pipe
