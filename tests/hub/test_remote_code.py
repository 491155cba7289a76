"""`export_code=True`: what is saved loads without dq_hf, by trust, and with dq_hf as ever; and the Auto classes."""

import ast
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_transformer, make_vae
from hub_server import HubServer, run_client
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import dq_hf
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

KINDS = {
    "vae": (DQVAEConfig, DQVAEModel),
    "transformer": (DQTransformerConfig, DQTransformerForImageGeneration),
    "both": (DQConfig, DQForImageGeneration),
}


def make_models():
    vae = make_vae(image_size=8, granularities=[2, 1], block_out_channels=[8, 16])
    transformer = make_transformer(num_classes=3, id2label={0: "sun", 1: "moon", 2: "star"}, class_dropout=0.2)
    return {
        "vae": vae,
        "transformer": transformer,
        "both": DQForImageGeneration.from_models(vae, transformer),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a sub-folder of each kind of model, with its code."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, model in make_models().items():
        model.save_pretrained(folder / kind, export_code=True)
    return folder


# Runs with a package dq_hf that cannot be imported; `TRUST` is all that it has.
BLOCK = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dq_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoPackage())
try:
    import dq_hf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("dq_hf is there")
"""

LOAD = """
import json, shutil
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

TRUST = {"trust_remote_code": True}
classes = {}
places = [(kind, kind, "") for kind in ("vae", "transformer", "both")]
places += [(f"both-{part}", "both", part) for part in ("vae", "transformer")]
for name, place, subfolder in places:
    config = AutoConfig.from_pretrained(f"exported/{place}", subfolder=subfolder, **TRUST)
    model = AutoModel.from_pretrained(f"exported/{place}", subfolder=subfolder, **TRUST)
    classes[name] = [type(config).__name__, type(model).__name__]
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, f"{name}.safetensors")
    if not subfolder:
        model.save_pretrained(f"again-{name}")
        AutoModel.from_pretrained(f"again-{name}", **TRUST)
classes["processor"] = [type(AutoImageProcessor.from_pretrained("exported/both", **TRUST)).__name__]
for name, model in (("folder", "exported/both"), ("hub", "user/emoji")):
    generate = pipeline("dq-generation", model=model, **TRUST)
    generate("sun", seed=3)["image"].save(f"{name}.png")
pipeline(model="exported/both", **TRUST)("sun", seed=3)["image"].save("no-task.png")
for name, subfolder in (("hub", ""), ("hub-vae", "vae")):
    classes[name] = [type(AutoModel.from_pretrained("user/emoji", subfolder=subfolder, **TRUST)).__name__]
try:
    AutoModel.from_pretrained("exported/both", trust_remote_code=False)
except ValueError as error:
    classes["no trust"] = str(error)
weights = load_file("exported/vae/model.safetensors")
shutil.copytree("exported/vae", "incomplete")
save_file(dict(list(weights.items())[1:]), "incomplete/model.safetensors", metadata={"format": "pt"})
try:
    AutoModel.from_pretrained("incomplete", **TRUST)
except ValueError as error:
    classes["incomplete"] = str(error)
