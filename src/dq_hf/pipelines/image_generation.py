"""Images from prompts and class labels, the transformers way: the task "dq-generation"."""

from collections.abc import Iterable, Sized
from numbers import Integral

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline

from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.sampling_options_dq import OPTION_NAMES, SamplingOptions, check_names
from ..modeling.text_dq import require_text
from .class_labels import as_list, class_ids
from .seeds import check_seed

# Besides the sampling options.
GENERATE_ARGUMENTS = ("do_sample", "compile_config", "lookahead", "negative_prompt")
GENERATE_ARGUMENTS += ("grain_map", "fine_ratio", "num_candidates")
CALL_ARGUMENTS = ("seed", "num_workers", "batch_size")


class DQGenerationPipeline(Pipeline):
    """`pipeline("dq-generation")`: prompts, or class names or ids, to images.

    Each result is a dictionary: `image` (PIL), `class_label` (id) and `label` (name), both None for a model without
    classes, `codes` (H, W) long, `grain_map` (h, w) long, and `prompt` for a model with text.
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

    def __call__(self, inputs=None, *, seed=None, num_workers=None, batch_size=None, **sampling):
        """Generate images.

        Args:
            inputs: a prompt for a model with text (None: no text), a class name or id for a model with classes (None: a
                random one), nothing for an unconditional model; {"prompt": ..., "class_label": ...} for a model with
                both. A list gives a list. A generator, a `Dataset` of torch or of datasets, one column of it (`KeyDataset`)
                or another iterable gives an iterator, which reads on and yields results, in their order, as it is asked.
            seed: one integer: image i takes the i-th draw of `torch.Generator().manual_seed(seed)`, in a list as in a
                stream; a list: image i takes the first draw of its own. None: torch's global generator.
            num_workers: processes that read a stream ahead; changes the speed only. Default: the pipeline's, or 0.
            batch_size: images in work at a time; changes the speed only. Default: the pipeline's, or 1.
            sampling: do_sample, compile_config, lookahead, negative_prompt and grain_map (one for all), fine_ratio,
                num_candidates and the options of `SamplingOptions`, as in `DQForImageGeneration.generate`.

        Raises:
            TypeError, ValueError: unknown arguments, names or values out of range, inputs that the model does not take.
        """
        size = check_at_least("batch_size", batch_size if batch_size is not None else self._batch_size or 1, 1)
        workers = check_at_least("num_workers", num_workers if num_workers is not None else self._num_workers or 0, 0)
        _, options, _ = self._sanitize_parameters(**{**self._forward_params, **sampling})
        if is_stream(inputs):
            seeds = Seeds(seed, len(inputs) if isinstance(inputs, Sized) else None)
            batches = ([self.preprocess(item, seeds) for item in batch] for batch in read_ahead(inputs, size, workers))
            return self.results(batches, seeds, options)
        items = as_list(inputs)
        seeds = Seeds(seed, len(items))
        conditions = [self.preprocess(item, seeds) for item in items]  # all, before the work
        batches = (conditions[first : first + size] for first in range(0, len(items), size))
        results = list(self.results(batches, seeds, options))
        wants_list = isinstance(inputs, (list, tuple, range)) or getattr(inputs, "ndim", 0) > 0
        return results if wants_list else results[0]

    def results(self, batches, seeds, options):
        """Yield the result of each condition of `preprocess` in these batches, one batch at a time."""
        config = self.model.transformer.config
        for conditions in batches:
            arguments = {"num_images": len(conditions), "generator": seeds.of_images(len(conditions))}
            if config.num_classes:
                arguments["class_labels"] = [condition["class_label"] for condition in conditions]
            prompts = [condition["prompt"] for condition in conditions]
            if any(prompts):  # else there may be no text encoder to read them
                arguments["prompt"] = prompts
            with self.device_placement():
                results = self.postprocess(self._forward(arguments, **options), conditions)
            yield from results

    def _sanitize_parameters(self, **kwargs):
        options = {name: value for name, value in kwargs.items() if name not in GENERATE_ARGUMENTS}
        check_names(options, OPTION_NAMES, (*GENERATE_ARGUMENTS, *CALL_ARGUMENTS), {"generator": "seed"})
        SamplingOptions(**options)  # or an error
        if not isinstance(kwargs.get("negative_prompt"), (str, type(None))):
            raise TypeError(f"negative_prompt must be one text for all images, got {kwargs['negative_prompt']!r}")
        grain_map = kwargs.get("grain_map")
        if np.ndim(grain_map) > 2 and len(grain_map) > 1:
            raise ValueError(f"grain_map must be one map (h, w) for all images, got {len(grain_map)}")
        return {}, kwargs, {}

    def preprocess(self, item, seeds):
        """What an image is of, from one input: {"prompt": text, "class_label": id}; None is what the model takes none of."""
        config = self.model.transformer.config
        if not isinstance(item, dict):
            item = {"prompt" if config.text_length is not None and isinstance(item, str) else "class_label": item}
        if unknown := sorted(map(str, item.keys() - {"prompt", "class_label"})):
            raise TypeError(
                "an input must be a prompt, a class name or an integer, or a dictionary of prompt and class_label; got one of "
                f"{', '.join(unknown)}; of rows of a data set give one column, KeyDataset(dataset, name)"
            )
        prompt, label = item.get("prompt"), item.get("class_label")
        if prompt is not None:
            require_text("a prompt", config)
            if not isinstance(prompt, str):
                raise TypeError(f"a prompt must be a text, got {prompt!r}")
        drawn = seeds.random_class(config.num_classes, label is None)
        label = drawn if label is None else class_ids([label], config)[0]
        return {"prompt": (prompt or "") if config.text_length is not None else None, "class_label": label}

    @torch.no_grad()
    def _forward(self, batch, **sampling):
        return self.model.generate(**batch, **sampling)

    def postprocess(self, generated, conditions):
        images = self.output_processor.post_process(generated.pixel_values)
        names = self.model.transformer.config.id2label
        results = []
        for i, (image, condition) in enumerate(zip(images, conditions)):
            label, prompt = condition["class_label"], condition["prompt"]
            result = {"image": image, "class_label": label, "label": None if label is None else names[label]}
            result |= {"codes": generated.codes[i].cpu(), "grain_map": generated.grain_map[i].cpu()}
            results.append(result if prompt is None else result | {"prompt": prompt})
        return results

    def save_pretrained(self, save_directory, **kwargs):
        """Save the model's folder, which this task and `DQPipeline` load."""
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id, **kwargs):
        """Push the model; arguments as in `DQForImageGeneration.push_to_hub`."""
        return self.model.push_to_hub(repo_id, **kwargs)


