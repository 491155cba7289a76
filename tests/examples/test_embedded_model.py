"""The model that the package carries: small, complete, offline, and as good as its card says."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import dq_hf
from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQPipeline, DQVAEModel

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "examples" / "data" / "emoji" / "data" / "test-00000-of-00001.parquet"
# Prompts, and the channels of RGB that their pictures have more of than of the others.
PROMPTS = {"red heart, flat style": [0], "grinning face, 3d style": [0, 1], "keycap: 4, 3d style": [2]}
NOTICES = (
    "license: cc-by-4.0",
    "Noto Emoji",
    "Apache License 2.0",
    "Twemoji",
    "CC-BY 4.0",
    "Fluent Emoji",
    "MIT licence",
)
MAX_BYTES = 20e6
MIN_PSNR = 27.5  # dB, mean over the held-out emoji
CODES = (120, 150)  # an image, mean over the same


@pytest.fixture(scope="module")
def model():
    return DQForImageGeneration.from_pretrained(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def figures(model):
    """PSNR in dB and codes of every held-out emoji, two arrays."""
    rows = pyarrow.parquet.read_table(HELD_OUT).column("image").to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows])
    originals = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    psnrs, codes = [], []
    for batch in originals.split(32):
        with torch.no_grad():
            encoded = model.vae.encode(batch.float())
            decoded = model.vae.decode_codes(encoded.codes).sample.double().clamp(-1, 1)
        psnrs += (10 * torch.log10(4 / (decoded - batch).square().mean(dim=(1, 2, 3)))).tolist()
        codes += (64 + 3 * encoded.grain_map.sum(dim=(1, 2))).tolist()  # a fine region has four codes
    return np.array(psnrs), np.array(codes)


def test_it_is_small_and_complete():
    files = [path for path in Path(DEFAULT_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    names = {str(path.relative_to(DEFAULT_MODEL)) for path in files}
    assert {
        "README.md",
        "config.json",
        "model_index.json",
        "preprocessor_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
    } <= names


def test_its_files_name_no_place_on_a_disk():
    for path in Path(DEFAULT_MODEL).rglob("*.json"):
        assert not re.search(r'"(_name_or_path|/[^"]*|[A-Z]:\\[^"]*)"', path.read_text()), path


def test_its_weights_are_stored_in_bfloat16_and_computed_in_float32(model):
    for part in ("vae", "transformer", "text_encoder"):
        assert json.loads(Path(DEFAULT_MODEL, part, "config.json").read_text())["dtype"] == "float32"
        for key, value in load_file(Path(DEFAULT_MODEL, part, "model.safetensors")).items():
            assert value.dtype == (torch.float32 if key.startswith("quantizer.") else torch.bfloat16), key
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_it_is_what_the_documentation_says(model):
    vae, transformer = model.vae.config, model.transformer.config
    assert vae.image_height_width == (64, 64) and vae.granularities == [8, 4] and vae.router == "gain"
    assert vae.codebook_size == transformer.codebook_size == 1024
    assert transformer.text_length == 12 and transformer.num_classes == 0 and not model.config.id2label


@pytest.fixture(scope="module")
def generated(model):
    """Four images of each prompt."""
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    return model.generate(prompt=prompts, generator=torch.Generator().manual_seed(0))


def test_its_samples_are_images(generated):
    assert generated.pixel_values.shape == (12, 3, 64, 64)
    outside = (generated.pixel_values.abs() - 1).clamp(min=0)
    assert outside.mean() < 0.02
    assert generated.pixel_values.flatten(1).std(dim=1).min() > 0.1  # none is plain
    assert generated.grain_map.float().mean(dim=(1, 2)).min() > 0  # detail somewhere in each
    assert len({str(codes) for codes in generated.codes.tolist()}) == 12


def test_a_prompt_decides_the_colour(generated):
    for prompt, colours in zip(PROMPTS, generated.pixel_values.mean((2, 3)).split(4)):
        channels = PROMPTS[prompt]
        others = [channel for channel in range(3) if channel not in channels]
        assert colours[:, channels].mean(0).min() > colours[:, others].mean(0).max() + 0.15, prompt  # mouths are pink


@pytest.mark.parametrize("prompt", ["a red heart", "A red heart", "the red heart", " a  red heart"])
def test_an_article_says_nothing(model, prompt):
    read = model.tokenizer
    assert (
        read(prompt)["input_ids"] == read("red heart")["input_ids"]
        and read("an apple")["input_ids"] == read("apple")["input_ids"]
    )
    assert read("A button (blood type)")["input_ids"] != read("button (blood type)")["input_ids"]


def test_the_task_and_the_pipeline_use_it_by_default():
    result = pipeline("dq-generation")("red heart, flat style", seed=0)
    pipe = DQPipeline.from_pretrained(DEFAULT_MODEL)
    output = pipe("red heart, flat style", generator=torch.Generator().manual_seed(0))
    assert torch.equal(output.codes[0], result["codes"]) and result["prompt"] == "red heart, flat style"
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(result["image"]))


def test_it_reconstructs_held_out_emoji(figures):
    psnrs, codes = figures
    assert psnrs.mean() > MIN_PSNR
    assert CODES[0] < codes.mean() < CODES[1]


def test_its_card_states_what_is_measured_here(figures):
    card = Path(DEFAULT_MODEL, "README.md").read_text()
    psnrs, codes = figures
    num_images = int(re.search(r"(\d+) of held-out concepts \(`test`\)", card)[1])
    psnr = float(re.search(r"^\| PSNR of the reconstructions.*\| ([\d.]+) dB \|$", card, re.M)[1])
    num_codes = float(re.search(r"^\| codes an image.*\| ([\d.]+) \|$", card, re.M)[1])
    bits = float(re.search(r"^\| code bits an image.*\| ([\d.]+) bits \|$", card, re.M)[1])
    assert num_images == len(psnrs)
    assert psnr == pytest.approx(psnrs.mean(), abs=0.05)
    assert num_codes == pytest.approx(codes.mean(), abs=0.05)
    assert bits == pytest.approx(codes.mean() * 10, abs=0.5)  # 1,024 codes


def test_its_card_names_data_and_notices():
    card = Path(DEFAULT_MODEL, "README.md").read_text()
    assert [text for text in NOTICES if text not in card] == []


def test_its_notices_go_along_where_it_is_saved(tmp_path):
    names = ["README.md", "samples.png", "reconstructions.png"]
    DQPipeline.from_pretrained(DEFAULT_MODEL).save_pretrained(tmp_path / "whole")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == Path(DEFAULT_MODEL, name).read_bytes()
    DQVAEModel.from_pretrained(DEFAULT_MODEL, subfolder="vae").save_pretrained(tmp_path / "part")
    card = (tmp_path / "part" / "README.md").read_text()
    assert [text for text in NOTICES if text not in card] == []


def test_an_image_of_a_batch_is_the_image_alone_to_the_last_bit():
    generate, prompts = pipeline("dq-generation"), [*PROMPTS, "", "a snail"]
    together = generate(prompts, seed=[0, 1, 2, 3, 4], batch_size=5)
    in_pairs = generate(prompts, seed=[0, 1, 2, 3, 4], batch_size=2)
    alone = [generate(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    for images in (in_pairs, alone):
        for one, other in zip(together, images, strict=True):
            assert torch.equal(one["codes"], other["codes"])
            assert one["image"].tobytes() == other["image"].tobytes()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel of this repository installs."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", place / "src", ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (place / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def test_the_wheel_carries_it_whole(installed):
    ours, theirs = Path(DEFAULT_MODEL), installed / "dq_hf" / "assets" / "dq-emoji"
    names = sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file())
    assert names and sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()) == names
    assert all((theirs / name).read_bytes() == (ours / name).read_bytes() for name in names)


def test_the_wheel_works_offline_from_an_empty_folder(installed, tmp_path):
    code = """
