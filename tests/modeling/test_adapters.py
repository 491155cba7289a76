"""Adapters of peft learn, are saved, loaded and merged; the codebook and the base weights stay."""

import pytest
import torch
from conftest import make_transformer, make_vae
from peft import LoraConfig, PeftModel, get_peft_model

from dq_hf import DQForImageGeneration, DQPipeline, DQTransformerForImageGeneration

LORA = dict(r=4, target_modules=["q_proj", "v_proj", "fc1"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1


@pytest.fixture(scope="module")
def codes(tiny_vae, images):
    """Codes, grain map and labels."""
    with torch.no_grad():
        encoded = tiny_vae.encode(images)
    return encoded.codes, encoded.grain_map, torch.tensor([0, 2])


@pytest.fixture(scope="module")
def folder(tiny_transformer_class, tmp_path_factory):
    place = tmp_path_factory.mktemp("transformer")
    tiny_transformer_class.save_pretrained(place)
    return place


@pytest.fixture
def base(folder):
    return DQTransformerForImageGeneration.from_pretrained(folder)


def sample(model):
    return model.generate([0, 1, 2], generator=seeded(), guidance_scale=2.0).codes


def train(model, *batch):
    """Two steps; the losses."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    losses = []
    for _ in range(2):
        loss = model.train()(*batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture
def adapted(base, codes):
    """Trained for two steps."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**LORA))
    train(model, *codes)
    return model


def test_only_the_adapter_learns(base, folder, codes):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**LORA))
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, *codes)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, untrained[name])}
    assert changed and all("lora_" in name for name in changed)
    assert {name.split(".")[-4] for name in changed} == set(LORA["target_modules"])
    after = model.unload().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_saved_adapter_loads_onto_the_base_and_samples_the_same(adapted, base, folder, tmp_path):
    codes = sample(adapted)
    with adapted.disable_adapter():
        assert not torch.equal(sample(adapted), codes)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size / 3
    loaded = PeftModel.from_pretrained(DQTransformerForImageGeneration.from_pretrained(folder), tmp_path)
    assert torch.equal(sample(loaded), codes)
    of_transformers = DQTransformerForImageGeneration.from_pretrained(folder)
    of_transformers.load_adapter(tmp_path)
    assert torch.equal(sample(of_transformers), codes)


def test_a_merged_adapter_is_a_plain_model_that_samples_the_same(adapted, tiny_vae, tmp_path):
    codes = sample(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is DQTransformerForImageGeneration
    assert torch.equal(sample(merged), codes)
    DQForImageGeneration.from_models(tiny_vae, merged).save_pretrained(tmp_path)
    pipe = DQPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[0, 1, 2], generator=seeded(), guidance_scale=2.0)
    assert torch.equal(drawn.codes, codes)


def test_a_pipeline_samples_with_an_adapter_but_is_not_saved_with_it(adapted, tiny_vae, tmp_path):
    pipe = DQPipeline(vae=tiny_vae, transformer=adapted)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[0, 1, 2], generator=seeded(), guidance_scale=2.0)
    assert torch.equal(drawn.codes, sample(adapted))
    with pytest.raises(ValueError, match="the transformer has an adapter: merge it first"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("targets", [r"decoder\..*(conv1|conv2|to_q|to_v)", r"encoder\..*conv.*|quant_conv"])
def test_an_adapter_of_the_tokenizer_leaves_the_codebook_where_it_is(images, tmp_path, targets):
    model = get_peft_model(make_vae(), LoraConfig(r=2, target_modules=targets))
    before = {name: value.clone() for name, value in model.quantizer.state_dict().items()}
    untrained = model(images).sample.detach()
    train(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.quantizer.state_dict().items())
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


def test_training_an_adapter_of_the_generator_leaves_the_tokenizer_alone(images):
    model = DQForImageGeneration.from_models(make_vae(), make_transformer(num_classes=3))
    model.transformer = get_peft_model(model.transformer, LoraConfig(**LORA))
    before = {name: value.clone() for name, value in model.vae.state_dict().items()}
    losses = train(model, images, torch.tensor([0, 2]))
    assert losses[1] != losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.vae.state_dict().items())
