"""Images from class labels, the transformers way: the task "dq-generation"."""

import torch
from transformers import Pipeline

from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.sampling_options_dq import SamplingOptions
from .class_labels import as_list, class_ids
from .seeds import check_seed

GENERATE_ARGUMENTS = ("do_sample", "compile_config", "lookahead")  # besides the sampling options


class DQGenerationPipeline(Pipeline):
    """`pipeline("dq-generation")`: class names or ids to images.

    Each result is a dictionary: `image` (PIL), `class_label` (id) and `label` (name), both None for an unconditional
    model, `codes` (H, W) long, `grain_map` (h, w) long.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model, **kwargs):
        if getattr(getattr(model, "config", None), "model_type", None) != "dq":  # its class may be another copy
            raise ValueError(
                f'the task "dq-generation" needs a DQForImageGeneration (tokenizer and generator), got {type(model).__name__}'
            )
        super().__init__(model=model, **kwargs)
        self.output_processor = DQImageProcessor.for_model(model.config.vae_config)

    def __call__(self, inputs=None, *, seed=None, batch_size=None, **sampling):
        """Generate images.

        Args:
            inputs: class name or id, or None for a random class (unconditional: always None); a list gives a list.
            seed: one integer: image i takes the i-th draw of `torch.Generator().manual_seed(seed)`; a list: image i
                takes the first draw of its own. None: torch's global generator.
            batch_size: images in work at a time; changes the speed only. Default: the pipeline's, or 1.
            sampling: do_sample, compile_config, lookahead and the options of `SamplingOptions`, as in
                `DQTransformerForImageGeneration.generate_steps`.

        Raises:
            TypeError, ValueError: unknown arguments, names or values out of range.
        """
        wants_list = isinstance(inputs, (list, tuple, range)) or getattr(inputs, "ndim", 0) > 0
        items = as_list(inputs)
        size = batch_size if batch_size is not None else self._batch_size or 1
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {size!r}")
        _, forward_kwargs, _ = self._sanitize_parameters(**{**self._forward_params, **sampling})
        generators = make_generators(seed, len(items))
        labels = self.preprocess(items, seed)
        results = []
        for first in range(0, len(items), size):
            chunk = slice(first, first + size)
            batch_generator = generators[chunk] if isinstance(generators, list) else generators
            batch = {"class_labels": None if labels is None else labels[chunk], "generator": batch_generator}
            batch["num_images"] = len(items[chunk])
            with self.device_placement():
                results += self.postprocess(self._forward(batch, **forward_kwargs), batch["class_labels"])
        return results if wants_list else results[0]

    def _sanitize_parameters(self, **kwargs):
        SamplingOptions.of({name: value for name, value in kwargs.items() if name not in GENERATE_ARGUMENTS})
        return {}, kwargs, {}

    def preprocess(self, inputs, seed=None):
        """Class ids of names, ids and None (a class drawn at random), or None for an unconditional model."""
        config = self.model.transformer.config
        if config.num_classes == 0:
            class_ids([item for item in inputs if item is not None], config)
            return None
        if not any(item is None for item in inputs):
            return class_ids(inputs, config)
        generators = make_generators(seed, len(inputs))  # apart from those of the images: no draw is shared
        labels = []
        for i, item in enumerate(inputs):
            generator = generators[i] if isinstance(generators, list) else generators
            drawn = int(torch.randint(config.num_classes, (), generator=generator))
            labels += [drawn] if item is None else class_ids([item], config)
        return labels

    @torch.no_grad()
    def _forward(self, batch, **sampling):
        return self.model.generate(**batch, **sampling)

    def postprocess(self, generated, class_labels):
        images = self.output_processor.post_process(generated.pixel_values)
        names = self.model.transformer.config.id2label
        return [
            {
                "image": image,
                "class_label": None if class_labels is None else class_labels[i],
                "label": None if class_labels is None else names[class_labels[i]],
                "codes": generated.codes[i].cpu(),
                "grain_map": generated.grain_map[i].cpu(),
            }
            for i, image in enumerate(images)
        ]

    def save_pretrained(self, save_directory, **kwargs):
        """Save the model's folder, which this task and `DQPipeline` load."""
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id, **kwargs):
        """Push the model; arguments as in `DQForImageGeneration.push_to_hub`."""
        return self.model.push_to_hub(repo_id, **kwargs)


def make_generators(seed, num_images):
    """One generator (integer seed), one for each image (list), or None.

    Raises:
        TypeError, ValueError: no integers, integers out of range, or another number of seeds than images.
    """
    if seed is None:
        return None
    seeds = seed if isinstance(seed, (list, tuple)) else [seed]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in seeds):
        raise TypeError(f"seed must be an integer or a list of integers, got {seed!r}")
    for value in seeds:
        check_seed(value)
    generators = [torch.Generator().manual_seed(value) for value in seeds]
    if not isinstance(seed, (list, tuple)):
        return generators[0]
    if len(generators) != num_images:
        raise ValueError(
            f"seed must be one integer or a list of {num_images}, one for each image; got {len(generators)}"
        )
    return generators
