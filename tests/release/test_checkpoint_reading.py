"""Checkpoints of strangers: nothing runs, nothing is imported, damage is told, and what does not fit is named."""

import collections
import datetime
import io
import itertools
import math
import pickle
import re
import sys
import tempfile
import types
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_release import changed, load_config, load_state, reference_paths, transformer_size, write

from dq_hf.release import convert_checkpoint
from dq_hf.release.checkpoint import read_state_dict, rebuild_tensor

CONFIG, CHECKPOINT = reference_paths("dual_entropy")


@pytest.fixture(scope="module")
def state():
    return load_state("dual_entropy")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) and actual[key].dtype == value.dtype for key, value in expected.items())


class Malicious:
    """A file with this name is there when it was unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


FRAMEWORK = """
import enum
class Callback:
    def __init__(self): self.best, self.history = 0.5, [1, 2]
class Slotted:
    __slots__ = ("value",)
    def __init__(self): self.value = 1
class Settings(dict): pass
class Names(list): pass
class Stage(enum.Enum): FIT = 1
def rebuild(*args): return args
class Reduced:
    def __reduce__(self): return (rebuild, (1, 2), {"state": 3}, iter([4]), iter([("key", 5)]))
"""


@pytest.fixture
def framework(tmp_path, monkeypatch):
    """A module of classes; once it is out of `sys.modules`, importing it leaves a file."""
    module = types.ModuleType("some_framework")
    exec(FRAMEWORK, module.__dict__)
    monkeypatch.setitem(sys.modules, "some_framework", module)
    (tmp_path / "some_framework.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    return module


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_a_framework_are_neither_imported_nor_in_the_way(
    protocol, zipped, framework, state, tmp_path, path
):
    settings = framework.Settings(rate=1, stage=framework.Stage.FIT)
    settings.extra = framework.Slotted()
    content = {
        "epoch": 3,
        "callbacks": {framework.Callback: {"best": torch.ones(2)}, ("a", 1): framework.Callback()},
        "hyper_parameters": settings,
        "others": [
            framework.Names("ab"),
            framework.Reduced(),
            {1, 2},
            frozenset("a"),
            collections.defaultdict(list, a=[1]),
        ],
        "plain": [None, True, 1.5, 2**70, b"bytes", "text", bytearray(b"x"), datetime.date(2023, 1, 1), range(3), 1j],
        "state_dict": collections.OrderedDict(state),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}}],
        "pytorch-lightning_version": "1.5.6",
        "evil": Malicious(tmp_path / "ran"),
    }
    content["itself"] = content
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(content, path, **options)
    del sys.modules["some_framework"]
    assert_same(read_state_dict(path), state)
    assert not (tmp_path / "imported").exists() and not (tmp_path / "ran").exists()
    assert "some_framework" not in sys.modules
    with suppress(Exception):
        torch.load(path, weights_only=False)  # so it would have been noticed
    assert (tmp_path / "imported").exists()


def test_a_checkpoint_with_objects_converts_to_the_same_weights(framework, state, tmp_path, path):
    torch.save({"callbacks": [framework.Callback(), Malicious(tmp_path / "ran")], "state_dict": state}, path)
    model = convert_checkpoint(CONFIG, path, tmp_path / "ours")
    assert_same(model.state_dict(), convert_checkpoint(CONFIG, CHECKPOINT, tmp_path / "other").state_dict())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor_is_read_as_pytorch_reads_it(zipped, path):
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = {str(dtype): base.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)}
    tensors |= {
        str(dtype): base.to(dtype) for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    }
    tensors |= {"turned": base.transpose(0, 2), "part": base[1:, ::2, 1:], "scalar": torch.tensor(3.0), "again": base}
    tensors["parameter"] = torch.nn.Parameter(base + 1)
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path), {key: value.detach() for key, value in tensors.items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must be a dict with the tensors in 'state_dict', got list"),
        ({"epoch": 1}, "must be a dict with the tensors in 'state_dict', got a dict with epoch"),
        ({"x" * 9999: 1, 3: 4}, "got a dict with x+ ..., int"),
        ({"state_dict": {}}, "tensors in 'state_dict'"),
        ({"state_dict": [torch.zeros(1)]}, "tensors in 'state_dict'"),
        ({"state_dict": {1: torch.zeros(1)}}, "must have names as keys, got int"),
        (datetime.date(2023, 1, 1), r"got an object of datetime\.date"),
    ],
)
def test_other_contents_are_refused(content, message, path):
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        read_state_dict(path)
    assert len(str(error.value)) < 600


def test_code_in_the_place_of_tensors_does_not_run(state, tmp_path, path, capsys):
    evil, marker = Malicious(tmp_path / "ran"), tmp_path / "ran"
    for content in (evil, {"state_dict": evil}, {"state_dict": state | {next(iter(state)): evil}}):
        for options in ({}, {"_use_new_zipfile_serialization": False}):
            torch.save(content, path, **options)
            with pytest.raises(ValueError, match=r"an object of \w+\.open"):
                convert_checkpoint(CONFIG, path, tmp_path / "ours")
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(OSError, match=r"model\.ckpt is damaged or not a PyTorch file"):
            convert_checkpoint(CONFIG, path, tmp_path / "ours")
    assert not marker.exists() and not (tmp_path / "ours").exists()


# Damage and excess


def damage(change):
    """The reference checkpoint with `change(entries)` made to {name: (content, compression)}."""
    with zipfile.ZipFile(CHECKPOINT) as archive:
        entries = {name: (archive.read(name), zipfile.ZIP_STORED) for name in archive.namelist()}
    change(entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, (content, compression) in entries.items():
            archive.writestr(name, content, compression)
    return file.getvalue()


def deflate(*names):
    def change(entries):
        for name in names or entries:
            entries[name] = (entries[name][0], zipfile.ZIP_DEFLATED)

    return damage(change)


def first_weight():
    """The entry of the first tensor of the state dict."""
    weight = next(iter(read_state_dict(CHECKPOINT).values()))
    with zipfile.ZipFile(CHECKPOINT) as archive:
        return next(name for name in archive.namelist() if archive.read(name) == weight.numpy().tobytes())


def flip(name):
    """One byte of an entry's content changed."""
    content = bytearray(CHECKPOINT.read_bytes())
    with zipfile.ZipFile(CHECKPOINT) as archive:
        place = content.index(archive.read(name))
    content[place + 1] ^= 0xFF
    return bytes(content)


