"""Model cards say what is known and nothing else, and travel with the models that they describe."""

import math
import re
import shutil
import time

import pytest
import torch
import yaml
from conftest import make_transformer, make_vae
from hub_server import card_errors
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel

from dq_hf import DQForImageGeneration, DQImageProcessor, DQPipeline, DQTransformerForImageGeneration, DQVAEModel
from dq_hf.hub.card import MARK, SourceCard, lasting_name, merge_with_owner, split_card, write_model_card

VAE_FACTS = dict(
    title="tiny-vae",
    summary="A tokenizer of a test.",
    repository="user/vae",
    dataset="someone/pictures",
    test_split="test",
    metrics={"psnr": 24.5312, "codes_per_image": 40.0},
    losses={"loss": 0.123456, "share_2": 0.5},
    data={"training images": 3426, "unreadable images dropped": None, "split": "a|b"},
    training={"steps": 4000, "epochs": 37.44, "mirrored": True},
    command="python train.py --data 'my pictures'",
    license="mit",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Finished folders: `vae`, and `joint`, of three classes, with a picture of samples."""
    place = tmp_path_factory.mktemp("cards")
    vae = make_vae()
    vae.save_pretrained(place / "vae")
    DQImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "vae")
    write_model_card(place / "vae", vae.config, **VAE_FACTS)
    names = {0: "sun", 1: "full moon", 2: "star"}
    joint = DQForImageGeneration.from_models(vae, make_transformer(num_classes=3, id2label=names))
    joint.save_pretrained(place / "joint")
    Image.new("RGB", (8, 8)).save(place / "joint" / "samples.png")
    write_model_card(place / "joint", joint.config, title="tiny", license="cc-by-4.0", limits="Only tests.")
    return place


# Cards


def read_card(folder):
    """Header and body."""
    return re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.DOTALL).groups()


def test_the_header_names_task_data_and_results(place):
    header = yaml.safe_load(read_card(place / "vae")[0])
    (model,) = header.pop("model-index")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": "mit",
        "datasets": ["someone/pictures"],
        "metrics": ["psnr", "codes_per_image"],
        "tags": ["dq_hf", "vector-quantization", "image-tokenizer"],
    }
    assert model["name"] == "tiny-vae"
    (result,) = model["results"]
    assert result["dataset"] == {"name": "someone/pictures", "type": "someone/pictures", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("psnr", 24.5312),
        ("codes_per_image", 40.0),
    ]
    assert not card_errors((place / "vae" / "README.md").read_text())


def test_the_client_reads_the_header_back(place):
    data = ModelCard.load(place / "vae" / "README.md").data
    assert data.license == "mit" and data.model_name == "tiny-vae"
    assert {result.metric_type: result.metric_value for result in data.eval_results}["psnr"] == 24.5312


def test_the_figures_are_written_as_the_hub_reads_them_today(place, tmp_path):
    shutil.copytree(place / "vae", tmp_path, dirs_exist_ok=True)
    results = tmp_path / ".eval_results" / "dq_hf.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(results.read_text()))
    assert {(entry.dataset_id, entry.task_id): entry.value for entry in entries} == {
        ("someone/pictures", "psnr"): 24.5312,
        ("someone/pictures", "codes_per_image"): 40.0,
    }
    model = DQVAEModel.from_pretrained(tmp_path)
    model.quantizer.codebook.data += 1
    model.save_pretrained(tmp_path)  # nobody measured this model
    assert not results.exists()


def test_the_body_has_what_was_measured_with_units(place):
    body = read_card(place / "vae")[1]
    for row in (
        "| held out, split `test` | |\n|---|---|\n| PSNR of the reconstructions, mean over images | 24.53 dB |",
        "| loss, all terms | 0.1235 |\n| share of regions with 2 x 2 pixels a code | 0.5 |",
        "| images | someone/pictures |\n| training images | 3,426 |\n| split | a\\|b |",
        "an image of 16 x 16 becomes between 16 and 64 codes of 4 bits.",
        "```\npython train.py --data 'my pictures'\n```",
    ):
        assert row in body
    assert "dropped" not in body and "None" not in body


def test_what_is_not_known_is_left_out(place):
    header, body = read_card(place / "joint")
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "unconditional-image-generation",
        "license": "cc-by-4.0",
        "tags": ["dq_hf", "vector-quantization", "image-tokenizer", "image-generation"],
    }
    assert re.findall("^## (.*)", body, re.MULTILINE) == ["Use", "Measured", "Limits", "Citation"]
    assert "![samples](samples.png)" in body and "reconstructions.png" not in body
    assert "held out" not in body and "None" not in body and "| classes | 3 |" in body
    assert "Only tests.\n\nCoding loses detail" in body and "at 16 x 16 pixels only, and only of its 3 classes" in body


def test_local_data_and_infinite_figures_stay_out_of_the_header(place, tmp_path):
    vae = make_vae()
    for dataset, header_says in ((str(tmp_path), "custom"), ("examples/data/emoji", "custom"), ("cifar10", "cifar10")):
        metrics = {"psnr": math.inf, "codes_per_image": 3}
        write_model_card(tmp_path, vae.config, title="t", dataset=dataset, metrics=metrics)
        header = yaml.safe_load(read_card(tmp_path)[0])
        assert ("datasets" in header) == (header_says != "custom") and header["metrics"] == ["codes_per_image"]
        (result,) = header["model-index"][0]["results"]
        assert result["dataset"]["type"] == header_says and len(result["metrics"]) == 1
        assert "| inf dB |" in read_card(tmp_path)[1]


@pytest.mark.parametrize("data", ["photographs", "runs/photographs", "my/data.parquet", "./runs/photographs", "a/b/c"])
def test_the_kept_name_of_local_images_is_never_a_hub_id(tmp_path, monkeypatch, data):
    (tmp_path / "here" / data).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    name, absolute = lasting_name(data), lasting_name(str(tmp_path))
    assert (tmp_path / "here" / name).samefile(data) and str(tmp_path) not in name and absolute == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = make_vae().config
    for kept, on_hub in ((name, False), (absolute, False), (lasting_name(data), not data.startswith(("./", "a/b/")))):
        write_model_card(tmp_path, config, title="t", dataset=kept, metrics={"psnr": 20.0})
        assert ("datasets" in yaml.safe_load(read_card(tmp_path)[0])) == on_hub
        assert (tmp_path / ".eval_results" / "dq_hf.yaml").exists() == on_hub


@pytest.mark.parametrize("kind", ["vae", "bare-vae", "conditional", "unconditional", "joint"])
def test_the_code_of_a_card_runs(place, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 30)).save("image.png")
    if kind in ("vae", "joint"):
        (tmp_path / "model").symlink_to(place / kind)
    elif kind == "bare-vae":  # without its image processor
        make_vae().save_pretrained("model")
    else:
        make_transformer(num_classes=3 * (kind == "conditional")).save_pretrained("model")
    blocks = re.findall("```python\n(.*?)```", read_card(tmp_path / "model")[1], re.DOTALL)
    variables = {}
    for block in blocks:
        exec(re.sub("path/to/this/folder|user/vae", "model", block), variables)
    assert len(blocks) == (2 if kind == "joint" else 1)
    assert {"vae": "image", "bare-vae": "image", "joint": "images"}.get(kind, "generated") in variables


# Travelling

ALL = ["README.md", "samples.png"]


def bytes_of(folder, names=ALL):
    return [(folder / name).read_bytes() for name in names]


@pytest.mark.parametrize("door", [DQPipeline, AutoModel])
def test_the_card_of_a_loaded_model_is_saved_with_it_and_its_pictures(place, tmp_path, door):
    door.from_pretrained(place / "joint").save_pretrained(tmp_path / "once")
    assert bytes_of(tmp_path / "once") == bytes_of(place / "joint")
    door.from_pretrained(tmp_path / "once", dtype=torch.bfloat16).save_pretrained(tmp_path / "twice")
    assert bytes_of(tmp_path / "twice") == bytes_of(place / "joint")
    model = door.from_pretrained(place / "joint").to(torch.bfloat16)  # rounded, but no other model
    model.save_pretrained(tmp_path / "rounded")
    assert bytes_of(tmp_path / "rounded") == bytes_of(place / "joint")


def test_the_card_of_a_folder_that_is_gone_by_then_is_saved_too(place, tmp_path):
    shutil.copytree(place / "joint", tmp_path / "gone")
    model = DQForImageGeneration.from_pretrained(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    model.save_pretrained(tmp_path / "new")
    assert bytes_of(tmp_path / "new") == bytes_of(place / "joint")


@pytest.mark.parametrize("name", ["vae", "transformer"])
def test_a_part_that_is_saved_alone_tells_where_it_comes_from(place, tmp_path, name):
    noun = {"vae": "tokenizer", "transformer": "generator"}[name]
    load = {"vae": DQVAEModel, "transformer": DQTransformerForImageGeneration}[name].from_pretrained
    for number, model in enumerate((load(place / "joint", subfolder=name), load(place / "joint" / name))):
        model.save_pretrained(tmp_path / f"{number}")
        header, body = read_card(tmp_path / f"{number}")
        # The same weights, so the same licence; other figures and limits than those of both.
        assert yaml.safe_load(header)["license"] == "cc-by-4.0"
        assert f"## Origin\n\nWeights and configuration are those of the {noun} of tiny, whose card says:\n\n" in body
        assert "\n\nLicence: cc-by-4.0\n\n" in body
        assert "\n> ## Limits\n>\n> Only tests." in body and "\n## Measured" not in body
        assert "![samples](origin/samples.png)" in body and body.count("\n## Citation") == 1
        assert bytes_of(tmp_path / f"{number}" / "origin", ["samples.png"]) == bytes_of(place / "joint", ALL[1:])


def test_figures_of_other_weights_are_told_as_those_of_the_origin(place, tmp_path):
    for number, change in enumerate(
        (
            lambda model: model.transformer.content_embedding.weight.data.add_(1e-3),
            lambda model: model.vae.quantizer.codebook.data[3].add_(0.1),
            lambda model: model.vae.router.set_thresholds([0.1]),
        )
    ):
        model = DQForImageGeneration.from_pretrained(place / "joint")
        change(model)
        model.save_pretrained(tmp_path / f"{number}")
        header, body = read_card(tmp_path / f"{number}")
        assert "license" not in yaml.safe_load(header) and "\n## Measured" not in body
        assert "## Origin\n\nWeights or configuration are no longer those of tiny, whose card says:" in body
        assert "![samples](origin/samples.png)" in body and body.count("> ## Limits") == 1


def test_a_tokenizer_takes_its_card_along_to_a_new_generator(place, tmp_path):
    vae = DQVAEModel.from_pretrained(place / "vae")
    DQForImageGeneration.from_models(vae, make_transformer()).save_pretrained(tmp_path)
    header, body = read_card(tmp_path)
    header = yaml.safe_load(header)
    assert header["datasets"] == ["someone/pictures"] and not {"license", "model-index"} & header.keys()
    assert "## Origin of the tokenizer\n\nWeights and configuration are those of tiny-vae, whose card says:" in body
    assert "> ## Measured\n>\n> | held out, split `test` | |" in body


def test_code_in_a_card_that_is_quoted_stays_as_it_is(place, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path / "a")
    write_model_card(tmp_path / "a", vae.config, title="a", command="# Two cores\npython train.py")
    loaded = DQVAEModel.from_pretrained(tmp_path / "a")
    loaded.quantizer.codebook.data += 1
    loaded.save_pretrained(tmp_path / "b")
    body = read_card(tmp_path / "b")[1]
    assert "> ## Training\n>\n> ```\n> # Two cores\n> python train.py\n> ```" in body


def test_a_card_of_its_owner_stays_and_one_of_ours_does_not(place, tmp_path, caplog):
    vae = make_vae()
    for owners in ("# Mine\n", "---\nlicense: mit\n---\n# Mine\n", (place / "vae" / "README.md").read_text()):
        (tmp_path / "README.md").write_text(owners.replace(MARK, ""))
        vae.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == owners.replace(MARK, "")
    shutil.copy(place / "vae" / "README.md", tmp_path)
    vae.save_pretrained(tmp_path)
    assert "24.53" not in (tmp_path / "README.md").read_text()  # nobody measured this model


def test_what_an_owner_put_into_the_header_of_an_empty_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n")  # as the Hub makes it
    make_vae().save_pretrained(tmp_path)
    header, body = read_card(tmp_path)
    header = yaml.safe_load(header)
    assert header["license"] == "mit" and header["language"] == ["en"] and header["library_name"] == "transformers"
    assert body.startswith("\n# ") and body.endswith(f"{MARK}\n")
    assert merge_with_owner("ours", "no header: [\n---\n") is None


def test_a_card_takes_along_the_pictures_that_our_cards_show_and_no_other_file(place, tmp_path):
    folder = shutil.copytree(place / "vae", tmp_path / "a" / "model")
    (tmp_path / "a" / "secret.png").write_bytes(b"secret")
    for name in ("own.png", "samples.png"):
        (folder / name).write_bytes(b"picture")
    text = f"![a](../secret.png) ![b]({tmp_path}/a/secret.png) ![c](config.json) ![d](own.png) ![samples](samples.png)"
    text += " ![reconstructions](reconstructions.png)"  # is not there
    (folder / "README.md").write_text(text)
    DQVAEModel.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == text
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "samples.png"]


HOSTILE = {
    "tags": "<img " * 200_000,
    "fences": "```x\n" * 200_000,
    "ends of headers": "\n---   " * 100_000,
    "nested flow": "---\na: " + "[" * 60_000 + "\n---\n# x",
    "nested sequences": "---\n" + "- " * 30_000 + "\n---\n# x",
    "aliases": "---\na: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9)) + "---\n# x",
    "wrong types": "---\nlicense: [mit]\ndatasets: {a: b}\n---\n# x",
    "no YAML, another encoding": "---\nlicense: [\n---\n# caf\xe9\n",
    "long": "# x\n" + "word " * 1_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_card_costs_is_bounded_and_linear(place, tmp_path, kind):
    folder = shutil.copytree(place / "vae", tmp_path / "model")
    (folder / "README.md").write_bytes(HOSTILE[kind].encode("latin-1"))
    started = time.process_time()
    vae = DQVAEModel.from_pretrained(folder)
    vae.save_pretrained(tmp_path / "same")
    vae.quantizer.codebook.data += 1
    vae.save_pretrained(tmp_path / "other")
    assert time.process_time() - started < 10
    for name in ("same", "other"):
        assert (tmp_path / name / "README.md").stat().st_size < 2**21 + 10_000
    header, body = read_card(tmp_path / "other")
    assert "no longer those of" in body and not {"license", "datasets"} & yaml.safe_load(header).keys()


def test_an_owners_header_that_is_hostile_stays_with_its_card(tmp_path):
    for header in ("- " * 30_000, "a: &a [x]\nb: *a", "x" * 100_000):
        assert merge_with_owner("ours", f"---\n{header}\n---\n") is None


PIECES = [
    "---\n",
    "---",
    "\r\n",
    "\n",
    "a: ",
    "license: mit",
    "- ",
    "[",
    "{",
    "&a ",
    "*a",
    "!!python/name:os.system",
    "2001-99-99",
]
PIECES += [
    "# ",
    "```",
    "<img ",
    "![](samples.png)",
    "](",
    "\x00",
    "\ud800",
    MARK,
    "0x",
    "? ",
    "<<: *a",
    "!!int ''",
    "1e999",
    "é",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join))
def test_any_text_is_a_card(text):
    header, body = split_card(text)
    assert isinstance(header, dict) and text.endswith(body)
    merged = merge_with_owner("---\nlicense: mit\n---\nours", text)
    assert merged is None or merged.endswith("ours")
    assert len(SourceCard(text, {}, None, "", {}).title) <= 200
