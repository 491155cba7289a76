"""Whatever is in a folder, loading ends in an error that names the file, or in a model that is what the file says.

Never in a crash, a hang, much memory, foreign code or random weights.
"""

import copy
import json
import math
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from conftest import make_transformer, make_vae
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import pipeline

from dq_hf import (
    DQConfig,
    DQForImageGeneration,
    DQImageProcessor,
    DQPipeline,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
    DQVAEConfig,
    DQVAEModel,
)
from dq_hf.hub.weights import weight_files

DEEP = '{"a": ' + "[" * 900 + "]" * 900 + "}"
REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
GIBIBYTE = 2**30


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of both models, as small as they can be; not to be changed."""
    vae = make_vae(
        image_size=4,
        granularities=[2, 1],
        block_out_channels=[2, 2],
        norm_num_groups=1,
        z_channels=2,
        codebook_size=4,
        codebook_dim=2,
        router="feature",
        router_norm_num_groups=1,
    )
    transformer = make_transformer(
        grid_sizes=[[2, 2], [4, 4]],
        codebook_size=4,
        hidden_size=4,
        num_position_layers=1,
        num_content_layers=1,
        num_classes=2,
        id2label={0: "sun", 1: "moon"},
        sampling_defaults={"top_k": 3},
    )
    folder = tmp_path_factory.mktemp("saved")
    DQForImageGeneration.from_models(vae, transformer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def little_memory():
    """From here on at most one GiB more of address space: a larger allocation fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class Malicious:
    """A file with this name is there when it was unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("options", [{}, {"use_safetensors": None}, {"use_safetensors": True}])
def test_a_folder_with_only_a_pickle_is_refused_with_reason_and_remedy(folder, name, options):
    weights = load_file(folder / "vae" / "model.safetensors")
    (folder / "vae" / "model.safetensors").unlink()
    torch.save(weights, folder / "vae" / name)
    for load in (lambda: DQVAEModel.from_pretrained(folder / "vae", **options), lambda: load_both(folder, **options)):
        with pytest.raises(OSError) as error:
            load()
        parts = [f"{folder / 'vae'} has no weights in safetensors, only {name}", "can run code", "dq-hf convert"]
        assert all(part in str(error.value) for part in [*parts, "use_safetensors=False"])


def load_both(folder, **options):
    return DQForImageGeneration.from_pretrained(folder, **options)


def load_vae(folder):
    return DQVAEModel.from_pretrained(folder / "vae")


def test_a_pickle_that_is_asked_for_loads_but_runs_no_code(folder, tmp_path):
    place = folder / "vae"
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    torch.save(weights, place / "pytorch_model.bin")
    loaded = DQVAEModel.from_pretrained(place, use_safetensors=False).state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    torch.save(weights | {"evil": Malicious(tmp_path / "ran")}, place / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler|Weights only"):
        DQVAEModel.from_pretrained(place, use_safetensors=False)
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_taken_where_there_is_a_pickle_too(folder, tmp_path):
    torch.save({"evil": Malicious(tmp_path / "ran")}, folder / "vae" / "pytorch_model.bin")
    assert isinstance(load_both(folder), DQForImageGeneration)
    assert not (tmp_path / "ran").exists()


# Lists of shards


@pytest.fixture
def shards(saved, tmp_path):
    """The generator in several files, with their list."""
    model = DQTransformerForImageGeneration.from_pretrained(saved / "transformer")
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_shards_load(shards, saved):
    expected = load_file(saved / "transformer" / "model.safetensors")
    loaded = DQTransformerForImageGeneration.from_pretrained(shards).state_dict()
    assert set(loaded) == set(expected) and all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: "{", "is damaged and no JSON file"),
        (lambda index: [index], "must hold a JSON object, got list"),
        (lambda index: index.pop("weight_map") and index, "must hold weight_map and metadata"),
        (lambda index: index.pop("metadata") and index, "must hold weight_map and metadata"),
        (lambda index: index | {"weight_map": []}, "must hold weight_map and metadata"),
        (lambda index: index | {"weight_map": {"a": "nowhere.safetensors"}}, r"nowhere\.safetensors is not there"),
        (lambda index: index | {"weight_map": {"a": "../b.safetensors"}}, "a must be in a safetensors file beside it"),
        (lambda index: index | {"weight_map": {"a": "b.bin"}}, r"a must be in a safetensors file .* got 'b\.bin'"),
        (lambda index: index | {"weight_map": {"a": 3}}, "a must be in a safetensors file .* got 3"),
    ],
)
def test_a_damaged_list_of_shards_is_refused(shards, change, message):
    path = shards / "model.safetensors.index.json"
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(OSError, match=message) as error:
        DQTransformerForImageGeneration.from_pretrained(shards)
    assert str(path) in str(error.value)


def test_a_shard_that_is_not_listed_or_holds_what_another_has_is_noticed(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    left = {key: shard for key, shard in index["weight_map"].items() if shard != first}
    path.write_text(json.dumps(index | {"weight_map": left}))
    with pytest.raises(ValueError, match="weights are missing"):
        DQTransformerForImageGeneration.from_pretrained(shards)
    path.write_text(json.dumps(index))
    weights = load_file(shards / first)
    save_file(load_file(shards / second) | weights, shards / second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"weights are in more than one file: .*{min(weights)}"):
        DQTransformerForImageGeneration.from_pretrained(shards)


# Weights and sizes


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("transformer", "hidden_size", 10**9),
        ("transformer", "hidden_size", 2**20),
        ("transformer", "codebook_size", 2**31 - 1),
        ("transformer", "codebook_size", 10**30),
        ("transformer", "num_classes", 10**9),
        ("transformer", "num_content_layers", 10**9),
        ("transformer", "max_stream_length", 10**18),
        ("transformer", "grid_sizes", [[10**6, 10**6], [2 * 10**6, 2 * 10**6]]),
        ("vae", "codebook_dim", 2**20),
        ("vae", "codebook_size", 10**12),
        ("vae", "block_out_channels", [2**20, 2**20]),
        ("vae", "image_size", 2**20),
        ("vae", "layers_per_block", 10**9),
        ("vae", "granularities", [2**60, 2**59]),
    ],
)
def test_huge_sizes_are_refused_without_memory_for_them(folder, part, field, value, little_memory):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    load = {"vae": DQVAEModel, "transformer": DQTransformerForImageGeneration}[part].from_pretrained
    with within(20), pytest.raises(ValueError) as error:
        load(folder / part)
    assert str(folder / part) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(folder, dtype):
    path = folder / "vae" / "model.safetensors"
    weights = load_file(path)
    key = "decoder.conv_in.weight"
    save_file(weights | {key: weights[key].to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{path} does not fit .* stored as something else than F64.*: {key} \("):
        DQVAEModel.from_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", DQForImageGeneration.from_pretrained),
        ("vae/config.json", DQForImageGeneration.from_pretrained),
        ("transformer/config.json", DQForImageGeneration.from_pretrained),
        ("model_index.json", DQPipeline.from_pretrained),
        ("preprocessor_config.json", DQImageProcessor.from_pretrained),
    ],
)
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, DEEP, "9" * 5_000, "\xff"])
def test_damaged_json_is_refused_by_name(folder, name, load, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(OSError) as error:
        load(folder)
    assert str(folder / name) in str(error.value)


def test_a_file_of_other_libraries_that_is_nested_too_deep_is_refused_by_name(folder):
    path = folder / "vae" / "adapter_config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(OSError, match=str(path)):
        DQForImageGeneration.from_pretrained(folder)


SHARDS = [
    "model-00001-of-00001.safetensors",
    "model.safetensors",
    "../model.safetensors",
    "/etc/hostname",
    "a/b.safetensors",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(SHARDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("weight_map"), inner, max_size=4),
    max_leaves=8,
)
WEIGHT_MAPS = st.dictionaries(st.text(), st.sampled_from(SHARDS) | JSON, max_size=3)


@pytest.fixture(scope="module")
def shard_folder(saved, tmp_path_factory):
    """A folder with one shard."""
    folder = tmp_path_factory.mktemp("shards")
    shutil.copy(saved / "vae" / "model.safetensors", folder / SHARDS[0])
    return folder


@given(JSON | st.fixed_dictionaries({"metadata": st.just({}), "weight_map": WEIGHT_MAPS}))
def test_any_list_of_shards_names_files_beside_it_or_is_refused_by_name(shard_folder, content):
    index = shard_folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    try:
        assert weight_files(shard_folder) == [shard_folder / SHARDS[0]]
    except OSError as error:
        assert str(index) in str(error)


@pytest.mark.parametrize(
    ("name", "load", "entry", "message"),
    [
        ("model_index.json", DQPipeline.from_pretrained, {"vae": ["os", "system"]}, "vae must be .* got .*system"),
        ("model_index.json", DQPipeline.from_pretrained, {"vae": None}, "vae must be"),
        ("model_index.json", DQPipeline.from_pretrained, {"_class_name": "Other"}, "_class_name must be DQPipeline"),
        ("model_index.json", DQPipeline.from_pretrained, {"unet": ["diffusers", "UNet2DModel"]}, "unknown .* unet"),
        ("preprocessor_config.json", DQImageProcessor.from_pretrained, {"size": {"height": 2**40}}, "size must be"),
        ("preprocessor_config.json", DQImageProcessor.from_pretrained, {"do_resise": True}, "no argument do_resise"),
        ("config.json", DQConfig.from_pretrained, {"label2id": {"sun": 1}}, "label2id must be"),
        ("config.json", DQConfig.from_pretrained, {"configuration_files": [1]}, "no field 'configuration_files'"),
        ("vae/config.json", DQForImageGeneration.from_pretrained, {"dtype": "int8"}, "dtype must be one of float32"),
        ("vae/config.json", load_vae, {"attn_implementation": "x"}, "x"),
        ("vae/config.json", load_vae, {"attn_implementation": 3}, "attn_implementation must be a name"),
        ("vae/config.json", DQForImageGeneration.from_pretrained, {"quantization_config": {}}, "its quant_method"),
        ("vae/config.json", DQForImageGeneration.from_pretrained, {"quantization_config": 3}, "quantization_config"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_by_file_and_field(folder, name, load, entry, message):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises((TypeError, ValueError), match=message) as error:
        load(folder)
    assert str(path.parent) in str(error.value)


# What libraries set and pass


def test_attributes_that_libraries_set_on_a_configuration_do_not_keep_it_from_loading(folder):
    model = load_both(folder)
    for config in (model.config, model.vae.config, model.transformer.config):
        config.use_cache, config.callback, config.anything = False, print, {"a": 1}
    model.save_pretrained(folder)
    loaded = load_both(folder)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert not hasattr(loaded.transformer.config, "use_cache")
    model.vae.config.save_pretrained(folder / "alone")
    assert isinstance(DQVAEConfig.from_pretrained(folder / "alone"), DQVAEConfig)
    model.vae.config.codebook_size = "many"
    with pytest.raises(TypeError, match="codebook_size"):
        model.save_pretrained(folder)
    assert isinstance(load_both(folder), DQForImageGeneration)


@pytest.mark.parametrize("kind", ["model", "pipeline", "task", "tokenizer", "processor"])
def test_save_pretrained_takes_what_transformers_and_diffusers_pass(folder, tmp_path, kind):
    both = load_both(folder)
    pipe = DQPipeline(both.vae, both.transformer)
    task = pipeline("dq-generation", model=both)
    saved = {"model": both, "pipeline": pipe, "task": task, "tokenizer": both.vae, "processor": DQImageProcessor()}[
        kind
    ]
    usual = {"safe_serialization": True, "max_shard_size": None, "variant": None, "save_function": torch.save}
    saved.save_pretrained(tmp_path / "usual", **usual)
    assert not list((tmp_path / "usual").rglob("*.bin"))
    for wrong in ({"safe_serialization": False}, {"use_flashpack": True}, {"distributed_checkpoint": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            saved.save_pretrained(tmp_path / "wrong", **wrong)
    with pytest.raises(TypeError, match="unknown argument.* safe_serialisation"):
        saved.save_pretrained(tmp_path / "wrong", safe_serialisation=True)
    assert not (tmp_path / "wrong").exists()


# Mutations: `random` is hypothesis's, so that every run has the same.

VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 2**20, 2**31, 10**9, 10**12, 10**30, 10**400, 0.5, -0.5, 1e308]
VALUES += [math.nan, math.inf, "", "x", "fourier", "feature", "float16", "float99", "int8", "nn", [], [1], [0], [-1]]
VALUES += [[2, 1], [1e9], [10**9], ["a"], [[2, 2]], [[0, 0]], [[10**9, 10**9], [2 * 10**9, 2 * 10**9]], [[[]]], {}]
VALUES += [{"0": "a"}, {"a": 1}, {"top_k": "x"}, {"height": 3, "width": -1}, ["os", "system"]]
VALUES += [{"quant_method": "x"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
KEYS = "hidden_sise num_labels configuration_files auto_map custom_pipelines transformers_weights dtype torch_dtype"
KEYS += " quantization_config problem_type attn_implementation _attn_implementation id2label label2id architectures"
KEYS += " return_dict output_attentions chunk_size_feed_forward is_encoder_decoder per_layer_config _name_or_path"
KEYS += " _commit_hash tie_word_embeddings temperature vae_config num_classes model_type __class__ validate from_dict"
KEYS += " size do_resize image_processor_type scheduler _class_name"
KEYS = KEYS.split()
DOCUMENTS = [
    DEEP.encode(),
    b"",
    b"{}",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe",
    b"9" * 5_000,
]


def mutate_json(content, random):
    """A copy of a JSON object in which one to three entries, somewhere, went, changed their name or value or came."""
    content = copy.deepcopy(content)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        node = content
        while inner := [value for value in entries(node) if isinstance(value, (dict, list))]:
            if random.random() < 0.5:
                break
            node = random.choice(inner)
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        change = random.choice(["remove", "rename", "add", "replace", "replace", "replace"])
        value = copy.deepcopy(random.choice(VALUES))
        if change == "remove" and keys:
            node.pop(random.choice(keys))
        elif change == "rename" and keys and isinstance(node, dict):
            key = random.choice(keys)
            node[random.choice([key[:-1], key + "s", key.upper()])] = node.pop(key)
        elif change == "add" and isinstance(node, dict):
            node[random.choice(KEYS)] = value
        elif change == "add" or not keys:
            node.append(value) if isinstance(node, list) else node.update(a=value)
        else:
            node[random.choice(keys)] = value
    return json.dumps(content).encode()


def entries(node):
    return list(node.values()) if isinstance(node, dict) else node


def mutate_bytes(content, random):
    """Bytes cut off, changed, put in or left out."""
    place, other = sorted(random.randrange(len(content)) for _ in range(2))
    damaged = bytearray(content)
    change = random.choice(["cut", "flip", "insert", "leave out"])
    if change == "cut":
        del damaged[place:]
    elif change == "flip":
        damaged[place] ^= 1 << random.randrange(8)
    elif change == "insert":
        damaged[place:place] = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
    else:
        del damaged[place:other]
    return bytes(damaged)


def mutate_configuration(content, random):
    choice = random.random()
    if choice < 0.75:
        return mutate_json(json.loads(content), random)
    return mutate_bytes(content, random) if choice < 0.95 else random.choice(DOCUMENTS)


class within:
    """A with-statement that fails when it takes longer than so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        def ring(*_):
            raise AssertionError(f"it took longer than {self.seconds} s")

        self.before = signal.signal(signal.SIGALRM, ring)
        signal.alarm(self.seconds)

    def __exit__(self, *_):
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)