classes["modules"] = [name for name in sys.modules if name.startswith("dq_hf")]
json.dump(classes, open("classes.json", "w"))
"""

INSTALLED = """
from transformers import AutoModel
model = AutoModel.from_pretrained("exported/both", trust_remote_code=True)  # before anything imports dq_hf
model.save_pretrained("installed-both", safe_serialization=True)
"""

PUSH = """
from dq_hf import DQForImageGeneration, DQPipeline
DQForImageGeneration.from_pretrained("exported/both").push_to_hub("user/emoji", export_code=True)
DQForImageGeneration.from_pretrained("exported/both").push_to_hub("user/plain")
DQPipeline.from_pretrained("exported/both").push_to_hub("user/pipeline", export_code=True)
"""


@pytest.fixture(scope="module")
def fresh(exported, tmp_path_factory):
    """Folder with what fresh processes with and without dq_hf did, and the files that one pushed to the Hub."""
    place = tmp_path_factory.mktemp("fresh")
    (place / "exported").symlink_to(exported)
    with HubServer() as hub:
        run_client(hub, PUSH, cwd=place)
        names = {name: set(hub.files(f"user/{name}")) for name in ("emoji", "plain", "pipeline")}
        run_client(hub, BLOCK + LOAD, cwd=place)
        run_client(hub, INSTALLED, cwd=place)
    return place, names


def python_files(folder):
    return {path.stem for path in folder.rglob("*.py")}


def remote_entries(folder):
    """Files that name code, with what they name."""
    entries = {}
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        named = {key: content[key] for key in ("auto_map", "custom_pipelines") if key in content}
        if named:
            entries[str(path.relative_to(folder))] = named
    return entries


@pytest.mark.parametrize("kind", KINDS)
def test_exported_code_is_flat_and_imports_only_its_neighbours_by_name_and_libraries(kind, exported):
    modules = {path.stem for path in (exported / kind).glob("*.py")}
    assert modules == python_files(exported / kind)
    for path in (exported / kind).glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert all(node.level <= 1 for node in imports), path
        neighbours = {node.module for node in imports if node.level == 1}
        assert neighbours <= modules
        assert set(get_relative_imports(path)) == neighbours  # the scan takes texts for imports
        assert "dq_hf" not in get_imports(path)  # what transformers asks for before it loads
    assert kind == "both" or not {"modeling_dq", "image_generation"} & modules  # only what is needed


def test_saved_files_name_their_classes(exported):
    auto_map = {"AutoConfig": "configuration_dqvae.DQVAEConfig", "AutoModel": "modeling_dqvae.DQVAEModel"}
    assert remote_entries(exported / "vae") == {"config.json": {"auto_map": auto_map}}
    entries = remote_entries(exported / "both")
    assert set(entries) == {"config.json", "vae/config.json", "transformer/config.json", "preprocessor_config.json"}
    assert entries["vae/config.json"] == {"auto_map": auto_map}
    task = entries["config.json"]["custom_pipelines"]["dq-generation"]
    assert task["impl"] == "image_generation.DQGenerationPipeline"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded from exported code"])
def test_without_the_flag_no_code_is_written_or_named(kind, loaded, exported, tmp_path):
    model = KINDS[kind][1].from_pretrained(exported / kind) if loaded else make_models()[kind]
    model.save_pretrained(tmp_path)
    assert not python_files(tmp_path) and not remote_entries(tmp_path)
    if kind == "both":
        DQPipeline(model.vae, model.transformer).save_pretrained(tmp_path / "diffusers")
        pipeline("dq-generation", model=model).save_pretrained(tmp_path / "task")
        AutoImageProcessor.from_pretrained(exported / "both").save_pretrained(tmp_path / "processor")
        assert not python_files(tmp_path) and not remote_entries(tmp_path)


def test_both_pipelines_export_what_the_model_exports(exported, tmp_path):
    model = make_models()["both"]
    DQPipeline(model.vae, model.transformer).save_pretrained(tmp_path / "diffusers", export_code=True)
    pipeline("dq-generation", model=model).save_pretrained(tmp_path / "task", export_code=True)
    for folder in (tmp_path / "diffusers", tmp_path / "task"):
        assert python_files(folder) == python_files(exported / "both")
        assert remote_entries(folder) == remote_entries(exported / "both")


class MyVAE(DQVAEModel):
    """A class of a user's own."""


class MyModel(DQForImageGeneration):
    """Likewise."""


@pytest.mark.parametrize("kind, own_class", [("vae", MyVAE), ("both", MyModel)])
def test_a_class_of_ones_own_saves_without_code_which_is_not_ours_to_export(kind, own_class, exported, tmp_path):
    model = own_class.from_pretrained(exported / kind)
    model.save_pretrained(tmp_path / "saved")
    assert not python_files(tmp_path) and not remote_entries(tmp_path)
    loaded = KINDS[kind][1].from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=f"own classes, and {own_class.__name__} is none.*leave export_code out"):
        model.save_pretrained(tmp_path / "refused", export_code=True)
    assert not (tmp_path / "refused").exists()


