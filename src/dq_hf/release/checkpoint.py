"""The tensors of a PyTorch checkpoint, read without running or importing anything that the file names.

A pickle is a program for a stack machine. `unpickle` follows it, but builds plain values only: what would be called or
imported becomes an `Inert` object, except for the calls that make a tensor, which become a `StoredTensor`.
"""

import functools
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .text import cut, listed

# Limits of one pickle; that of a checkpoint with 2,000 tensors has some 300 KB and 60,000 opcodes.
MOST_PICKLE = 64 * 2**20  # bytes
MOST_OPCODES = 500_000
MOST_DIMENSIONS = 8
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stands for a class, a function or an object that the file names; whatever the file does to it has no effect."""

    def __init__(self, name):
        self.name = name


@dataclass(frozen=True)
class Storage:
    """Numbers that lie one behind the other in the file; `read` gives their bytes."""

    dtype: torch.dtype
    num_elements: int
    read: Callable[[], bytearray]

    @property
    def num_bytes(self):
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self):
        return self.storage.dtype

    @property
    def num_bytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self):
        """Whether there are elements, no more than in the storage, and all lie in it."""
        numbers = (self.offset, *self.shape, *self.strides)
        if not len(self.shape) == len(self.strides) <= MOST_DIMENSIONS:
            return False
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            return False
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        return 0 < math.prod(self.shape) <= self.storage.num_elements and last < self.storage.num_elements

    def read(self):
        """The tensor; raises `OSError` where its bytes are damaged or not as many as they should be."""
        values = torch.frombuffer(self.storage.read(), dtype=self.dtype)
        return values.as_strided(self.shape, self.strides, self.offset)


@contextmanager
def open_checkpoint(path):
    """The `state_dict` of a checkpoint, {name: `StoredTensor`}, whose tensors can be read while the context lasts.

    A value may be of any other type too: a plain value, or `Inert`.

    Raises:
        OSError: the file is missing, damaged or compressed.
        ValueError: it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        with damage_named(path):
            content = (open_zip if zipfile.is_zipfile(file) else open_legacy)(file, path)
        yield state_dict_of(content, path)