def outcome(load, path):
    """What was loaded, or None after an error of the right kind that names the file, or else its folder."""
    try:
        with within(60):
            return load(path.parent)
    except (OSError, TypeError, ValueError) as error:
        assert str(path.parent) in str(error) and "\n" not in str(error)[:50], error
        return None


def assert_holds(config, content):
    """A configuration has the values of its file, but for those that stand for a default."""
    if isinstance(config, DQImageProcessor):
        size = content.get("size") or 256
        height, width = size if isinstance(size, list) else 2 * [size]
        assert config.size == (size if isinstance(size, dict) else {"height": height, "width": width})
        assert config.do_resize == content.get("do_resize", True)
        return
    for name in config.own_field_names() & content.keys():
        value, expected = getattr(config, name), content[name]
        if isinstance(value, (DQVAEConfig, DQTransformerConfig)):
            assert_holds(value, expected or {})
        elif expected is not None:
            assert value == expected, name
    if content.get("id2label") is not None:
        assert {str(label): name for label, name in config.id2label.items()} == content["id2label"]


def assert_weights(model, *paths):
    """A model has exactly the weights of its files, as an independent reader finds them."""
    expected = {}
    for path, prefix in paths:
        expected |= {prefix + name: value for name, value in read_safetensors(path.read_bytes()).items()}
    state = model.state_dict()
    assert set(state) == set(expected)
    for name, value in state.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(content):
    """Tensors of a safetensors file, read as its specification says."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


CONFIGURATIONS = [  # file, what reads it, what loads a model by it, how many files, and how many of the good ones load
    ("vae/config.json", DQVAEConfig, DQVAEModel, 600, 0.4),
    ("transformer/config.json", DQTransformerConfig, DQTransformerForImageGeneration, 600, 0.8),
    ("config.json", DQConfig, DQForImageGeneration, 200, 0.15),
    ("preprocessor_config.json", DQImageProcessor, None, 400, 0),
    ("model_index.json", None, DQPipeline, 200, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reader", "model_class", "examples", "share"), CONFIGURATIONS)
def test_mutated_configurations_are_refused_by_name_or_mean_what_they_say(
    name, reader, model_class, examples, share, saved, little_memory
):
    path = saved / name
    original = path.read_bytes()

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False))
    def check(random):
        damaged = mutate_configuration(original, random)
        note(f"{name}: {damaged[:2_000]}")
        path.write_bytes(damaged)
        if reader is not None:
            config = outcome(reader.from_pretrained, path)
            if config is None:
                return
            assert_holds(config, json.loads(damaged))
        if random.random() < share and (model := outcome(model_class.from_pretrained, path)) is not None:
            weights = [(saved / f"{part}/model.safetensors", f"{part}.") for part in ("vae", "transformer")]
            if model_class is DQPipeline:
                model = DQForImageGeneration.from_models(model.vae, model.transformer)
            elif model_class is not DQForImageGeneration:
                weights = [(path.parent / "model.safetensors", "")]
            assert_weights(model, *weights)

    try:
        check()
    finally:
        path.write_bytes(original)


def mutate_weights(content, random):
    """A safetensors file that was cut, whose header or data was changed, or one written whole from other tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    change = random.choice(["bytes", "length", "header bytes", "header", "header", "header", "values", "tensors"])
    if change == "bytes":
        return mutate_bytes(content, random)
    if change == "length":
        wrong = random.choice([0, 1, length - 1, length + 1, len(content), 10**8, 2**32, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + header + data
    if change == "header bytes":
        header = mutate_bytes(header, random)
        return struct.pack("<Q", len(header) if random.random() < 0.7 else length) + header + data
    entries = json.loads(header)
    name = random.choice([key for key in entries if key != "__metadata__"])
    if change == "header":
        header = json.dumps(mutate_entry(entries, name, random)).encode()
        return struct.pack("<Q", len(header)) + header + data
    tensors = {key: value.clone() for key, value in read_safetensors(content).items()}
    if change == "values":
        value = random.choice([math.nan, math.inf, -math.inf, 0.0, 1e30])
        tensors[name].view(-1)[random.randrange(tensors[name].numel())] = value
    else:
        kind = random.choice(["drop", "rename", "add", "transpose", "dtype", "grow"])
        if kind == "add":
            tensors[f"{name}_2"] = tensors[name].clone()
        elif kind == "dtype":
            tensors[name] = tensors[name].to(random.choice([*DTYPES.values(), torch.int32, torch.bool, torch.uint8]))
        elif kind == "grow":
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        elif kind == "transpose":
            tensors[name] = tensors[name].flatten().view(*reversed(tensors[name].shape)).contiguous()
        else:
            value = tensors.pop(name)
            tensors |= {name.upper(): value} if kind == "rename" else {}
    return save(tensors, metadata={"format": "pt"})


def mutate_entry(entries, name, random):
    """The header's dictionary with one entry changed, taken away, doubled or under another name."""
    entry, other = entries[name], random.choice(list(entries))
    change = random.choice(["remove", "rename", "double", "swap", "shape", "dtype", "offsets", "value", "metadata"])
    if change in ("remove", "rename"):
        del entries[name]
    if change in ("rename", "double"):
        entries[name[:-1]] = entry
    elif change == "swap" and other != "__metadata__":
        entries[name], entries[other] = entries[other], entry
    elif change == "shape":
        shape = entry["shape"]
        entry["shape"] = random.choice(
            [shape[::-1], [math.prod(shape)], [*shape, 1], [0], [2**40], [2**63], [-1], [], None]
        )
    elif change == "dtype":
        entry["dtype"] = random.choice(["F64", "F16", "BF16", "I32", "U32", "BOOL", "F8_E4M3", "X", "", None, 3])
    elif change == "offsets":
        begin, end = entry["data_offsets"]
        moved = [
            [begin + 4, end + 4],
            [begin, end + 4],
            [begin, end - 4],
            [end, begin],
            [0, 0],
            [0, 2**63],
            [-4, 0],
            [],
        ]
        entry["data_offsets"] = random.choice(moved)
    elif change == "value":
        entries[name] = random.choice([None, 3, [], {}, {"dtype": "F32"}, "x"])
    elif change == "metadata":
        entries["__metadata__"] = random.choice(
            [None, {}, {"format": "tf"}, {"format": 3}, 3, {"format": "pt", "a": "b"}]
        )
    return entries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "model_class", "examples"),
    [("transformer", DQTransformerForImageGeneration, 440), ("vae", DQVAEModel, 60)],
)
def test_mutated_weights_are_refused_by_name_or_loaded_as_they_are(part, model_class, examples, saved, little_memory):
    path = saved / part / "model.safetensors"
    original = path.read_bytes()

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False))
    def check(random):
        damaged = mutate_weights(original, random)
        (length,) = struct.unpack("<Q", damaged[:8].ljust(8, b"\0"))
        note(f"{len(original)} bytes became {len(damaged)}: {damaged[: min(length, 10_000) + 8]}")
        path.write_bytes(damaged)
        model = outcome(model_class.from_pretrained, path)
        if model is not None:
            assert_weights(model, (path, ""))
            weights = {key: value for key, value in model.state_dict().items() if key != "router.thresholds"}
            assert all(value.isfinite().all() for value in weights.values())  # those are infinite until calibrated

    try:
        check()
    finally:
        path.write_bytes(original)