def test_a_part_of_a_class_of_ones_own_is_exported_as_ours(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(MyVAE, "__module__", "__main__")  # which in a notebook has no file
    monkeypatch.delattr("__main__.__file__", raising=False)
    vae = MyVAE.from_pretrained(exported / "vae")
    model = DQForImageGeneration.from_models(vae, make_models()["transformer"])
    model.save_pretrained(tmp_path, export_code=True)
    assert python_files(tmp_path) == python_files(exported / "both")


def test_only_the_main_process_writes_code(tmp_path):
    for kind, model in make_models().items():
        model.save_pretrained(tmp_path / kind, is_main_process=False, export_code=True)
    assert not python_files(tmp_path)


def test_models_load_in_a_fresh_process_without_the_package(fresh):
    place, _ = fresh
    found = json.loads((place / "classes.json").read_text())
    assert found["modules"] == []
    names = {kind: [loaded.__name__ for loaded in classes] for kind, classes in KINDS.items()}
    names |= {f"both-{part}": names[part] for part in ("vae", "transformer")}
    assert {kind: found[kind] for kind in names} == names
    assert found["processor"] == ["DQImageProcessor"]
    assert (found["hub"], found["hub-vae"]) == (["DQForImageGeneration"], ["DQVAEModel"])
    assert "trust_remote_code=True" in found["no trust"]
    assert "missing or unknown are" in found["incomplete"]
    models = make_models()
    for name, kind in {**{kind: kind for kind in KINDS}, "both-vae": "vae", "both-transformer": "transformer"}.items():
        weights, expected = load_file(place / f"{name}.safetensors"), models[kind].state_dict()
        assert set(weights) == set(expected)
        assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_the_task_gives_the_same_image_without_the_package(fresh):
    place, _ = fresh
    expected = pipeline("dq-generation", model=make_models()["both"])("sun", seed=3)["image"]
    for name in ("folder", "hub", "no-task"):
        assert np.array_equal(np.array(Image.open(place / f"{name}.png")), np.array(expected)), name


@pytest.mark.parametrize("place", [f"again-{kind}" for kind in KINDS] + ["installed-both"])
def test_what_was_saved_from_exported_code_loads_with_the_package_and_has_its_code(place, fresh, exported):
    folder, kind = fresh[0] / place, place.partition("-")[2]
    model, expected = KINDS[kind][1].from_pretrained(folder), make_models()[kind].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    of_task = {"image_generation", "class_labels", "seeds"}
    assert python_files(folder) >= python_files(exported / kind) - of_task
    if kind == "both":
        assert isinstance(DQPipeline.from_pretrained(folder), DQPipeline)


def test_a_pushed_repository_has_code_only_on_request(fresh, exported):
    _, names = fresh
    code = {f"{name}.py" for name in python_files(exported / "both")}
    assert names["emoji"] >= code and names["emoji"] - code == names["plain"]
    assert names["pipeline"] == names["emoji"]


def test_with_the_package_exported_models_load_without_trust(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.py"):
        path.write_text("raise AssertionError('code from the folder ran')\n")
    for kind, (config_class, model_class) in KINDS.items():
        for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
            assert type(AutoConfig.from_pretrained(tmp_path / kind, **trust)) is config_class
            assert type(AutoModel.from_pretrained(tmp_path / kind, **trust)) is model_class
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "both")) is DQImageProcessor
    generate = pipeline("dq-generation", model=tmp_path / "both")
    assert type(generate) is dq_hf.DQGenerationPipeline and generate("sun", seed=3)["label"] == "sun"
    assert isinstance(DQPipeline.from_pretrained(tmp_path / "both"), DQPipeline)
    assert "run the custom code" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_load_every_model_from_folder_and_sub_folder(kind, tmp_path):
    config_class, model_class = KINDS[kind]
    model = make_models()[kind]
    model.save_pretrained(tmp_path / "a" / "b")
    for folder, subfolder in ((tmp_path / "a" / "b", ""), (tmp_path, "a/b")):
        config = AutoConfig.from_pretrained(folder, subfolder=subfolder)
        loaded = AutoModel.from_pretrained(folder, subfolder=subfolder)
        assert type(config) is config_class and type(loaded) is model_class
        assert config.to_diff_dict() == model.config.to_diff_dict()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_auto_model_makes_every_model_from_its_configuration():
    for model in make_models().values():
        assert type(AutoModel.from_config(model.config)) is type(model)


@pytest.mark.parametrize("kind", ["vae", "both"])
def test_auto_image_processor_loads_by_its_own_name_and_by_the_models(kind, tmp_path):
    make_models()[kind].save_pretrained(tmp_path)
    DQImageProcessor(size={"height": 16, "width": 8}).save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 16, "width": 8}
    path = tmp_path / "preprocessor_config.json"
    content = json.loads(path.read_text())
    assert content.pop("image_processor_type") == "DQImageProcessor"
    path.write_text(json.dumps(content))
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DQImageProcessor and loaded.size == {"height": 16, "width": 8}
