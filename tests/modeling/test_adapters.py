"""Adapters of peft learn, are saved, loaded and merged; the codebook and the base weights stay."""

import copy

import pytest
import torch
from conftest import make_vae, seeded
from peft import LoraConfig, PeftModel, get_peft_model

from dq_hf import DQForImageGeneration, DQPipeline, DQTransformerForImageGeneration

LORA = dict(r=4, target_modules=["q_proj", "v_proj", "fc1"])


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1


@pytest.fixture(scope="module")
def codes(tiny_vae, images):
    """Codes, grain map and labels."""
    with torch.no_grad():
        encoded = tiny_vae.encode(images)
    return encoded.codes, encoded.grain_map, torch.tensor([0, 2])


def sample(model):
    return model.generate([0, 1, 2], generator=seeded(), guidance_scale=2.0).codes


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_values(model, expected):
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def train(model, *batch):
    """Two steps; the losses."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    losses = []
    for _ in range(2):
        losses.append(model.train()(*batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@pytest.fixture
def base(tiny_transformer_class):
    return copy.deepcopy(tiny_transformer_class)


@pytest.fixture
def adapted(base, codes):
    """Trained for two steps, in which only the adapter learns."""
    before = values_of(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**LORA))
    untrained = values_of(model)
    train(model, *codes)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, untrained[name])}
    assert changed and all("lora_" in name for name in changed)
    assert {name.split(".")[-4] for name in changed} == set(LORA["target_modules"])
    assert_same_values(copy.deepcopy(model).unload(), before)
    return model


def test_a_saved_adapter_loads_onto_the_base_and_samples_the_same(adapted, tiny_transformer_class, tmp_path):
    codes = sample(adapted)
    with adapted.disable_adapter():
        assert torch.equal(sample(adapted), sample(tiny_transformer_class)) and not torch.equal(sample(adapted), codes)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_transformer_class), tmp_path)
    assert torch.equal(sample(loaded), codes)
    of_transformers = copy.deepcopy(tiny_transformer_class)
    of_transformers.load_adapter(tmp_path)
    assert torch.equal(sample(of_transformers), codes)


def test_a_pipeline_samples_with_an_adapter_and_is_saved_when_it_is_merged(adapted, tiny_vae, tmp_path):
    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(class_labels=[0, 1, 2], generator=seeded(), guidance_scale=2.0).codes

    codes, pipe = sample(adapted), DQPipeline(vae=tiny_vae, transformer=adapted)
    assert torch.equal(draw(pipe), codes)
    with pytest.raises(ValueError, match="the transformer has an adapter: merge it first"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merged = adapted.merge_and_unload()
    assert type(merged) is DQTransformerForImageGeneration
    DQForImageGeneration.from_models(tiny_vae, merged).save_pretrained(tmp_path / "model")
    assert torch.equal(draw(DQPipeline.from_pretrained(tmp_path / "model")), codes)


@pytest.mark.parametrize("targets", [r"decoder\..*(conv1|conv2|to_q|to_v)", r"encoder\..*conv.*|quant_conv"])
def test_an_adapter_of_the_tokenizer_leaves_the_codebook_where_it_is(images, tmp_path, targets):
    model = get_peft_model(make_vae(), LoraConfig(r=2, target_modules=targets))
    before = values_of(model.quantizer)
    untrained = model(images).sample.detach()
    train(model, images)
    assert_same_values(model.quantizer, before)
    trained = model(images).sample.detach()
    assert not torch.allclose(trained, untrained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vae(), tmp_path).eval()
    torch.testing.assert_close(loaded(images).sample, trained)


def test_a_codebook_learns_again_with_its_encoder(images):
    vae = make_vae().train()
    before = vae.quantizer.codebook.clone()
    vae.requires_grad_(False)
    vae.encode(images)
    assert torch.equal(vae.quantizer.codebook, before)
    vae.requires_grad_(True)
    vae.encode(images)
    assert not torch.equal(vae.quantizer.codebook, before)
