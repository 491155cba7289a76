"""DQ-VAE, DQ-Transformer and perhaps a text encoder together: one folder, one model, from classes or prompts to images."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput, cached_file

from .configuration_dq import DQConfig
from .generation_dq import steps_arguments
from .hub_dq import HubMixin, load_model
from .image_processing_dq import DQImageProcessor
from .modeling_dqtransformer import DQTransformerForImageGeneration
from .modeling_dqvae import DQVAEModel
from .modeling_utils_dq import TorchInitMixin, evaluation_mode, uncompiled
from .sampling_options_dq import argument_names, check_names
from .text_dq import check_tokenizer, encode_tokens, prompt_arguments, text_encoder_class, unused_parameters


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
PART_FOLDERS = (*PARTS, "text_encoder")  # the last one may be missing
TOKENIZER_FOLDER = "tokenizer"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ComposedModel(TorchInitMixin, PreTrainedModel):
    """Saves and loads each part in a folder of its own, with the files of a pipeline beside them."""

    def save_pretrained(self, save_directory, *, is_main_process=True, state_dict=None, **arguments):
        """Save as in transformers; `ValueError` if a part has an adapter, or the parts do not fit each other."""
        folder = Path(save_directory)
        self.join_configs()
        for name, part in self.parts.items():
            if any(hasattr(module, "base_layer") for module in part.modules()):
                raise ValueError(
                    f"the {name} has an adapter: merge it first (PeftModel.merge_and_unload), "
                    "or save the adapter alone (PeftModel.save_pretrained)"
                )
        # Else a text encoder gets the names of the checkpoint that it was loaded from, such as a whole CLIP's.
        arguments = {"save_original_format": False, **arguments}
        for name, part in self.parts.items():
            weights = None
            if state_dict is not None:
                prefix = f"{name}."
                own = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
                weights = {key.removeprefix("_orig_mod."): weight for key, weight in own.items()}
            arguments |= {"is_main_process": is_main_process, "state_dict": weights}
            PreTrainedModel.save_pretrained(part, folder / name, **arguments)
        if is_main_process:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
            if self.is_remote_code():  # as transformers does for one model
                custom_object_save(self, folder, config=self.config)
            write_root_files(self, folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Load a folder or repository written by `save_pretrained`; arguments as for one model.

        A `quantization_config` is for the generator; the tokenizer is nearly all convolutions.
        """
        source = str(pretrained_model_name_or_path)
        place = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if config is None:
            config = DQConfig.from_pretrained(source, **place)
        attention = kwargs.pop("attn_implementation", None)
        root = Path(kwargs.pop("subfolder", None) or "")
        models, infos = {}, {}
        for name in PART_FOLDERS:
            listed = getattr(config, f"{name}_config")
            if listed is None:
                continue
            options = kwargs | {"attn_implementation": attention or listed._attn_implementation}
            if name != "transformer":
                options.pop("quantization_config", None)
            part_class = PARTS.get(name) or text_encoder_class(listed)
            models[name], infos[name] = load_part(part_class, source, root / name, *args, **options)
            if different := differences(models[name].config, listed):
                raise ValueError(
                    f"{source}: config.json and {name}/config.json disagree on {', '.join(different)}; if that was given "
                    "as an argument, set it on the configuration of the loaded model instead"
                )
        tokenizer = None if config.text_encoder_config is None else load_text_tokenizer(source, root, place)
        model = cls.from_models(**models, tokenizer=tokenizer).eval()
        if attention is not None:
            model.set_attn_implementation(attention)
        if hasattr(config, "auto_map"):  # of code that came with the model
            model.config.auto_map = config.auto_map
        return (model, joined(infos)) if output_loading_info else model


def joined(infos):
    """The loading information of a whole from {part: loading information}, as transformers gives it; keys by their part."""
    whole = {}
    for name, info in infos.items():
        for problem, keys in info.items():
            named = [(f"{name}.{key[0]}", *key[1:]) if isinstance(key, tuple) else f"{name}.{key}" for key in keys]
            whole.setdefault(problem, set()).update(named)
    return whole


