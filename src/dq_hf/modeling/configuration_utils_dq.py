"""What the three configurations share: typed fields, no unknown keys, impossible combinations refused."""

import difflib
import math
from dataclasses import fields

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from .remote_code_dq import without_remote_code

# Keys without a dataclass field that transformers itself hands to a configuration or writes into its file.
LIBRARY_KEYS = frozenset(
    "model_type transformers_version _name_or_path name_or_path _commit_hash auto_map torch_dtype num_labels "
    "attn_implementation _attn_implementation _attn_implementation_internal experts_implementation "
    "_experts_implementation _experts_implementation_internal output_attentions tie_word_embeddings "
    "quantization_config custom_pipelines".split()
)


class DQPreTrainedConfig(PreTrainedConfig):
    """A `PreTrainedConfig` that refuses unknown keys, wrong types (`TypeError`) and impossible values (`ValueError`).

    Subclasses put their rules into `validate_fields`, and defaults that depend on other fields into `fill_defaults`.
    """

    def __post_init__(self, **kwargs):
        kwargs = without_remote_code(kwargs)
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"a {type(self).__name__} has model_type {self.model_type!r}, got {kwargs['model_type']!r}; "
                "load that model with its own class, or give its subfolder"
            )
        self.refuse_unknown(kwargs)
        super().__post_init__(**kwargs)
        self.validate()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but no file is an error (`OSError`), not the default configuration."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json, or it is empty; save the model again")
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """As in transformers, but what `kwargs` change is checked too."""
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config.validate()
        if return_unused_kwargs:
            return config, unused
        config.refuse_unknown(unused)
        return config

    def refuse_unknown(self, keys):
        """Raise `ValueError` at a key that is no field."""
        known = {field.name for field in fields(self)}
        for key in keys:
            if key not in known | LIBRARY_KEYS:
                close = difflib.get_close_matches(key, known, n=1)
                own = ", ".join(sorted(self.own_field_names()))
                hint = f"did you mean {close[0]!r}?" if close else f"it has {own}"
                raise ValueError(f"{type(self).__name__} has no field {key!r}; {hint}")

    def validate(self):
        """Check every field; a model calls this first, because fields may have been set since construction."""
        self.validate_types()
        self.fill_defaults()
        self.validate_fields()

    def validate_types(self):
        """Make lists of tuples, as JSON does, and raise `TypeError` at a field of another type than declared."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = list(value)
                setattr(self, field.name, value)
            if field.name in self.own_field_names():
                try:
                    type_validator(field.name, value, field.type)
                except TypeError as error:
                    raise TypeError(f"{type(self).__name__}: {error}") from None

    def own_field_names(self):
        """Names of the fields that our configuration classes declare, without those of transformers."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return {field.name for field in fields(self)} - inherited

    def fill_defaults(self):
        """Set the fields at None whose default depends on other fields."""

    def validate_fields(self):
        """Raise `ValueError` for values that cannot work; each subclass has its own rules."""


def require_positive(config, *names):
    """Raise `ValueError` unless each named field is above 0 and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")


def require_probability(config, *names):
    """Raise `ValueError` unless each named field lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
