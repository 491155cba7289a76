"""Images from class labels, the diffusers way."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from ..hub.download import HUB_ARGUMENTS, local_folder
from ..hub.folders import read_json_object
from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.modeling_dq import PARTS, DQForImageGeneration
from ..modeling.modeling_dqtransformer import DQTransformerForImageGeneration
from ..modeling.modeling_dqvae import DQVAEModel
from .class_labels import as_list, class_ids

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
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
        vae: the tokenizer.
        transformer: the generator, trained on this tokenizer's codes.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["codes", "grain_map", "taken", "lengths"]

    def __init__(self, vae: DQVAEModel, transformer: DQTransformerForImageGeneration):
        super().__init__()
        DQForImageGeneration.from_models(vae, transformer)  # raises if they do not fit
        self.register_modules(vae=vae, transformer=transformer)
        self.image_processor = DQImageProcessor.for_model(vae.config)
        self._guidance_scale, self._interrupt = None, False

    @property
    def guidance_scale(self):
        """Of the present or last call; None: the model's own."""
        return self._guidance_scale

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
        class_labels=None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("codes",),
        compile_config=None,
        **options,
    ) -> DQPipelineOutput:
        """Sample images.

        Args:
            class_labels: a class name or id, or a list; None for an unconditional model.
            num_images_per_label: images of each label, one after the other (unconditional: images in all).
            generator, compile_config: as in `DQTransformerForImageGeneration.generate_steps`.
            output_type: "pil", "np", "pt" or "codes" (nothing is decoded).
            return_dict: False gives a tuple (images, codes, grain_maps) instead of a `DQPipelineOutput`.
            callback_on_step_end: called with (pipeline, step, step, {name: tensor}) after every element of the
                streams. It may look, and stop by `pipeline._interrupt = True`: codes that are still to come are then
                -1, and the image is decoded with zeros in their place. Tensors that it returns must be those that it got.
            callback_on_step_end_tensor_inputs: which tensors it gets, of "codes" (B, H*W), "grain_map" (B, H*W, on
                the fine grid), "taken" (B, H*W) bool, which cells have their code, and "lengths" (B,).
            options: those of `SamplingOptions`: temperature, top_k, top_p, position_temperature, position_top_k,
                position_top_p, guidance_scale, fine_positions.

        Raises:
            TypeError, ValueError: arguments of another type or range.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            names = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback tensors must be among {names}; got {unknown}")
        labels, num_images = self.repeat_labels(class_labels, num_images_per_label)
        self._guidance_scale, self._interrupt = options.get("guidance_scale"), False
        bring_to_device(self.transformer)
        steps = self.transformer.generate_steps(
            labels, num_images, generator=generator, compile_config=compile_config, **options
        )
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
                    if self.interrupt:
                        break
            progress.total = progress.n  # most streams are shorter than the longest
            progress.refresh()
        codes, grain_map = state.grids()
        images = codes
        if output_type != "codes":
            bring_to_device(self.vae)
            taken = None if not self.interrupt else state.taken.view_as(codes)
            images = self.image_processor.post_process(self.vae.decode_each(codes, taken).sample, output_type)
        if self.interrupt:
            codes = codes.where(state.taken.view_as(codes), -1)
        self.maybe_free_model_hooks()
        output = DQPipelineOutput(images=images, codes=codes, grain_maps=grain_map)
        return output if return_dict else (output.images, output.codes, output.grain_maps)

    def repeat_labels(self, class_labels, num_images_per_label):
        """Class ids, each so often, or None; and the number of images."""
        if isinstance(num_images_per_label, bool) or not isinstance(num_images_per_label, int):
            raise TypeError(f"num_images_per_label must be a whole number, got {num_images_per_label!r}")
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label must be at least 1, got {num_images_per_label}")
        if class_labels is None:
            return None, num_images_per_label
        labels = class_ids(as_list(class_labels), self.transformer.config)
        if not labels:
            raise ValueError("class_labels must hold at least one label, got none")
        labels = [label for label in labels for _ in range(num_images_per_label)]
        return labels, len(labels)

    def save_pretrained(self, save_directory, **kwargs):
        """Save the folder that `DQForImageGeneration.save_pretrained` saves: one folder serves both libraries."""
        DQForImageGeneration.from_models(self.vae, self.transformer).save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id, **kwargs):
        """Push what `save_pretrained` saves; arguments as in transformers."""
        return DQForImageGeneration.from_models(self.vae, self.transformer).push_to_hub(repo_id, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, but an argument of `from_pretrained` that nothing uses is a `TypeError`, not a warning."""
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        typos = sorted(set(unused) & set(kwargs))
        if typos:
            raise TypeError(f"DQPipeline.from_pretrained has no argument {', '.join(typos)}")
        return init_dict, unused, hidden

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, but an index that is missing, damaged or not this pipeline's is an error that names it."""
        if Path(pretrained_model_name_or_path).is_dir():
            check_index(Path(pretrained_model_name_or_path, cls.config_name))
        return super().load_config(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name, **kwargs):
        """Fetch a repository, its code files excepted, and return its folder in the cache; errors as for a model."""
        options = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        with local_folder(
            pretrained_model_name, DQForImageGeneration.files(kwargs.get("variant")), **options
        ) as folder:
            check_index(folder / cls.config_name)
            return str(folder)


def check_index(file):
    """Raise `OSError` or `ValueError` if a `model_index.json` is not one that `save_pretrained` writes."""
    if not file.is_file():
        raise OSError(f"{file.parent} has no file {file.name}; {NEEDS_BOTH}")
    index = read_json_object(file)
    parts = {name: [part.__module__, part.__name__] for name, part in PARTS.items()}
    for key, expected in ({"_class_name": "DQPipeline"} | parts).items():
        if index.get(key) != expected:
            raise ValueError(f"{file}: {key} must be {expected}, got {index.get(key)}; save the model again")
    if unknown := sorted(key for key in set(index) - set(parts) if not key.startswith("_")):
        raise ValueError(f"{file} has unknown entries {', '.join(unknown)}")


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