class Seeds:
    """Random numbers of images, in their order and whatever their batches.

    Args:
        seed: as in `DQGenerationPipeline.__call__`.
        num_images: how many there will be; None: that is not known.
    """

    def __init__(self, seed, num_images):
        self.image_generators = make_generators(seed, num_images)
        self.label_generators = make_generators(seed, num_images)  # others: no draw is shared
        self.num_images = self.num_labels = 0

    def of_images(self, count):
        """The generator, or the list of them, of the next images."""
        first, self.num_images = self.num_images, self.num_images + count
        return take(self.image_generators, first, self.num_images)

    def random_class(self, num_classes, is_needed):
        """A class for the next image, or None; with a seed it is drawn for every image, so that it is the same for each."""
        generators = take(self.label_generators, self.num_labels, self.num_labels + 1)
        self.num_labels += 1
        if not num_classes or not (is_needed or generators is not None):
            return None
        generator = generators[0] if isinstance(generators, list) else generators
        return int(torch.randint(num_classes, (), generator=generator))


def take(generators, first, last):
    """Those of a list of generators; one for all, or None, as it is."""
    if not isinstance(generators, list):
        return generators
    if last > len(generators):
        raise ValueError(f"seed must be one integer or a list of one for each image; more than {len(generators)} came")
    return generators[first:last]


def is_stream(inputs):
    """Whether results are to be yielded one by one."""
    whole = (str, bytes, dict, list, tuple, range)
    return isinstance(inputs, Dataset) or (
        isinstance(inputs, Iterable) and not isinstance(inputs, whole) and not hasattr(inputs, "ndim")
    )


class Stream(IterableDataset):
    """What an iterable gives, for a `DataLoader`."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def read_ahead(inputs, batch_size, num_workers):
    """Lists of inputs, in their order; of what has no numbered places one process can read ahead."""
    has_places = (
        isinstance(inputs, Sized) and hasattr(inputs, "__getitem__") and not isinstance(inputs, IterableDataset)
    )
    return DataLoader(
        inputs if has_places else Stream(inputs),
        batch_size=batch_size,
        num_workers=num_workers if has_places else min(num_workers, 1),
        collate_fn=list,
        generator=torch.Generator(),  # else it takes a draw from torch's own
    )


def check_at_least(name, size, least):
    """The size, or ValueError."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {size!r}")
    return size


def make_generators(seed, num_images):
    """One generator (integer seed), one for each image (list), or None; num_images None: not known.

    Raises:
        TypeError, ValueError: no integers, integers out of range, or another number of seeds than images.
    """
    if seed is None:
        return None
    seeds = seed if isinstance(seed, (list, tuple)) else [seed]
    if any(isinstance(value, bool) or not isinstance(value, Integral) for value in seeds):
        raise TypeError(f"seed must be an integer or a list of integers, got {seed!r}")
    for value in seeds:
        check_seed(value)
    generators = [torch.Generator().manual_seed(int(value)) for value in seeds]
    if not isinstance(seed, (list, tuple)):
        return generators[0]
    if num_images is not None and len(generators) != num_images:
        raise ValueError(
            f"seed must be one integer or a list of {num_images}, one for each image; got {len(generators)}"
        )
    return generators
