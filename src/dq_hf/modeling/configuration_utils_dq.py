"""What the three configurations share: typed fields, no unknown keys, impossible combinations refused."""

import difflib
import math
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from .hub_dq import read_json_object, without_remote_code

# Keys without a dataclass field that transformers itself hands to a configuration or writes into its file.
LIBRARY_KEYS = frozenset(
    "model_type transformers_version _name_or_path name_or_path _commit_hash auto_map torch_dtype "
    "attn_implementation _attn_implementation _attn_implementation_internal experts_implementation "
    "_experts_implementation _experts_implementation_internal output_attentions tie_word_embeddings "
    "quantization_config custom_pipelines".split()
)

# Above these a configuration is damaged, and would take hours to build or more memory than there is.
MOST_LAYERS = 1000  # in one place
MOST_WIDTH = 2**20  # channels, pixels of a side or classes
MOST_COUNT = 2**31 - 1  # codes or elements: indices of 32 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class DQPreTrainedConfig(PreTrainedConfig):
    """A `PreTrainedConfig` that refuses unknown keys, wrong types (`TypeError`) and impossible values (`ValueError`).

    Subclasses put their rules into `validate_fields`, and defaults that depend on other fields into `fill_defaults`.
    """

    def __post_init__(self, **kwargs):
        kwargs = without_remote_code(kwargs)
        self.refuse_other_model(kwargs)
        self.refuse_unknown(kwargs)
        self.check_library_values(kwargs)
        super().__post_init__(**kwargs)
        self.validate()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but no file is an error (`OSError`), not the default configuration."""
        place = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kwargs["_place"] = place  # for messages
        if not config_dict:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json; save the model again")
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """As in transformers, but what `kwargs` change is checked too, and errors name the file."""
        place = kwargs.pop("_place", kwargs.get("name_or_path"))  # AutoConfig gives the name
        try:
            config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
            config.validate()
            if not return_unused_kwargs:
                config.refuse_unknown(unused)
        except Exception as error:  # transformers reads fields of its own before anyone has checked them
            kind = TypeError if isinstance(error, TypeError) else ValueError
            problem = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
            raise kind(problem if place is None else f"{Path(place, 'config.json')}: {problem}") from error
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _dict_from_json_file(cls, json_file):
        content = read_json_object(json_file)
        if not content:
            raise OSError(f"{json_file} is empty; download or save it again")
        try:
            cls.refuse_other_model(content)
            cls.refuse_unknown(content)  # before transformers follows keys of its own, such as configuration_files
        except ValueError as error:
            raise ValueError(f"{json_file}: {error}") from None
        return super()._dict_from_json_file(json_file)

    @classmethod
    def refuse_other_model(cls, entries):
        """Raise `ValueError` at the entries of another kind of model."""
        kind = entries.get("model_type", cls.model_type)
        if kind != cls.model_type:
            both = 'give subfolder="vae" for the tokenizer in it, or subfolder="transformer" for the generator'
            remedy = both if kind == "dq" else "load that model with its own class, or give its subfolder"
            raise ValueError(f"a {cls.__name__} has model_type {cls.model_type!r}, got {kind!r}; {remedy}")

    @classmethod
    def refuse_unknown(cls, keys):
        """Raise `ValueError` at a key that is no field."""
        known = {field.name for field in fields(cls)}
        for key in keys:
            if key not in known | LIBRARY_KEYS:
                close = difflib.get_close_matches(key, known, n=1)
                own = ", ".join(sorted(cls.own_field_names()))
                hint = f"did you mean {close[0]!r}?" if close else f"it has {own}"
                raise ValueError(f"{cls.__name__} has no field {key!r}; {hint}")

    def to_dict(self):
        """As in transformers, without attributes that libraries or users set and that no file may hold (`use_cache`)."""
        known = {field.name for field in fields(self)} | LIBRARY_KEYS
        return {key: value for key, value in super().to_dict().items() if key in known}

    def check_library_values(self, keys):
        """Raise `TypeError` or `ValueError` at values that transformers would take unchecked."""
        for name in ("dtype", "torch_dtype"):
            dtype = self.dtype if name == "dtype" else keys.get(name)
            dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
            if dtype is not None and dtype not in DTYPES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise ValueError(f"{name} must be one of {known}, got {dtype!r}")
        quantization = keys.get("quantization_config")
        if isinstance(quantization, dict) and not isinstance(quantization.get("quant_method"), str):
            raise ValueError(f"quantization_config must name its quant_method, got {quantization}")
        for name in ("attn_implementation", "_attn_implementation", "quantization_config"):
            if isinstance(keys.get(name), (bool, int, float, list)):
                raise TypeError(f"{name} must be a name or a dictionary, got {keys[name]!r}")
        for name in ("id2label", "label2id"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise TypeError(f"{name} must be a dictionary, got {getattr(self, name)!r}")

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

    @classmethod
    def own_field_names(cls):
        """Names of the fields that our configuration classes declare, without those of transformers."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return {field.name for field in fields(cls)} - inherited

    def fill_defaults(self):
        """Set the fields at None whose default depends on other fields."""

    def validate_fields(self):
        """Raise `ValueError` for values that cannot work; each subclass has its own rules."""


def require_positive(config, *names):
    """Raise `ValueError` unless each named field is above 0 and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")


def require_at_most(config, limit, *names):
    """Raise `ValueError` if a named field, or one of its numbers, is above the limit."""
    for name in names:
        value = getattr(config, name)
        if max(value if isinstance(value, list) else [value], default=0) > limit:
            raise ValueError(f"{name} must be at most {limit}, got {value}")


def require_probability(config, *names):
    """Raise `ValueError` unless each named field lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
