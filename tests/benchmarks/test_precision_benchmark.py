"""Weights in int8 by torchao load, sample, are saved and load again; the benchmark of precisions measures what it says."""

import math
import re

import numpy as np
import precision
import pytest
import torch
from conftest import TEXT, edit_weights, make_text_encoder, make_text_tokenizer, make_transformer, make_vae, seeded
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from dq_hf import DQForImageGeneration, DQPipeline, DQTransformerForImageGeneration

INT8 = TorchAoConfig(Int8WeightOnlyConfig())
KEY = "content_transformer.layers.1.attention.q_proj.weight"


@pytest.fixture(scope="module")
def model():
    return DQForImageGeneration.from_models(make_vae(), make_transformer(num_classes=3))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    return place


def test_int8_weights_are_within_half_a_step_of_their_rows_scale(folder, model):
    loaded = DQForImageGeneration.from_pretrained(folder, quantization_config=INT8)
    after = dict(loaded.transformer.named_parameters())
    for name, value in model.transformer.named_parameters():
        if not name.endswith("proj.weight"):
            continue
        step = value.abs().amax(1, keepdim=True) / 127
        error = (after[name].dequantize() - value).abs()
        assert 0 < error.max() and (error < 0.51 * step).all(), name
    vae, untouched = loaded.vae.state_dict(), model.vae.state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in vae.items())


def test_an_int8_model_samples_is_saved_in_int8_and_loads_again_by_every_door(model, tmp_path):
    folder = tmp_path / "float"
    model.save_pretrained(folder)
    generator = DQTransformerForImageGeneration.from_pretrained(
        folder, subfolder="transformer", quantization_config=INT8
    )
    generated = generator.generate([0, 1, 2], generator=seeded())
    codes, _ = generator.unpack(generated.contents, generated.positions, generated.lengths)
    assert torch.equal(codes, generated.codes)
    DQForImageGeneration.from_models(model.vae, generator).save_pretrained(tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "transformer" / "model.safetensors").values()
    linear = [module for module in model.transformer.modules() if isinstance(module, torch.nn.Linear)]
    rows = [
        (layer.out_features, layer.in_features) for layer in linear[:-1]
    ]  # transformers leaves the last one as it is
    quantised = sum(count * (width + 1) for count, width in rows)  # a row has a zero point, too
    assert sum(value.numel() for value in stored if value.dtype == torch.int8) == quantised
    pipe = DQPipeline.from_pretrained(tmp_path / "int8")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(class_labels=[0, 1, 2], generator=seeded()).codes, codes)
    again = DQForImageGeneration.from_pretrained(tmp_path / "int8").generate([0, 1, 2], generator=seeded())
    assert torch.equal(again.codes, codes)
    edit_weights(folder / "transformer" / "model.safetensors", lambda weights: weights[KEY][2].fill_(math.nan))
    with pytest.raises(ValueError, match=f"weights are not finite: {KEY}"):
        DQForImageGeneration.from_pretrained(folder, quantization_config=INT8)


@pytest.fixture
def data(tmp_path):
    """A folder with five small images and their captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    features = Features({"image": Image(), "text": Value("string")})
    captions = ["red heart", "blue heart", "sun", "a sun", "heart"]
    dataset = Dataset.from_dict({"image": list(pixels), "text": captions}, features=features)
    dataset.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    return tmp_path / "data"


def test_the_benchmark_has_a_row_for_each_precision(data, tmp_path, capsys):
    parts = make_vae(), make_transformer(**TEXT), make_text_encoder(), make_text_tokenizer()
    DQForImageGeneration.from_models(*parts).save_pretrained(tmp_path / "text")
    output, prompts = tmp_path / "precision.md", tmp_path / "prompts.txt"
    prompts.write_text("a red heart\nsun\nblue\n")
    images = dict(data=str(data), caption_column="text", num_images=4, batch_size=2)
    samples = dict(prompts=str(prompts), samples_per_prompt=1)
    precision.main(precision.Arguments(str(tmp_path / "text"), **images, **samples, output=str(output)))
    text = output.read_text()
    assert "4 held-out images, 3 samples, seed 0" in text and "| int8 weights |" in capsys.readouterr().out
    rows = {
        name: cells for name, *cells in (re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\| \w.*", text, re.M))
    }
    assert list(rows) == ["float32", "bfloat16", "float16", "int8 weights"]
    assert rows["float32"][1] == "100.00%" and rows["float32"][4:] == ["+0.0000", "100%", "100%"]
    assert rows["int8 weights"][1] == "100.00%"  # the tokenizer is the same


def test_samples_are_compared_up_to_their_first_difference(model):
    reference = model.transformer.generate([0, 1], generator=seeded())
    changed = model.transformer.generate([0, 1], generator=seeded())
    assert precision.compare_samples(changed, reference) == {"same_samples": 1.0, "before_first_difference": 1.0}
    changed.contents[1, 5] += 1
    changed.codes[1, 0, 0] += 1
    shares = precision.compare_samples(changed, reference)
    assert shares["same_samples"] == 0.5
    assert shares["before_first_difference"] == pytest.approx((1 + 5 / int(reference.lengths[1])) / 2)
