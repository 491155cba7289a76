"""Configuration of tokenizer and generator together."""

import copy
from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .configuration_dqtransformer import DQTransformerConfig
from .configuration_dqvae import DQVAEConfig
from .configuration_utils_dq import DQPreTrainedConfig
from .text_dq import check_text_encoder, text_encoder_config


class DQConfig(DQPreTrainedConfig):
    """A `DQVAEConfig` and a `DQTransformerConfig` that fit each other, and perhaps the configuration of a text encoder.

    Args:
        vae_config: the tokenizer's, as a configuration or a dictionary.
        transformer_config: the generator's; its class names are this configuration's `id2label`.
        text_encoder_config: of any text encoder of transformers, for a generator with text; None: without.
    """

    model_type = "dq"
    keys_to_ignore_at_inference: ClassVar = DQTransformerConfig.keys_to_ignore_at_inference
    sub_configs: ClassVar = {
        "vae_config": DQVAEConfig,
        "transformer_config": DQTransformerConfig,
        "text_encoder_config": AutoConfig,
    }

    vae_config: dict | DQVAEConfig | None = None
    transformer_config: dict | DQTransformerConfig | None = None
    text_encoder_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        # Copies: a composite configuration resets the attention implementation of its parts.
        for name in self.sub_configs:
            setattr(self, name, copy.deepcopy(getattr(self, name)))
        self.vae_config = vae = as_config("vae_config", self.vae_config, DQVAEConfig, {})
        fitting = {"grid_sizes": vae.grid_sizes, "codebook_size": vae.codebook_size}
        self.transformer_config = as_config(
            "transformer_config", self.transformer_config, DQTransformerConfig, fitting
        )
        if isinstance(self.text_encoder_config, dict):
            self.text_encoder_config = text_encoder_config(self.text_encoder_config)
        names, ids = self.transformer_config.id2label, self.transformer_config.label2id
        if self.id2label is not None and {int(label): name for label, name in self.id2label.items()} != names:
            raise ValueError(
                f"class names belong into transformer_config, which has {names}; got id2label {self.id2label}"
            )
        if self.label2id is not None and self.label2id != ids:
            raise ValueError(f"label2id must be transformer_config's, {ids}; got {self.label2id}")
        self.id2label, self.label2id = names, ids
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        """Class names that are set here are the generator's: both have the same dictionaries."""
        super().__setattr__(name, value)
        if name in ("id2label", "label2id") and isinstance(self.transformer_config, PreTrainedConfig):
            setattr(self.transformer_config, name, value)

    def join(self, **configs):
        """Let the configurations of the parts be these, as `vae_config` and so on, and check that they fit each other."""
        for name in self.sub_configs:
            setattr(self, name, configs.get(name))
        self.id2label, self.label2id = self.transformer_config.id2label, self.transformer_config.label2id
        self.validate()

    @property
    def num_labels(self):
        """The generator's `num_classes`. Another number gives the classes new names."""
        return self.transformer_config.num_labels

    @num_labels.setter
    def num_labels(self, num_labels):
        self.transformer_config.num_labels = num_labels
        self.id2label, self.label2id = self.transformer_config.id2label, self.transformer_config.label2id

    def validate_fields(self):
        self.vae_config.validate()
        self.transformer_config.validate()
        for name in ("grid_sizes", "codebook_size"):
            tokenizer, generator = getattr(self.vae_config, name), getattr(self.transformer_config, name)
            if tokenizer != generator:
                raise ValueError(
                    f"tokenizer and generator do not fit: the tokenizer's {name} is {tokenizer}, the generator's {generator}"
                )
        if self.text_encoder_config is not None:
            check_text_encoder(self.text_encoder_config, self.transformer_config)

    def to_diff_dict(self):
        """What the file holds: the parts as in their own files, without the path that they were loaded from."""
        parts = {name: getattr(self, name) for name in self.sub_configs}
        return super().to_diff_dict() | {name: part.to_diff_dict() for name, part in parts.items() if part is not None}


def as_config(name, given, config_class, default):
    """A configuration of this class, from one, from a dictionary or, where nothing is given, from the default one; `TypeError`."""
    given = default if given is None else given
    if isinstance(given, dict):
        return config_class(**given)
    if getattr(given, "model_type", None) != config_class.model_type:  # not its class: remote code may be loaded twice
        raise TypeError(f"{name} must be a {config_class.__name__} or a dictionary, got {type(given).__name__}")
    return given
