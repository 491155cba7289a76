"""Images from prompts and class labels, the diffusers way."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..hub.card import read_source_card
from ..hub.download import HUB_ARGUMENTS, local_folder
from ..hub.folders import read_json_object
from ..hub.weights import check_weight_files, check_weights_finite, weight_files
from ..modeling.conditioning_dq import check_text
from ..modeling.generation_dq import steps_arguments
from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.modeling_dq import PARTS, DQForImageGeneration
from ..modeling.modeling_dqtransformer import DQTransformerForImageGeneration
from ..modeling.modeling_dqvae import DQVAEModel
from ..modeling.modeling_utils_dq import evaluation_mode
from ..modeling.sampling_options_dq import argument_names, check_count, check_names
from ..modeling.text_dq import prompt_arguments, require_text, text_encoder_class
from .class_labels import as_list, class_ids

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
ELSEWHERE = {  # arguments of `generate_steps`: those of a pipeline
    "num_images": "num_images_per_prompt, or num_images_per_label",
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "negative_encoder_hidden_states": "negative_prompt_embeds",
    "negative_encoder_attention_mask": "negative_prompt_attention_mask",
}
NEEDS_BOTH = "a pipeline needs the tokenizer and the generator, as DQForImageGeneration.save_pretrained writes them"


@dataclass
class DQPipelineOutput(BaseOutput):
    """What `DQPipeline` gives.

    Args:
        images: by output_type: list of PIL images, (B, height, width, 3) float array in [0, 1], (B, 3, height, width)
            tensor in [0, 1], or the codes.
        codes: (B, H, W) long, on the finest grid.
        grain_maps: (B, h, w) long, granularity of each region, 0 = coarsest.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    codes: torch.Tensor
    grain_maps: torch.Tensor


