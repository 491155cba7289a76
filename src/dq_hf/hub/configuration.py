"""Configurations that are read and written strictly: no unknown keys, no values that transformers would take unchecked."""

import difflib
from dataclasses import fields
from pathlib import Path

import torch

from .folders import read_json_object

# Keys without a dataclass field that transformers itself hands to a configuration or writes into its file.
LIBRARY_KEYS = frozenset(
    "model_type transformers_version _name_or_path name_or_path _commit_hash auto_map torch_dtype "
    "attn_implementation _attn_implementation _attn_implementation_internal experts_implementation "
    "_experts_implementation _experts_implementation_internal output_attentions tie_word_embeddings "
    "quantization_config custom_pipelines".split()
)
LOADING_ARGUMENTS = frozenset(  # of models; `transformers.pipeline` gives them to configurations, too
    "variant use_safetensors weights_only low_cpu_mem_usage device_map max_memory offload_folder offload_buffers "
    "ignore_mismatched_sizes key_mapping tp_plan distributed_config".split()
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ConfigHubMixin:
    """Stands before `PreTrainedConfig`, for a class with `own_field_names` and `validate`."""

    def check_entries(self, entries):
        """Raise `TypeError` or `ValueError` at entries that are no fields, of another model, or of a wrong type."""
        self.refuse_other_model(entries)
        self.refuse_unknown(entries)
        self.check_library_values(entries)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but no file is an error (`OSError`), not the default configuration."""
        place = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        kwargs.pop("user_agent", None)  # diffusers gives it, for device_map="balanced"
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
                config.refuse_unknown(unused.keys() - LOADING_ARGUMENTS)
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
