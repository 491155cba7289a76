"""Tokenizer, generator, or both, of a folder or a repository of the Hub; all files of a repository are of one commit."""

from .hub.download import model_type_of
from .public import DQConfig, DQPipeline, DQTransformerForImageGeneration, DQVAEModel


def load_tokenizer(model, revision=None, **options):
    """The `DQVAEModel` of a folder or repository, which may be a tokenizer alone or hold both models.

    Args:
        model: path or Hub id.
        revision: branch, tag or commit of a repository.
        options: of `DQVAEModel.from_pretrained`.

    Raises:
        OSError, ValueError: as `DQVAEModel.from_pretrained`.
    """
    return load_one(DQVAEModel, "vae", model, revision, **options)


def load_generator(model, revision=None, **options):
    """The `DQTransformerForImageGeneration` of a folder or repository, alone or beside a tokenizer, like `load_tokenizer`."""
    return load_one(DQTransformerForImageGeneration, "transformer", model, revision, **options)


def load_one(model_class, subfolder, model, revision, **options):
    """A model that lies in a folder alone, or in the subfolder of one with both."""
    kind, revision = model_type_of(model, revision)
    subfolder = subfolder if kind == DQConfig.model_type else ""
    return model_class.from_pretrained(model, revision=revision, subfolder=subfolder, **options)


def load_pipeline(model, revision=None):
    """The `DQPipeline` of a folder or repository with both models; errors as of `DQPipeline.from_pretrained`."""
    return DQPipeline.from_pretrained(model, revision=revision)


def load_models(model):
    """(`DQVAEModel`, `DQPipeline`) of a folder or repository; (`DQVAEModel`, None) where it holds a tokenizer alone."""
    kind, revision = model_type_of(model)
    if kind != DQConfig.model_type:
        return DQVAEModel.from_pretrained(model, revision=revision).eval(), None
    pipe = load_pipeline(model, revision)
    return pipe.vae, pipe