@contextmanager
def damage_named(path):
    """Any error in reading becomes an `OSError` that names the file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, pickletools and struct have a dozen kinds
        reason = cut(f"{type(error).__name__}: {error}")
        raise OSError(
            f"the checkpoint {path} is damaged or not a PyTorch file ({reason}); download it again"
        ) from None


def state_dict_of(content, path):
    """The checked `state_dict` of what a checkpoint holds."""
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not state_dict:
        got = describe(content)
        if isinstance(content, dict):
            got = f"a dict with {listed(list(map(describe, content)))}" if state_dict is None else describe(state_dict)
        raise ValueError(f"the checkpoint {path} must be a dict with the tensors in 'state_dict', got {got}")
    for key in state_dict:
        if not isinstance(key, str):
            raise ValueError(f"the state dict of the checkpoint {path} must have names as keys, got {describe(key)}")
    tensors = [value for value in state_dict.values() if isinstance(value, StoredTensor) and value.fits()]
    if sum(tensor.num_bytes for tensor in tensors) > path.stat().st_size:
        raise OSError(f"the checkpoint {path} is damaged (its tensors are larger than the file); download it again")
    return state_dict


def describe(value):
    """A key or value of the file, for a message."""
    if isinstance(value, Inert):
        return f"an object of {cut(value.name)}"
    if isinstance(value, StoredTensor):
        return "a tensor"
    return cut(value) if isinstance(value, str) else type(value).__name__


def open_zip(file, path):
    """What a checkpoint of today's format holds: one pickle, and an uncompressed entry for each storage."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    if sum(entry.compress_size for entry in archive.infolist()) > path.stat().st_size:
        raise ValueError("its entries overlap")
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise ValueError("it has no data.pkl")

    @functools.cache  # tensors may share a storage
    @damage_named(path)
    def read(name, num_bytes=None):
        entry = entries[roots[0] + name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"its entry {name} is compressed, which PyTorch never does")
        if num_bytes not in (None, entry.file_size):
            raise ValueError(f"its entry {name} has {entry.file_size} bytes instead of {num_bytes}")
        return bytearray(archive.read(entry))  # compares the checksum

    if f"{roots[0]}byteorder" in entries and read("byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    if entries[f"{roots[0]}data.pkl"].file_size > MOST_PICKLE:
        raise ValueError(f"its pickle has more than {MOST_PICKLE:,} bytes")

    def storage(dtype, key, num_elements):
        return Storage(dtype, num_elements, lambda: read(f"data/{key}", num_elements * dtype.itemsize))

    return unpickle(io.BytesIO(read("data.pkl")), storage)


def open_legacy(file, path):
    """What a checkpoint from before PyTorch 1.6 holds: five pickles, then each storage behind its number of elements."""
    storages, places = {}, {}

    @functools.cache
    @damage_named(path)
    def read(key):
        file.seek(places[key])
        return bytearray(file.read(storages[key].num_bytes))

    def storage(dtype, key, num_elements):
        return storages.setdefault(key, Storage(dtype, num_elements, lambda: read(key)))

    file.seek(0)
    head = io.BytesIO(file.read(MOST_PICKLE))
    if unpickle(head, storage) != torch.serialization.MAGIC_NUMBER:
        raise ValueError("it has another beginning")
    unpickle(head, storage)  # version
    system = unpickle(head, storage)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    content, keys = unpickle(head, storage), unpickle(head, storage)
    position = head.tell()
    for key in keys:
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != storages[key].num_elements:
            raise ValueError(f"storage {cut(key)} has another size than its tensors say")
        places[key] = position + 8
        position += 8 + storages[key].num_bytes
    if position > path.stat().st_size:
        raise ValueError("it is cut off")
    return content


MARKED = ("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS", "OBJ", "INST", "POP_MARK")


def unpickle(file, make_storage):
    """What the pickle at the file's position holds: dicts, lists, tuples, plain values, `StoredTensor` and `Inert`.

    Args:
        file: binary; read up to the pickle's end.
        make_storage: (dtype, key, number of elements) -> `Storage`.
    """
    stack, below, memo = [], [], {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MOST_OPCODES:
            raise ValueError(f"its pickle has more than {MOST_OPCODES:,} opcodes")
        if opcode.name in MARKED:
            items, stack = stack, below.pop()
        match opcode.name:
            case "MARK":
                below.append(stack)
                stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:  # the mark itself
                    stack = below.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(items)
            case "APPEND":
                add_items(stack[-2], [stack.pop()])
            case "APPENDS":
                add_items(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append({})
                set_items(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(Inert(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Inert(f"{describe(module)}.{describe(name)}"))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                stack[-3:] = [Inert(describe(stack[-3]))]
            case "OBJ":
                stack.append(Inert(describe(items[0])))
            case "INST":
                stack.append(Inert(argument.replace(" ", ".")))
            case "BUILD":
                stack.pop()
            case "PERSID" | "BINPERSID":
                identity = argument if opcode.name == "PERSID" else stack.pop()
                stack.append(storage_of(identity, make_storage))
            case "EMPTY_SET" | "FROZENSET" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER":
                stack.append(Inert(opcode.name))
            case "PROTO" | "FRAME" | "POP_MARK" | "ADDITEMS" | "READONLY_BUFFER":
                pass
            case "STOP":
                return stack.pop()
            case _:  # the other opcodes are plain values
                stack.append(argument)


def add_items(target, items):
    """Append to a list; an object of another kind ignores it."""
    if isinstance(target, list):
        target.extend(items)


def set_items(target, items):
    """Set keys and values that follow each other; no key but a string is hashed, which may take for ever."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2]):
            target[key if isinstance(key, str) else Inert(type(key).__name__)] = value


def call(function, arguments):
    """What stands for the result of a call: an empty dict, a tensor, or something inert."""
    match function, arguments:
        case Inert(name="collections.OrderedDict"), ():
            return {}
        case (
            Inert(name="torch._utils._rebuild_tensor_v2"),
            (Storage() as storage, offset, tuple() as shape, tuple() as strides, *_),
        ):
            return StoredTensor(storage, offset, shape, strides)
        case (
            Inert(name="torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"),
            (StoredTensor() as tensor, *_),
        ):
            return tensor
    return Inert(function.name if isinstance(function, Inert) else describe(function))


def storage_of(identity, make_storage):
    """The storage that a persistent id describes; `Inert` for one of a kind that no weight has."""
    match identity:
        case ("storage", Inert(name=name), str() as key, _, int() as num_elements, *rest) if rest in ([], [None]):
            dtype = DTYPES.get(name.rpartition(".")[2])
            if dtype is not None and 0 <= num_elements < 2**60:
                return make_storage(dtype, key, num_elements)
    return Inert("storage")
