"""The tensors of a PyTorch checkpoint, read without importing or running anything that the file names.

`torch.load` reads the file. Its unpickler gets a tensor where the file has one, and an inert `StandIn` for any other class or
function, whatever that would have been.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from .text import cut, listed


class StandIn:
    """In the place of a class, function or object that the file names; whatever the file does to it has no effect."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def ignore(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


def rebuild_tensor(storage, offset, shape, strides, *rest):
    """A tensor, as `torch._utils._rebuild_tensor_v2` makes it, all of whose elements lie in the storage."""
    values = storage._untyped_storage  # all public ways to it warn
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    is_outside = 0 not in shape and last >= values.nbytes() // storage.dtype.itemsize
    if is_outside or min(0, offset, *shape, *strides) < 0:
        raise ValueError(f"a tensor of shape {shape} has elements outside of its storage")
    return torch.empty(0, dtype=storage.dtype).set_(values, offset, shape, strides)


def rebuild_parameter(tensor, *rest):
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
}


class Unpickler(pickle.Unpickler):
    """Python's, which gets what it may use from `find_class` alone."""

    def find_class(self, module, name):
        return ALLOWED.get((module, name)) or type(name, (StandIn,), {"__module__": module})


class InertPickle:
    """What `torch.load` uses of the module `pickle`."""

    Unpickler = Unpickler

    @staticmethod
    def load(file, **options):
        return Unpickler(file, **options).load()


def read_state_dict(path):
    """The `state_dict` of a checkpoint, {name: tensor}; where it has anything but a tensor, a plain value or a `StandIn`.

    In today's format the tensors are mapped from the file, so that only those that are used take memory.

    Raises:
        OSError: the file is missing, damaged or compressed.
        ValueError: it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # as torch tells them
        if is_zip:
            check_archive(path)
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=False, pickle_module=InertPickle)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, pickle and torch have a dozen kinds
        reason = cut(f"{type(error).__name__}: {error}")
        raise OSError(
            f"the checkpoint {path} is damaged or not a PyTorch file ({reason}); download it again"
        ) from None

    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not state_dict:
        got = describe(content)
        if isinstance(content, dict):
            got = f"a dict with {listed(list(map(describe, content)))}" if state_dict is None else describe(state_dict)
        raise ValueError(f"the checkpoint {path} must be a dict with the tensors in 'state_dict', got {got}")
    for key in state_dict:
        if not isinstance(key, str):
            raise ValueError(f"the state dict of the checkpoint {path} must have names as keys, got {describe(key)}")
    return state_dict


def check_archive(path):
    """What `torch.load` does not look at: checksums, compression, and that it is no program of TorchScript."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its entry {entry.filename} is compressed, which PyTorch never does")
            if entry.filename.endswith("/constants.pkl"):
                raise ValueError("it is a program in TorchScript")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its entry {damaged} has another checksum")


def describe(value):
    """A key or value of the file, for a message."""
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, StandIn):
        return f"an object of {cut(f'{type(value).__module__}.{type(value).__name__}')}"
    return "a tensor" if isinstance(value, torch.Tensor) else type(value).__name__
