"""What the models share: initialisation, exact buffers, evaluation mode, and checks of tensors at the public boundary."""

import threading
from contextlib import contextmanager

import torch
from torch import nn


class TorchInitMixin:
    """Stands before `PreTrainedModel`: new weights are torch's own."""

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


class ExactBuffers(nn.Module):
    """A module whose own buffers keep their dtype when the model is cast to another one."""

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if (moved := getattr(self, name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


_MODES = threading.Lock()


@contextmanager
def evaluation_mode(model):
    """Dropout is off in all modules; once the last that asked for it has ended, each is in its own mode again.

    Threads that sample from one model in training mode do not disturb each other.
    """
    with _MODES:
        holders, training = model.__dict__.get("_evaluation_mode", (0, []))
        more = [module for module in model.modules() if module.training]
        if more:  # of a holder's time: set by someone else
            model.eval()
        model.__dict__["_evaluation_mode"] = (holders + 1, training + more)
    try:
        yield
    finally:
        with _MODES:
            holders, training = model.__dict__.pop("_evaluation_mode")
            if holders > 1:
                model.__dict__["_evaluation_mode"] = (holders - 1, training)
            else:
                for module in training:
                    module.training = True


def uncompiled(module):
    """The module that `torch.compile` made this one of, or itself."""
    return getattr(module, "_orig_mod", module)


def call_device(*modules):
    """Device for the inputs of a module with a weight, the last one; where accelerate has offloaded it, or what holds it, the
    one that the weight comes to when called.
    """
    hooks = [getattr(module, "_hf_hook", None) for module in modules]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    return [*devices, modules[-1].weight.device][0]


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)


def check_indices(name, values, shape, limit, device, lowest=0):
    """`values` as a long tensor on `device`, checked: integer dtype, the given shape (a name: any size), in [lowest, limit).

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another shape, or values out of range.
    """
    if not isinstance(values, torch.Tensor) or values.dtype not in INTEGERS:
        got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    differs = [not isinstance(size, str) and size != got for size, got in zip(shape, values.shape)]
    if values.dim() != len(shape) or any(differs):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {tuple(values.shape)}")
    values = values.to(device=device, dtype=torch.long)
    if torch.compiler.is_compiling():  # a graph cannot ask for values
        return values
    if values.numel() and (values.min() < lowest or values.max() >= limit):
        raise ValueError(
            f"{name} must lie in {lowest} ... {limit - 1}, got values from {int(values.min())} to {int(values.max())}"
        )
    return values


def seems_to_be_unit(low, high):
    """Whether values from `low` to `high` that should lie in [-1, 1] seem to lie in [0, 1]: dark, and nothing below 0."""
    return bool(0 <= low < 0.05 and low < high)