class DQPipeline(DiffusionPipeline):
    """Samples variable-length codes with a DQ-Transformer and decodes them with a DQ-VAE.

    Args:
        vae: the image tokenizer.
        transformer: the generator, trained on this tokenizer's codes.
        text_encoder, tokenizer: for a generator with text; without the encoder prompts are given as `prompt_embeds`.

    A pipeline works on one call at a time, as in diffusers. Threads that share models have a pipeline each, by `from_pipe`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["codes", "grain_map", "taken", "lengths"]

    def __init__(
        self,
        vae: DQVAEModel,
        transformer: DQTransformerForImageGeneration,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        if vae is None or transformer is None:
            raise TypeError(NEEDS_BOTH)
        has_only_tokenizer = text_encoder is None and transformer.config.text_length is not None  # for `prompt_embeds`
        fitting = None if has_only_tokenizer else tokenizer
        DQForImageGeneration.from_models(vae, transformer, text_encoder, fitting)  # raises if they do not fit
        self.register_modules(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer)
        self.image_processor = DQImageProcessor.for_model(vae.config)
        self._guidance_scale, self._interrupt = None, False

    @property
    def guidance_scale(self):
        """Of the present or last call."""
        own = self.transformer.config.sampling_defaults.get("guidance_scale", 1.0)
        return own if self._guidance_scale is None else self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        """Whether the present or last call is guided."""
        return self.guidance_scale != 1

    @property
    def num_timesteps(self):
        """Steps of the present or last call, at most: elements of the longest stream behind its start token."""
        return self.transformer.config.longest_stream - 1

    @property
    def interrupt(self):
        """Whether the present call is to stop; a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels=None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = None,
        num_images_per_label: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("codes",),
        compile_config=None,
        lookahead: int = 1,
        **options,
    ) -> DQPipelineOutput:
        """Sample images.

        Args:
            prompt, negative_prompt: a text or a list, for a model with text, see `encode_prompt`.
            class_labels: a class name or id, or a list, for a model with classes.
            num_images_per_prompt, num_images_per_label: two names of how many images are made of each prompt and label,
                one after the other. Default: 1. Without prompts and labels: images in all.
            generator, compile_config, lookahead: as in `DQTransformerForImageGeneration.generate_steps`.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask: states of texts
                instead of the texts, see `encode_prompt`.
            output_type: "pil", "np", "pt" or "codes" (nothing is decoded).
            return_dict: False gives a tuple (images, codes, grain_maps) instead of a `DQPipelineOutput`.
            callback_on_step_end: called with (pipeline, step, step, {name: tensor}) after every pass (with
                lookahead 1, every element of the streams). It may look, and stop by `pipeline._interrupt = True`: codes and
                granularities that are still to come are then -1, and the image is decoded with zeros in their place.
                Tensors that it returns must be those that it got.
            callback_on_step_end_tensor_inputs: which tensors it gets, of "codes" (B, H*W), "grain_map" (B, H*W, on
                the fine grid), "taken" (B, H*W) bool, which cells have their code, and "lengths" (B,). A
                `PipelineCallback` of diffusers says by itself what it gets.
            options: those of `SamplingOptions`: temperature, top_k, top_p, position_temperature, position_top_k,
                position_top_p, guidance_scale, fine_positions; and what is prescribed, as in `generate_steps`: grain_map,
                fine_ratio, codes, num_candidates.

        Raises:
            TypeError, ValueError: arguments of another type or range.
        """
        check_names(options, steps_arguments(self.transformer), argument_names(self.__call__), ELSEWHERE)
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs) or ()
        self.check_inputs(output_type, tensor_inputs)
        texts = self.encode_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        conditions = self.prepare_conditions(class_labels, texts, num_images_per_prompt, num_images_per_label)
        self._guidance_scale, self._interrupt = options.get("guidance_scale"), False
        bring_to_device(self.transformer)
        steps = self.transformer.generate_steps(
            **conditions, generator=generator, compile_config=compile_config, lookahead=lookahead, **options
        )
        state = self.sample(steps, callback_on_step_end, tensor_inputs)
        output = self.decode(state, output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.codes, output.grain_maps)

    def check_inputs(self, output_type, callback_on_step_end_tensor_inputs):
        """Raise ValueError at what is no type of output, or no tensor of a callback."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            names = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback tensors must be among {names}; got {unknown}")

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=None,
        prompt_attention_mask=None,
        negative_prompt_embeds=None,
        negative_prompt_attention_mask=None,
    ):
        """States and masks of texts: {argument of `generate_steps`: tensor}.

        Args:
            prompt: a text or a list of texts; None: no text.
            negative_prompt: likewise, for the unconditional half of guidance; without effect where the guidance scale is 1.
            prompt_embeds, prompt_attention_mask: states (B, T, text_hidden_size) of a text encoder and their mask
                (B, T), 0 where there is no token (None: all are there), instead of a prompt.
            negative_prompt_embeds, negative_prompt_attention_mask: likewise, instead of a negative prompt.

        Raises:
            TypeError, ValueError: what is no text or no such tensor; a model that takes no text.
        """
        config = self.transformer.config
        arguments = prompt_arguments(config, self.text_encoder, self.tokenizer, prompt, negative_prompt)
        given = {
            "": (prompt_embeds, prompt_attention_mask),
            "negative_": (negative_prompt_embeds, negative_prompt_attention_mask),
        }
        for prefix, (embeds, mask) in given.items():
            name, mask_name = f"{prefix}prompt_embeds", f"{prefix}prompt_attention_mask"
            if embeds is None and mask is not None:
                raise ValueError(f"{mask_name} is of {name}: give both")
            if embeds is None:
                continue
            require_text(name, config)
            if f"{prefix}encoder_hidden_states" in arguments:
                raise ValueError(f"give {prefix}prompt or {name}, not both")
            states, mask = check_text(embeds, mask, config.text_length, config.text_hidden_size, name, mask_name)
            arguments |= {f"{prefix}encoder_hidden_states": states, f"{prefix}encoder_attention_mask": mask}
        return arguments

    def prepare_conditions(self, class_labels, texts, num_images_per_prompt=None, num_images_per_label=None):
        """Labels and texts, each repeated for its images, as {argument of `generate_steps`: value}.

        Args:
            class_labels, num_images_per_prompt, num_images_per_label: as in `__call__`.
            texts: of `encode_prompt`.

        Raises:
            TypeError, ValueError: unknown labels; numbers of labels, prompts and negative prompts that are neither
                1 nor equal; numbers of images that differ or are below 1.
        """
        each = images_each(num_images_per_prompt, num_images_per_label)
        columns = dict(texts)
        if class_labels is not None:
            labels = class_ids(as_list(class_labels), self.transformer.config)
            if not labels:
                raise ValueError("class_labels must hold at least one label, got none")
            columns["class_labels"] = torch.tensor(labels, dtype=torch.long)
        lengths = {name: len(column) for name, column in columns.items() if "mask" not in name}
        batch = max(lengths.values(), default=1)
        if any(length not in (1, batch) for length in lengths.values()):
            got = ", ".join(f"{length} of {name}" for name, length in lengths.items())
            raise ValueError(f"prompts, negative prompts and class labels must be one, or as many; got {got}")
        columns = {
            name: column.expand(batch, *column.shape[1:]).repeat_interleave(each, 0)
            for name, column in columns.items()
        }
        return columns | {"num_images": batch * each}

    def sample(self, steps, callback_on_step_end=None, callback_on_step_end_tensor_inputs=()):
        """Run the steps of a sampler to their end, or until a callback stops them; the `StreamState` after the last one.

        Args:
            steps: of `generate_steps`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `__call__`.
        """
        scale = self._guidance_scale
        with self.progress_bar(total=self.num_timesteps) as progress:
            for step, state in enumerate(steps):
                progress.update()
                if callback_on_step_end is not None:
                    tensors = {
                        "codes": state.codes,
                        "grain_map": state.fine_grain_map,
                        "taken": state.taken,
                        "lengths": state.lengths,
                    }
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    check_returned(callback_on_step_end(self, step, step, dict(given)), given)
                    if self._guidance_scale != scale:
                        raise ValueError("a callback cannot change guidance_scale on the way; give it to the call")
                    if self.interrupt:
                        break
            progress.total = progress.n  # most streams are shorter than the longest
            progress.refresh()
        return state

    @torch.no_grad()
    def decode(self, state, output_type="pil") -> DQPipelineOutput:
        """The images of a `StreamState`, as far as it has come; where nothing has come yet, codes and grain map are -1."""
        codes, grain_map = state.grids()
        taken = state.taken.view_as(codes) if self.interrupt else None
        if output_type != "codes":
            bring_to_device(self.vae)
            with evaluation_mode(self.vae):
                sample = self.vae.decode_each(codes, taken).sample
            images = self.image_processor.post_process(sample, output_type)
        if taken is not None:
            side = codes.shape[1] // grain_map.shape[1]
            codes, grain_map = codes.where(taken, -1), grain_map.where(taken[:, ::side, ::side], -1)
        return DQPipelineOutput(images=codes if output_type == "codes" else images, codes=codes, grain_maps=grain_map)

    def save_pretrained(self, save_directory, **kwargs):
        """Save the folder that `DQForImageGeneration.save_pretrained` saves: one folder serves both libraries."""
        DQForImageGeneration.from_models(**self.components).save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id, commit_message=None, **kwargs):
        """Push what `save_pretrained` saves; arguments as in transformers."""
        model = DQForImageGeneration.from_models(**self.components)
        return model.push_to_hub(repo_id, commit_message=commit_message, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, but a text encoder is read as strictly as the other parts; arguments and errors as for a model."""
        place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        files = DQForImageGeneration.files(kwargs.get("variant"), kwargs.get("use_safetensors"))
        with local_folder(pretrained_model_name_or_path, files, **place) as folder:
            encoder, index = folder / "text_encoder", check_index(folder / cls.config_name)
            is_listed = "text_encoder" in index and "text_encoder" not in kwargs
            is_checked = is_listed and kwargs.get("use_safetensors") is not False
            if is_checked:
                config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
                files = weight_files(encoder, kwargs.get("variant"))
                encoder_class = text_encoder_class(config)
                if index["text_encoder"][1] != encoder_class.__name__:
                    raise ValueError(
                        f"{folder / cls.config_name}: text_encoder must be {encoder_class.__name__}, as in "
                        f"{encoder / 'config.json'}; got {index['text_encoder'][1]}"
                    )
                check_weight_files(encoder_class, config, files)
            pipe = super().from_pretrained(str(folder), **kwargs)
            pipe.register_to_config(_name_or_path=pretrained_model_name_or_path)  # not its folder in the cache
            if is_checked:
                check_weights_finite(pipe.text_encoder, files)
                pipe.text_encoder.source_card = read_source_card(pipe.text_encoder, encoder)
            return pipe

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As in diffusers, but without a dtype the models stay as they are; there they become float32, in both pipelines."""
        if kwargs.get("dtype") or kwargs.get("torch_dtype") or not isinstance(pipeline, DQPipeline):
            return super().from_pipe(pipeline, **kwargs)
        changes = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
        shared = cls(**pipeline.components | changes)
        shared.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return shared

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, but an argument of `from_pretrained` that nothing uses is a `TypeError`, not a warning."""
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        typos = sorted(set(unused) & set(kwargs))
        if typos:
            raise TypeError(f"DQPipeline.from_pretrained has no argument {', '.join(typos)}")
        return init_dict, unused, hidden