def set_entry(name, content):
    return damage(lambda entries: entries.__setitem__(name, (content, zipfile.ZIP_STORED)))


def legacy(change=lambda content: content):
    """The reference checkpoint in the format of before PyTorch 1.6."""
    file = io.BytesIO()
    torch.save(torch.load(CHECKPOINT, weights_only=True), file, _use_new_zipfile_serialization=False)
    return change(file.getvalue())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", ""),
        (lambda: b"no checkpoint" * 99, ""),
        (lambda: CHECKPOINT.read_bytes()[:100_000], ""),
        (lambda: flip(first_weight()), r"data/\d+ has another checksum"),
        (lambda: flip("model/data.pkl"), ""),
        (lambda: deflate(), "is compressed"),
        (lambda: deflate(first_weight()), r"data/\d+ is compressed"),
        (lambda: damage(lambda entries: entries.pop(first_weight())), ""),
        (lambda: set_entry("model/constants.pkl", b""), "TorchScript"),
        (lambda: set_entry("other/data.pkl", b"N."), ""),
        (lambda: legacy(lambda content: content[:-1]), ""),
        (lambda: legacy(lambda content: content[:2000]), ""),
    ],
)
def test_a_damaged_or_compressed_checkpoint_is_refused(make, reason, tmp_path, path):
    path.write_bytes(make())
    with pytest.raises(
        OSError, match=rf"model\.ckpt is damaged or not a PyTorch file \(.*{reason}.*download it again"
    ):
        convert_checkpoint(CONFIG, path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


SMALL = st.integers(-1, 6)


@given(SMALL, st.lists(st.tuples(SMALL, SMALL), max_size=3))
def test_a_tensor_has_each_of_its_elements_in_its_storage(offset, dimensions):
    shape, strides = zip(*dimensions) if dimensions else ((), ())
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(10.0).untyped_storage(), dtype=torch.float, _internal=True
    )
    places = [
        offset + sum(index * stride for index, stride in zip(indices, strides))
        for indices in itertools.product(*map(range, shape))
    ]
    if min((0, offset, *shape, *strides)) < 0 or max(places, default=0) > 9:
        with pytest.raises(ValueError, match="outside of its storage"):
            rebuild_tensor(storage, offset, shape, strides)
    else:
        assert rebuild_tensor(storage, offset, shape, strides).flatten().tolist() == places


def test_no_checkpoint_and_a_foreign_archive_are_refused(tmp_path, path):
    for place in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            read_state_dict(place)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "text")
    with pytest.raises(OSError, match="is damaged or not a PyTorch file"):
        read_state_dict(path)


# What does not fit the configuration