def load_part(part_class, source, subfolder, *args, **kwargs):
    """One of the models and its loading information, from a sub-folder of a folder or repository."""
    if Path(source).is_dir():  # goes in whole, so that messages name it
        if not Path(source, subfolder).is_dir():
            place = Path(source, subfolder)
            raise OSError(f"{place.parent} has no folder {place.name}; save or download the model again")
        source = Path(source, subfolder)
    else:
        kwargs["subfolder"] = str(subfolder)
    if part_class in PARTS.values():
        return part_class.from_pretrained(source, *args, output_loading_info=True, **kwargs)
    return load_model(part_class, part_class.from_pretrained, source, *args, **kwargs)


def load_text_tokenizer(source, root, place):
    """The tokenizer of the text encoder in a folder or repository; None without one. Code that comes with it is not run."""
    folder = Path(source, root, TOKENIZER_FOLDER)
    if Path(source).is_dir():
        if not folder.is_dir():
            return None
        source, place = folder, {}
    else:
        place = place | {"subfolder": str(root / TOKENIZER_FOLDER)}
        if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **place) is None:
            return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **place)
    except OSError:
        raise
    except Exception as error:  # of any kind, also a bare one, where the files are no tokenizer's
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}; save or download it again") from error


def differences(own, listed):
    """Names of the fields in which a part's configuration differs from what the whole's says of it."""
    if hasattr(own, "own_field_names"):
        fields = sorted(own.own_field_names()) + ["id2label"]
        return [field for field in fields if getattr(own, field) != getattr(listed, field)]
    own, listed = own.to_diff_dict(), listed.to_diff_dict()
    return [key for key in sorted({*own, *listed} - {"dtype"}) if own.get(key) != listed.get(key)]


