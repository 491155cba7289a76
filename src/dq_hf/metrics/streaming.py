"""What all metrics share: images in batches, sums instead of images, one result for all processes."""

import warnings
from abc import ABC, abstractmethod
from functools import reduce
from operator import add

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from ..modeling.image_processing_dq import as_tensor, to_tensor
from ..modeling.modeling_utils_dq import seems_to_be_unit


class StreamingMetric(evaluate.Metric, ABC):
    """An `evaluate` metric that keeps sums, not the images.

    `add_batch` as often as there are batches, then `compute`, which also starts anew. With several processes of
    torch.distributed each adds images of its own, none of them twice (a data loader of Accelerate with
    `even_batches=False`), all call `compute`, and all get the result over all images.

    A subclass keeps in `self.state` {name: a tensor to be summed over the processes, or a list to be joined}.
    """

    inputs = ("predictions", "references")  # names of the arguments of `add_batch`

    def __init__(self, **kwargs):
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process must be 1, got {kwargs['num_process']}: processes of torch.distributed, as accelerate starts "
                "them, are put together without it"
            )
        super().__init__(**kwargs)
        self.state = self.empty_state()

    @abstractmethod
    def empty_state(self):
        """The state before the first batch."""

    @abstractmethod
    def update(self, **inputs):
        """Add a batch to the state; arguments are named as in `inputs`, None where they were not given."""

    @abstractmethod
    def result(self, state):
        """The figures of a state, a dict."""

    @property
    def identity(self):
        """What must be the same on all processes: {name: value}."""
        return {}

    def add_batch(self, **inputs):
        """Add a batch of images, see the class.

        Raises:
            TypeError, ValueError: inputs of another name, type, shape or range.
        """
        if unknown := sorted(set(inputs) - set(self.inputs)):
            raise TypeError(
                f"{type(self).__name__} has no input {', '.join(unknown)}; it has {', '.join(self.inputs)}"
            )
        for images in inputs.values():
            warn_of_unit_range(images)
        with torch.no_grad():
            self.update(**dict.fromkeys(self.inputs) | inputs)

    def add(self, **inputs):
        """Refused: images come in batches."""
        raise TypeError(f"{type(self).__name__} takes batches; use add_batch, with a batch of one image if need be")

    def compute(self, **inputs):
        """The figures of all batches, and of those given here, over all processes; the next batch starts anew.

        Raises:
            ValueError: too few images, which are kept, or processes that do not measure the same.
        """
        # As evaluate's own metrics: `evaluate.combine` gives all of them the same.
        others = {"predictions", "references"} - set(self.inputs)
        inputs = {name: value for name, value in inputs.items() if name not in others}
        if any(value is not None for value in inputs.values()):
            self.add_batch(**inputs)
        identities, states = zip(*gather((self.identity, self.state)))
        if any(identity != identities[0] for identity in identities):
            raise ValueError(f"all processes must measure with the same, got {', '.join(map(str, identities))}")
        figures = self.result({name: reduce(add, (each[name] for each in states)) for name in self.state})
        self.state = self.empty_state()
        return figures

    def __bool__(self):
        """True, though `evaluate` counts no rows: `if metric` asks whether there is one."""
        return True

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=datasets.Features({name: datasets.Image() for name in self.inputs}),  # gives the names only
        )


def gather(value):
    """The values of all processes, by rank; [value] without several processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def unit_images(images):
    """Images as float tensors (B, 3, H, W) in [0, 1].

    Args:
        images: a tensor or array, float in [-1, 1] (`pixel_values`) or uint8, or a list of PIL images of one size.

    Raises:
        TypeError, ValueError: another type, shape or range.
    """
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Image.Image) for image in images):
        if len(sizes := {image.size for image in images}) > 1:
            raise ValueError(f"images must have one size, got {', '.join(f'{w}x{h}' for w, h in sorted(sizes))}")
        return torch.stack([to_tensor(image) for image in images])
    try:
        images = as_tensor(images) if isinstance(images, np.ndarray) else torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"images must be a tensor or array (B, 3, H, W), got {type(images).__name__}; or a list of PIL images"
        ) from None
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"images must be float in [-1, 1] or uint8, got {images.dtype}")
    low, high = images.aminmax()
    if not (low >= -1.001 and high <= 1.001):  # false for NaN too; the margin is bfloat16 rounding
        raise ValueError(
            f"float images must be finite and lie in [-1, 1], got {float(low):.4g} ... {float(high):.4g}; clamp what a "
            "decoder gives"
        )
    return images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5


def warn_of_unit_range(images):
    """Warn of a batch of float images that seems to lie in [0, 1]: with a metric that is what users forget."""
    if isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim == 4:
        images = as_tensor(images)
        if images.is_floating_point() and images.numel() and seems_to_be_unit(images.min(), images.max()):
            warnings.warn(
                "float images are read as [-1, 1], and no value of these is below 0: if they lie in [0, 1], give uint8 or "
                "2 * x - 1",
                stacklevel=3,
            )


def image_pairs(predictions, references):
    """Both as float64 (B, 3, H, W) in [0, 1], or ValueError."""
    if predictions is None or references is None:
        raise ValueError("predictions and references must be given together, image by image")
    predictions, references = (precise(unit_images(images)) for images in (predictions, references))
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions and references must have one shape, got {tuple(predictions.shape)} and {tuple(references.shape)}"
        )
    return predictions, references.to(predictions.device)


def precise(tensor):
    """In float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def per_image(num_images):
    """The number of images; ValueError if there are none."""
    if num_images == 0:
        raise ValueError("at least one image is needed, got none; call add_batch first")
    return int(num_images)
