"""DQ-VAE and DQ-Transformer together: one folder, one model, from class labels to images."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput

from .configuration_dq import DQConfig
from .generation_dq import evaluation_mode
from .hub_dq import HubMixin
from .image_processing_dq import DQImageProcessor
from .modeling_dqtransformer import DQTransformerForImageGeneration
from .modeling_dqvae import DQVAEModel
from .modeling_utils_dq import TorchInitMixin


@dataclass
class DQImageGenerationOutput(ModelOutput):
    """What `DQForImageGeneration.generate` gives.

    Args:
        pixel_values: (B, 3, height, width), the images, about in [-1, 1].
        codes: (B, H, W) long.
        grain_map: (B, h, w) long.
        lengths: (B,) long, elements of each image's stream.
    """

    pixel_values: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    grain_map: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


PARTS = {"vae": DQVAEModel, "transformer": DQTransformerForImageGeneration}  # sub-folder and attribute: class
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class TwoPartModel(TorchInitMixin, PreTrainedModel):
    """Saves and loads the tokenizer and the generator in a folder each, with the files of a pipeline beside them."""

    def save_pretrained(self, save_directory, *, is_main_process=True, state_dict=None, **arguments):
        """Save as in transformers; `ValueError` if a part has an adapter."""
        folder, parts = Path(save_directory), {name: getattr(self, name) for name in PARTS}
        for name, part in parts.items():
            if any(hasattr(module, "base_layer") for module in part.modules()):
                raise ValueError(
                    f"the {name} has an adapter: merge it first (PeftModel.merge_and_unload), "
                    "or save the adapter alone (PeftModel.save_pretrained)"
                )
        for name, part in parts.items():
            weights = None
            if state_dict is not None:
                prefix = f"{name}."
                weights = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
            arguments |= {"is_main_process": is_main_process, "state_dict": weights}
            PreTrainedModel.save_pretrained(part, folder / name, **arguments)
        if is_main_process:
            if self.is_remote_code():  # as transformers does for one model
                custom_object_save(self, folder, config=self.config)
            write_root_files(self, folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Load a folder or repository written by `save_pretrained`; arguments as for one model.

        A `quantization_config` is for the generator; the tokenizer is nearly all convolutions.
        """
        source = str(pretrained_model_name_or_path)
        if config is None:
            config = DQConfig.from_pretrained(source, **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})
        if (attention := kwargs.pop("attn_implementation", None)) is not None:
            config._attn_implementation = attention  # and that of its parts
        root = Path(kwargs.pop("subfolder", None) or "")
        models, infos = {}, {}
        for name in PARTS:
            listed = getattr(config, f"{name}_config")
            options = kwargs | {"attn_implementation": listed._attn_implementation}
            if name == "vae":
                options.pop("quantization_config", None)
            models[name], infos[name] = load_part(name, source, root, *args, **options)
            own = models[name].config
            fields = sorted(own.own_field_names()) + ["id2label"]
            different = [field for field in fields if getattr(own, field) != getattr(listed, field)]
            if different:
                raise ValueError(f"{source}: config.json and {name}/config.json disagree on {', '.join(different)}")
        model = cls.from_models(**models).eval()
        if hasattr(config, "auto_map"):  # of code that came with the model
            model.config.auto_map = config.auto_map
        return (model, infos) if output_loading_info else model


def load_part(name, source, root, *args, **kwargs):
    """One of the two models and its loading information, from a sub-folder of a folder or repository."""
    repository, subfolder = source, str(root / name)
    if Path(source).is_dir():  # goes in whole, so that messages name it
        repository, subfolder = str(Path(source, root, name)), ""
        if not Path(repository).is_dir():
            raise OSError(f"{Path(source, root)} has no folder {name}; save or download the model again")
    return PARTS[name].from_pretrained(repository, *args, subfolder=subfolder, output_loading_info=True, **kwargs)


def write_root_files(model, folder):
    """The small files beside `vae/` and `transformer/`: configuration, pipeline index, image processor."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    DQImageProcessor.for_model(model.config.vae_config).save_pretrained(folder)
    index = {"_class_name": "DQPipeline", "_diffusers_version": diffusers.__version__}
    # Named as in the package also where this is an exported copy, for `DQPipeline`.
    modules = {name: f"dq_hf.modeling.{part.__module__.rpartition('.')[2]}" for name, part in PARTS.items()}
    index |= {name: [modules[name], part.__name__] for name, part in PARTS.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class DQForImageGeneration(HubMixin, TwoPartModel):
    """The tokenizer `.vae` and the generator `.transformer`.

    A saved folder holds `config.json`, `model_index.json`, `preprocessor_config.json` and the two models in `vae/` and
    `transformer/`; `DQPipeline`, `AutoModel` and `pipeline("dq-generation")` load it alike.
    """

    config_class = DQConfig
    base_model_prefix = "dq"
    part_folders = tuple(PARTS)
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DQConfig):
        config.validate()
        super().__init__(config)
        self.vae = DQVAEModel(config.vae_config)
        self.transformer = DQTransformerForImageGeneration(config.transformer_config)
        self.post_init()

    @classmethod
    def from_models(cls, vae, transformer):
        """Join a tokenizer and a generator, which stay as they are; raises ValueError if they do not fit."""
        with torch.device("meta"):  # nothing is allocated or initialised for the parts that are replaced
            model = cls(DQConfig(vae_config=vae.config, transformer_config=transformer.config))
        model.vae, model.transformer = vae, transformer
        model.config.vae_config, model.config.transformer_config = vae.config, transformer.config
        return model

    def forward(self, pixel_values, class_labels=None):
        """The generator's training losses on images (B, 3, height, width); see `DQTransformerOutput`.

        The tokenizer is frozen: it is put into evaluation mode and gets no gradient.
        """
        with torch.no_grad():
            encoded = self.vae.eval().encode(pixel_values)
        return self.transformer(encoded.codes, encoded.grain_map, class_labels)

    @torch.no_grad()
    def generate(self, class_labels=None, num_images=None, **options) -> DQImageGenerationOutput:
        """Images of class labels; arguments as in `DQTransformerForImageGeneration.generate`."""
        generated = self.transformer.generate(class_labels, num_images, **options)
        with evaluation_mode(self.vae):
            pixel_values = self.vae.decode_each(generated.codes).sample
        return DQImageGenerationOutput(
            pixel_values=pixel_values,
            codes=generated.codes,
            grain_map=generated.grain_map,
            lengths=generated.lengths,
        )