import dq_hf
from transformers import pipeline
pipeline("dq-generation")("pizza, 3d style", seed=0)["image"].save("pizza.png")
print(dq_hf.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(installed / "dq_hf" / "__init__.py") != dq_hf.__file__
    expected = pipeline("dq-generation")("pizza, 3d style", seed=0)["image"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "empty" / "pizza.png")), np.asarray(expected))


@pytest.mark.parametrize(
    "text, message",
    [
        (TEXT, "vae must give the codes that the generator of .*run learned, got other ones"),
        ({}, "--model must hold a text encoder and its tokenizer, and .*run does not"),
    ],
)
def test_it_is_not_built_of_what_does_not_fit(tiny_vae, tmp_path, monkeypatch, text, message):
    build = runpy.run_path(str(ROOT / "examples" / "build_embedded_model.py"))["main"]
    reader = (make_text_encoder("bert"), make_text_tokenizer()) if text else ()
    DQForImageGeneration.from_models(tiny_vae, make_transformer(**text), *reader).save_pretrained(tmp_path / "run")
    other = make_vae()
    other.quantizer.codebook += 1
    other.save_pretrained(tmp_path / "vae")
    (tmp_path / "prompts.txt").write_text("a red heart\n")
    options = {"model": "run", "vae": "vae", "output_dir": "built", "prompts": "prompts.txt"}
    arguments = [word for name, place in options.items() for word in (f"--{name}", str(tmp_path / place))]
    monkeypatch.setattr(sys, "argv", ["build", *arguments])
    with pytest.raises(ValueError, match=message):
        build()
    assert not (tmp_path / "built").exists()