@pytest.mark.parametrize("name", ["triple_feature", "transformer_class"])
def test_every_missing_key_is_named(name, tmp_path):
    config, whole = load_config(name), load_state(name)
    needed = [key for key in whole if "loss." not in key and not key.endswith("attn.mask")]
    for key in needed[:: len(needed) // 8]:
        paths = write(tmp_path / "release", config, {other: whole[other] for other in whole if other != key})
        with pytest.raises(ValueError, match=rf"does not fit .*config\.yml: {re.escape(key)} is missing"):
            convert_checkpoint(*paths, tmp_path / "ours")
    convert_checkpoint(*write(tmp_path / "release", config, {key: whole[key] for key in needed}), tmp_path / "ours")


def refuse(tmp_path, config, state, message):
    with pytest.raises(ValueError, match=rf"model\.ckpt does not fit .*config\.yml: .*{message}") as error:
        convert_checkpoint(*write(tmp_path / "release", config, state), tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and len(str(error.value)) < 3000


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("dual_entropy", "encoder.extra.weight", torch.zeros(1), "encoder.extra.weight is unknown"),
        ("dual_entropy", "encoder.loss.weight", torch.zeros(1), "encoder.loss.weight is unknown"),
        ("dual_entropy", "x" * 9999, torch.zeros(1), r"x+ \.\.\. is unknown"),
        ("dual_entropy", "decoder.up.2.block.0.norm1.weight", torch.zeros(32), "decoder.up.2.* is unknown"),
        ("dual_entropy", "decoder.conv_out.bias", torch.full((3,), math.nan), "bias must hold finite numbers"),
        (
            "dual_entropy",
            "decoder.conv_out.bias",
            torch.zeros(3, dtype=torch.long),
            "must hold floating-point numbers",
        ),
        (
            "dual_entropy",
            "decoder.conv_out.bias",
            torch.zeros(3).to_sparse(),
            r"object of torch.*_rebuild_sparse_tensor",
        ),
        ("dual_entropy", "decoder.conv_out.bias", datetime.date(2023, 1, 1), r"got an object of datetime\.date"),
        ("dual_entropy", "decoder.conv_out.bias", {"x": 1}, "must be a tensor, got dict"),
        ("dual_entropy", "quantize.codebook.weight", torch.zeros(32, 32), r"shape \(32, 32\), expected \(33, 32\)"),
        ("dual_entropy", "encoder.mid_fine.attn_1.q.weight", torch.zeros(32, 32), r"expected \(32, 32, 1, 1\)"),
        ("transformer_class", "first_stage_model.extra", torch.zeros(1), "first_stage_model.extra is unknown"),
        ("transformer_class", "transformer.extra", torch.zeros(1), "transformer.extra is unknown"),
        ("transformer_class", "other.extra", torch.zeros(1), "unknown keys other.extra"),
        ("transformer_class", "transformer.pos_emb", torch.zeros(88, 32), r"expected \(1, 88, 32\)"),
    ],
)
def test_unknown_keys_and_broken_tensors_are_named(name, key, value, message, tmp_path):
    refuse(tmp_path, load_config(name), load_state(name) | {key: value}, message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dual_entropy", {"encoderconfig.ch": 64}, r"encoder.conv_in.weight has shape \(32, 3, 3, 3\), expected \(64"),
        ("dual_entropy", {"encoderconfig.num_res_blocks": 2}, "encoder.down.0.block.1.norm1.weight is missing"),
        ("dual_entropy", {"vqconfig.codebook_size": 10**9}, "quantize.codebook.weight has shape"),  # not allocated
        ("dual_entropy", {"decoderconfig.position_type": "learned"}, "position_bias_fourier.* is unknown"),
        ("dual_feature", {"encoderconfig.router_config.gate_type": "1layer-fc"}, "router.gate.weight is missing"),
        ("transformer_uncond", {"transformer_config.content_layer": 4}, "content_transformer.3.*is missing"),
        ("transformer_uncond", {"transformer_config.position_layer": 1}, "position_transformer.1.* is unknown"),
        ("transformer_uncond", {"transformer_config.block_size": 100}, r"pos_emb has .* expected \(1, 100, 32\)"),
        ("transformer_class", transformer_size(32, 4, 12), r"content_emb.weight has .* expected \(46, 32\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, changes, message, tmp_path):
    refuse(tmp_path, changed(name, changes), load_state(name), message)


def test_first_stage_and_generator_are_not_mixed_up(tmp_path):
    alone, both = "dual_entropy", "transformer_uncond"
    refuse(tmp_path, load_config(alone), load_state(both), "encoder.conv_in.weight is missing")
    refuse(tmp_path, load_config(both), load_state(alone), "unknown keys decoder.conv_in.bias")


# The archive around it


@given(st.data())
def test_a_changed_archive_is_read_or_refused(data):
    content = bytearray(CHECKPOINT.read_bytes())
    ends = st.integers(0, 200) | st.integers(len(content) - 4_000, len(content) - 1) | st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(ends)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(ends) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.ckpt")
        path.write_bytes(content)
        with suppress(OSError, ValueError):
            read_state_dict(path)
