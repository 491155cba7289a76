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
        for name, config_class in (("vae_config", DQVAEConfig), ("transformer_config", DQTransformerConfig)):
            given = getattr(self, name)
            kind = getattr(given, "model_type", None)  # not its class: remote code may have been loaded twice
            if not (given is None or isinstance(given, dict) or kind == config_class.model_type):
                raise TypeError(
                    f"{name} must be a {config_class.__name__} or a dictionary, got {type(given).__name__}"
                )
        # Copies: a composite configuration resets the attention implementation of its parts.
        for name in self.sub_configs:
            setattr(self, name, copy.deepcopy(getattr(self, name)))
        if isinstance(self.vae_config, dict):
            self.vae_config = DQVAEConfig(**self.vae_config)
        elif self.vae_config is None:
            self.vae_config = DQVAEConfig()
        if isinstance(self.transformer_config, dict):
            self.transformer_config = DQTransformerConfig(**self.transformer_config)
        elif self.transformer_config is None:
            vae = self.vae_config
            self.transformer_config = DQTransformerConfig(grid_sizes=vae.grid_sizes, codebook_size=vae.codebook_size)
        if isinstance(self.text_encoder_config, dict):
            self.text_encoder_config = text_encoder_config(self.text_encoder_config)
        names, ids = self.transformer_config.id2label, self.transformer_config.label2id
        if self.id2label is not None and {int(label): name for label, name in self.id2label.items()} != names:
            raise ValueError(
                f"class names belong into transformer_config, which has {names}; got id2label {self.id2label}"
            )
        if self.label2id is not None and self.label2id != ids:
            raise ValueError(f"label2id must be transformer_config's, {ids}; got {self.label2id}")
        self.id2label, self.label2id = dict(names), dict(ids)
        super().__post_init__(**kwargs)

    @property
    def num_labels(self):
        """The generator's `num_classes`. Another number gives the classes new names."""
        return self.transformer_config.num_labels

    @num_labels.setter
    def num_labels(self, num_labels):
        self.transformer_config.num_labels = num_labels
        self.id2label = dict(self.transformer_config.id2label)
        self.label2id = dict(self.transformer_config.label2id)

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