def images_each(num_images_per_prompt=None, num_images_per_label=None):
    """How many images are made of each condition, by either name; TypeError or ValueError."""
    check_count("num_images_per_prompt", num_images_per_prompt)
    check_count("num_images_per_label", num_images_per_label)
    each = num_images_per_prompt or num_images_per_label or 1
    if num_images_per_label not in (None, each):
        raise ValueError(
            f"num_images_per_prompt and num_images_per_label are one number, got {num_images_per_prompt} and "
            f"{num_images_per_label}"
        )
    return each


def check_index(file):
    """What a `model_index.json` holds; `OSError` or `ValueError` if it is not one that `save_pretrained` writes."""
    if not file.is_file():
        raise OSError(f"{file.parent} has no file {file.name}; {NEEDS_BOTH}")
    index = read_json_object(file)
    parts = {name: [part.__module__, part.__name__] for name, part in PARTS.items()}
    for key, expected in ({"_class_name": "DQPipeline"} | parts).items():
        if index.get(key) != expected:
            raise ValueError(f"{file}: {key} must be {expected}, got {index.get(key)}; save the model again")
    for name in DQPipeline._optional_components:
        entry = index.get(name, ["transformers", "any"])  # what is named is imported
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers"):
            raise ValueError(f"{file}: {name} must be a class of transformers, got {entry}; save the model again")
    known = {*parts, *DQPipeline._optional_components}
    if unknown := sorted(key for key in set(index) - known if not key.startswith("_")):
        raise ValueError(f"{file} has unknown entries {', '.join(unknown)}")
    return index


def check_returned(returned, given):
    """Raise `ValueError` if a callback gives back other tensors than it got: what is drawn next would not heed them."""
    changed = [name for name, value in (returned or {}).items() if value is not given.get(name)]
    if changed:
        raise ValueError(
            f"callback_on_step_end must return the tensors that it got, or None; {', '.join(changed)} are others. What "
            "was drawn cannot be changed on the way"
        )


def bring_to_device(model):
    """Undo `enable_model_cpu_offload` for a model that is about to work; its hook only sees calls of `forward`."""
    if hasattr(model, "_hf_hook"):
        model._hf_hook.pre_forward(model)
