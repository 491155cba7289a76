"""Weights in int8 by torchao load, sample, are saved and load again; the benchmark of precisions measures what it says."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_transformer, make_vae
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from dq_hf import DQForImageGeneration, DQPipeline, DQTransformerForImageGeneration

INT8 = TorchAoConfig(Int8WeightOnlyConfig())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return DQForImageGeneration.from_models(make_vae(), make_transformer(num_classes=3))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    return place


def weights_of(model):
    return {name: value for name, value in model.named_parameters() if name.endswith("proj.weight")}


def test_int8_weights_are_within_half_a_step_of_their_rows_scale(folder, model):
    loaded = DQForImageGeneration.from_pretrained(folder, quantization_config=INT8)
    before, after = weights_of(model.transformer), weights_of(loaded.transformer)
    assert len(before) == 16  # q, k, v and output of two layers in each of two stacks
    for name, value in before.items():
        step = value.abs().amax(1, keepdim=True) / 127
        error = (after[name].dequantize() - value).abs()
        assert 0 < error.max() and (error < 0.51 * step).all(), name
    vae, untouched = loaded.vae.state_dict(), model.vae.state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in vae.items())


def test_an_int8_model_samples_is_saved_in_int8_and_loads_again_by_every_door(folder, model, tmp_path):
    generator = DQTransformerForImageGeneration.from_pretrained(
        folder, subfolder="transformer", quantization_config=INT8
    )
    generated = generator.generate([0, 1, 2], generator=seeded())
    codes, _ = generator.unpack(generated.contents, generated.positions, generated.lengths)
    assert torch.equal(codes, generated.codes)
    DQForImageGeneration.from_models(model.vae, generator).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "transformer" / "model.safetensors").values()
    linear = [module for module in model.transformer.modules() if isinstance(module, torch.nn.Linear)]
    rows = [
        (layer.out_features, layer.in_features) for layer in linear[:-1]
    ]  # transformers leaves the last one as it is
    quantised = sum(count * (width + 1) for count, width in rows)  # a row has a zero point, too
    assert sum(value.numel() for value in stored if value.dtype == torch.int8) == quantised
    pipe = DQPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(class_labels=[0, 1, 2], generator=seeded()).codes, codes)
    again = DQForImageGeneration.from_pretrained(tmp_path).generate([0, 1, 2], generator=seeded())
    assert torch.equal(again.codes, codes)


def test_damaged_weights_are_refused_when_they_are_quantised(folder, tmp_path):
    generator = DQTransformerForImageGeneration.from_pretrained(folder, subfolder="transformer")
    generator.save_pretrained(tmp_path)
    path, key = tmp_path / "model.safetensors", "content_transformer.layers.1.attention.q_proj.weight"
    weights = load_file(path)
    weights[key][2, 3] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"weights are not finite: {key}"):
        DQTransformerForImageGeneration.from_pretrained(tmp_path, quantization_config=INT8)


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import precision

    return precision


@pytest.fixture
def data(tmp_path):
    """A folder with five small images of three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": list(pixels), "label": [0, 1, 2, 0, 1]}, features=features)
    dataset.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    return tmp_path / "data"


def test_the_benchmark_has_a_row_for_each_precision(benchmark, folder, data, tmp_path, capsys):
    output = tmp_path / "precision.md"
    arguments = dict(model=str(folder), data=str(data), num_images=4, samples_per_class=1, batch_size=2)
    benchmark.main(benchmark.Arguments(**arguments, output=str(output)))
    text = output.read_text()
    assert "4 held-out images, 3 samples, seed 0" in text and "| int8 weights |" in capsys.readouterr().out
    rows = {
        name: cells for name, *cells in (re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\| \w.*", text, re.M))
    }
    assert list(rows) == ["float32", "bfloat16", "float16", "int8 weights"]
    assert rows["float32"][1] == "100.00%" and rows["float32"][4:] == ["+0.0000", "100%", "100%"]
    assert rows["int8 weights"][1] == "100.00%"  # the tokenizer is the same


@torch.no_grad()
def test_nats_a_code_are_those_of_each_image_alone(benchmark, model):
    images = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    labels = torch.tensor([0, 2])
    grain_map = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).long()  # 16 codes, and 64
    encoded = model.vae.encode(images, grain_map=grain_map)
    got = benchmark.nats_per_code(model.transformer, [{"class_labels": labels}], [encoded])
    nats = 0.0
    for image, coarse, fine in ((0, 17, 2), (1, 1, 66)):  # positions to predict: codes, ends, the fine start
        output = model.transformer(encoded.codes[[image]], grain_map[[image]], labels[[image]])
        nats += output.content_loss * (coarse + fine) + output.coarse_position_loss * coarse
        nats += output.fine_position_loss * fine
    assert got == pytest.approx(nats.item() / 80, rel=1e-5)


def test_samples_are_compared_up_to_their_first_difference(benchmark, model):
    reference = model.transformer.generate([0, 1], generator=seeded())
    changed = model.transformer.generate([0, 1], generator=seeded())
    assert benchmark.compare_samples(changed, reference) == {"same_samples": 1.0, "before_first_difference": 1.0}
    changed.contents[1, 5] += 1
    changed.codes[1, 0, 0] += 1
    shares = benchmark.compare_samples(changed, reference)
    assert shares["same_samples"] == 0.5
    assert shares["before_first_difference"] == pytest.approx((1 + 5 / int(reference.lengths[1])) / 2)
