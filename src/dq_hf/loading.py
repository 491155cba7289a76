"""Tokenizer, generator, or both, of a folder or a repository of the Hub; all files of a repository are of one commit."""

from pathlib import Path

from .hub.download import local_folder
from .hub.folders import read_json_object
from .public import DQConfig, DQPipeline, DQTransformerForImageGeneration, DQVAEModel


def look_into(model, revision=None):
    """Whether a folder or repository holds a generator beside the tokenizer, and the commit looked at (None: a folder)."""
    with local_folder(model, ["config.json"], revision=revision) as folder:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{model} has no config.json; give the folder of a saved model, or a Hub id")
        holds_both = read_json_object(folder / "config.json").get("model_type") == DQConfig.model_type
    return holds_both, None if Path(model).is_dir() else folder.name


def load_tokenizer(model, revision=None, **options):
    """The `DQVAEModel` of a folder or repository, which may be a tokenizer alone or hold both models.

    Args:
        model: path or Hub id.
        revision: branch, tag or commit of a repository.
        options: of `DQVAEModel.from_pretrained`.

    Raises:
        OSError, ValueError: as `DQVAEModel.from_pretrained`.
    """
    return load_part(DQVAEModel, "vae", model, revision, **options)


def load_generator(model, revision=None, **options):
    """The `DQTransformerForImageGeneration` of a folder or repository, alone or beside a tokenizer, like `load_tokenizer`."""
    return load_part(DQTransformerForImageGeneration, "transformer", model, revision, **options)


def load_part(model_class, subfolder, model, revision, **options):
    """A model that lies in a folder alone, or in the subfolder of one with both."""
    holds_both, revision = look_into(model, revision)
    return model_class.from_pretrained(model, revision=revision, subfolder=subfolder if holds_both else "", **options)


def load_pipeline(model, revision=None):
    """The `DQPipeline` of a folder or repository with both models; errors as of `DQPipeline.from_pretrained`."""
    return DQPipeline.from_pretrained(model, revision=revision)


def load_models(model):
    """(`DQVAEModel`, `DQPipeline`) of a folder or repository; (`DQVAEModel`, None) where it holds a tokenizer alone."""
    holds_both, revision = look_into(model)
    if not holds_both:
        return DQVAEModel.from_pretrained(model, revision=revision).eval(), None
    pipe = load_pipeline(model, revision)
    return pipe.vae, pipe
