"""What the models share: loading that never leaves a weight random, and checks of tensors at the public boundary."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


class StrictLoadingMixin:
    """Stands before `PreTrainedModel`: its `from_pretrained` refuses damaged, incomplete and mismatched weights.

    (A mixin, because diffusers looks for the name `PreTrainedModel` in the module of a pipeline's component.)
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load weights as transformers does, but strictly.

        Raises:
            OSError: no such folder, repository or file, or a damaged weight file.
            ValueError: weights that are missing, left over, of another shape or not finite; the message names file and
                keys.
        """
        place = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        kwargs["ignore_mismatched_sizes"] = True  # only so that they are listed; below they are an error
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            broken = next((path for path in weight_files(place) if not is_readable(path)), place)
            raise OSError(f"{broken} is damaged or incomplete ({error}); download or save it again") from error
        mismatched = [
            f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
        ]
        state_dict = model.state_dict()
        not_finite = [name for name, value in state_dict.items() if not (value.is_meta or torch.isfinite(value).all())]
        for problem, keys in (
            ("weights are missing", info["missing_keys"]),
            ("there are weights that the model does not have", info["unexpected_keys"]),
            ("weights have another shape than the configuration says", mismatched),
            ("weights are not finite", not_finite),
        ):
            if keys:
                source = ", ".join(map(str, weight_files(place))) or place
                raise ValueError(f"{source} does not fit {cls.__name__}: {problem}: {shorten(sorted(keys))}")
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module):
        """torch's own initialisation."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def weight_files(place):
    """Paths of the weight files of a local folder."""
    return sorted(place.glob("*.safetensors")) if place.is_dir() else []


def is_readable(path):
    """Whether a safetensors file is whole."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def shorten(names, limit=8):
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)


def check_indices(name, values, shape, limit, device):
    """`values` as a long tensor on `device`, checked: integer dtype, the given shape (None: any), in [0, limit).

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another shape, or values out of range.
    """
    if not isinstance(values, torch.Tensor) or values.dtype not in INTEGERS:
        got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if values.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, values.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(values.shape)}")
    values = values.to(device=device, dtype=torch.long)
    if values.numel() and (values.min() < 0 or values.max() >= limit):
        raise ValueError(
            f"{name} must lie in 0 ... {limit - 1}, got values from {int(values.min())} to {int(values.max())}"
        )
    return values