def write_root_files(model, folder):
    """The small files beside the parts' folders: configuration, pipeline index, image processor."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    DQImageProcessor.for_model(model.config.vae_config).save_pretrained(folder)
    index = {"_class_name": "DQPipeline", "_diffusers_version": diffusers.__version__}
    # Named as in the package also where this is an exported copy, for `DQPipeline`.
    modules = {name: f"dq_hf.modeling.{part.__module__.rpartition('.')[2]}" for name, part in PARTS.items()}
    index |= {name: [modules[name], part.__name__] for name, part in PARTS.items()}
    for name in ("text_encoder", "tokenizer"):
        if (part := getattr(model, name)) is not None:
            index[name] = ["transformers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class DQForImageGeneration(HubMixin, ComposedModel):
    """The image tokenizer `.vae` and the generator `.transformer`; with text also `.text_encoder` and its `.tokenizer`.

    A saved folder holds `config.json`, `model_index.json`, `preprocessor_config.json` and the parts in `vae/`,
    `transformer/`, `text_encoder/` and `tokenizer/`; `DQPipeline`, `AutoModel` and `pipeline("dq-generation")` load it
    alike. The text encoder and its tokenizer are None where there are none.
    """

    config_class = DQConfig
    base_model_prefix = "dq"
    part_folders = PART_FOLDERS
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
        text = config.text_encoder_config
        self.text_encoder = None if text is None else text_encoder_class(text)(text)
        self.tokenizer = None
        self.post_init()

    @classmethod
    def from_models(cls, vae, transformer, text_encoder=None, tokenizer=None):
        """Join an image tokenizer and a generator, which stay as they are.

        Args:
            vae, transformer: as `DQVAEModel` and `DQTransformerForImageGeneration`.
            text_encoder: a model of transformers, for a generator with text; without it texts are given as
                `encoder_hidden_states`.
            tokenizer: of transformers, the text encoder's; without it texts are given as `input_ids`.

        Raises:
            TypeError, ValueError: they do not fit each other.
        """
        parts = {"vae": uncompiled(vae), "transformer": uncompiled(transformer)}
        if text_encoder is not None:
            text_encoder = parts["text_encoder"] = uncompiled(text_encoder)
            if not isinstance(text_encoder, PreTrainedModel):
                raise TypeError(
                    f"text_encoder must be a model of transformers, got {type(text_encoder).__name__}; of a PeftModel, "
                    "give what merge_and_unload() returns"
                )
            text_encoder.config.architectures = [type(text_encoder).__name__]  # as saving it does
        configs = {f"{name}_config": part.config for name, part in parts.items()}
        with torch.device("meta"):  # nothing is allocated or initialised for the parts that are replaced
            model = cls(DQConfig(**configs))
        if tokenizer is not None:
            check_tokenizer(tokenizer, model.config.text_encoder_config, transformer.config.text_length)
        for name, part in parts.items():
            setattr(model, name, part)
        model.join_configs()
        model.tokenizer = tokenizer
        return model

    @property
    def parts(self):
        """{sub-folder: model} of the models in a saved folder."""
        return {name: uncompiled(part) for name in PART_FOLDERS if (part := getattr(self, name)) is not None}

    def join_configs(self):
        """Let the configuration be that of the parts, which may be others by now; `ValueError` if they do not fit each other."""
        if self.text_encoder is not None:  # as saving it does
            self.parts["text_encoder"].config.architectures = [type(self.parts["text_encoder"]).__name__]
        self.config.join(**{f"{name}_config": part.config for name, part in self.parts.items()})

    def forward(
        self,
        pixel_values,
        class_labels=None,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        return_loss=True,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """The generator's training losses on images (B, 3, height, width); see `DQTransformerOutput`.

        The image tokenizer is frozen: it is put into evaluation mode and gets no gradient. The text encoder is trained
        along where its weights ask for a gradient.

        Args:
            class_labels, encoder_hidden_states, encoder_attention_mask: as in the generator's `forward`.
            input_ids, attention_mask: (B, T) of texts, as `text_dq.tokenize` gives them, instead of the states.
            return_loss, output_attentions, output_hidden_states, return_dict: as in the generator's `forward`.
        """
        with torch.no_grad():
            encoded = self.vae.eval().encode(pixel_values)
        texts = self.text_states(input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask)
        outputs = dict(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        outputs = {name: value for name, value in outputs.items() if value is not None}
        return self.transformer(encoded.codes, encoded.grain_map, class_labels, *texts, return_loss, **outputs)

    def text_states(self, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask):
        """States of texts and their mask, as they are given or of `input_ids`; ValueError at both, or at a mask alone."""
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask is of input_ids: give both; that of the states is encoder_attention_mask"
                )
            return encoder_hidden_states, encoder_attention_mask
        if encoder_hidden_states is not None:
            raise ValueError("give input_ids or encoder_hidden_states, not both")
        if self.text_encoder is None:
            raise ValueError("input_ids need a text encoder, and this model has none: give encoder_hidden_states")
        if encoder_attention_mask is not None:
            raise ValueError("encoder_attention_mask is of encoder_hidden_states; that of input_ids is attention_mask")
        return encode_tokens(self.text_encoder, input_ids, attention_mask)

    @property
    def _ddp_params_and_buffers_to_ignore(self):
        """Names of what `forward` does not train, and DistributedDataParallel need not wait for."""
        names = [f"vae.{name}" for name in self.vae.state_dict()]
        if self.text_encoder is not None:
            names += [f"text_encoder.{name}" for name in unused_parameters(self.text_encoder)]
        return names

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in torch. Weights of one part may have the names that they have in its file: transformers.Trainer resumes so."""
        for name, part in self.parts.items():
            if state_dict.keys() <= part.state_dict().keys():
                state_dict = {f"{name}.{key}": value for key, value in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def get_input_embeddings(self):
        """The generator's."""
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Another table in the generator."""
        self.transformer.set_input_embeddings(value)

    @torch.no_grad()
    def generate(
        self, class_labels=None, num_images=None, *, prompt=None, negative_prompt=None, **options
    ) -> DQImageGenerationOutput:
        """Images of class labels, of prompts or of both.

        Args:
            prompt: one text, or one for each image; None: no text.
            negative_prompt: likewise, for the unconditional half of guidance; without effect where the guidance scale is 1.
            class_labels, num_images, options: as in `DQTransformerForImageGeneration.generate`.
        """
        check_names(options, steps_arguments(self.transformer), argument_names(self.generate))
        config = self.transformer.config
        labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
        if any(isinstance(label, str) for label in labels):
            raise TypeError(f"class_labels must be integers, got {class_labels!r}; give texts as prompt=...")
        texts = prompt_arguments(config, self.text_encoder, self.tokenizer, prompt, negative_prompt)
        if twice := sorted(set(texts) & set(options)):
            raise ValueError(f"give a prompt or {', '.join(twice)}, not both")
        generated = self.transformer.generate(class_labels, num_images, **options, **texts)
        with evaluation_mode(self.vae):
            pixel_values = self.vae.decode_each(generated.codes).sample
        return DQImageGenerationOutput(
            pixel_values=pixel_values,
            codes=generated.codes,
            grain_map=generated.grain_map,
            lengths=generated.lengths,
        )
