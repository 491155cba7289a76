"""What the three configurations share: typed fields, no unknown keys, impossible combinations refused."""

import math
from dataclasses import fields

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from .hub_dq import ConfigHubMixin, without_remote_code

# Above these a configuration is damaged, and would take hours to build or more memory than there is.
MOST_LAYERS = 1000  # in one place
MOST_WIDTH = 2**20  # channels, pixels of a side or classes
MOST_COUNT = 2**31 - 1  # codes or elements: indices of 32 bits


class DQPreTrainedConfig(ConfigHubMixin, PreTrainedConfig):
    """A `PreTrainedConfig` that refuses unknown keys, wrong types (`TypeError`) and impossible values (`ValueError`).

    Subclasses put their rules into `validate_fields`, and defaults that depend on other fields into `fill_defaults`.
    """

    def __post_init__(self, **kwargs):
        kwargs = without_remote_code(kwargs)
        self.check_entries(kwargs)
        super().__post_init__(**kwargs)
        self.validate()

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


def require_finite(config, *names):
    """Raise `ValueError` unless each named field is finite, and 0 or more."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {getattr(config, name)}")


def check_choice(name, value, choices):
    """Raise `ValueError` unless a value is one of these."""
    if value not in choices:
        names = ", ".join(str(choice) if choice is None else f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be one of {names}; got {value!r}")
