"""A codebook that is split, and a generator that takes its codes over."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXT, make_transformer, make_vae
from PIL import Image

from dq_hf import DQForImageGeneration, DQTransformerForImageGeneration, DQVAEModel


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import adopt_codes
    import split_codebook

    return {"split_codebook": split_codebook, "adopt_codes": adopt_codes}


@pytest.fixture(scope="module")
def models():
    """Tokenizer and class generator, in evaluation mode."""
    vae = make_vae()
    return vae, make_transformer(num_classes=2, class_dropout=0.1)


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_a_split_code_lies_between_its_two(scripts, models):
    old, new = models[0].quantizer, scripts["split_codebook"].split(models[0]).quantizer
    first, second = new.codebook.chunk(2)
    torch.testing.assert_close((first + second) / 2, old.codebook)
    nearest = torch.cdist(old.codebook, old.codebook).fill_diagonal_(torch.inf).amin(1)
    torch.testing.assert_close((first - second).norm(dim=1), nearest / 2)
    torch.testing.assert_close(new.cluster_size.view(2, -1).sum(0), old.cluster_size)
    torch.testing.assert_close(new.embed_sum, new.codebook * new.cluster_size[:, None])
    for name, weight in models[0].named_parameters():
        assert weight.equal(dict(scripts["split_codebook"].split(models[0]).named_parameters())[name])


def test_a_generator_of_split_codes_says_what_the_old_one_said(scripts, models):
    vae, generator = models[0], make_transformer()
    num_codes = vae.config.codebook_size
    adopted = scripts["adopt_codes"].adopt(generator, torch.eye(num_codes).repeat(2, 1) * 1e9).eval()
    torch.manual_seed(0)
    grain_map = torch.randint(2, (2, *vae.config.grid_sizes[0]))
    codes = torch.randint(num_codes, grain_map.shape)
    codes = codes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        old, new = generator(codes, grain_map), adopted(codes + num_codes, grain_map)
    torch.testing.assert_close(new.position_logits, old.position_logits)
    for half in new.content_logits[..., :-3].chunk(2, dim=-1):
        torch.testing.assert_close(half, old.content_logits[..., :-3])


def test_without_classes_a_stream_starts_like_that_of_the_hidden_class(scripts, models):
    adopted = scripts["adopt_codes"].adopt(models[1], torch.eye(16))
    for name in ("content_embedding", "position_embeddings.0", "position_embeddings.1"):
        old, new = models[1].get_submodule(name).weight, adopted.get_submodule(name).weight
        assert new[-1].equal(old[-1]) and len(new) == len(old) - 2


def test_the_text_prefix_is_a_new_one(scripts):
    generator = make_transformer(**TEXT)
    changes = dict(text_length=TEXT["text_length"], text_hidden_size=TEXT["text_hidden_size"])
    adopted = scripts["adopt_codes"].adopt(generator, torch.eye(16), **changes)
    assert not adopted.text_prefix.projection.weight.equal(generator.text_prefix.projection.weight)
    assert adopted.text_prefix.projection.weight.shape == generator.text_prefix.projection.weight.shape
    changes["text_hidden_size"] = 24  # of another text encoder
    assert scripts["adopt_codes"].adopt(generator, torch.eye(16), **changes).config.text_hidden_size == 24


def test_both_from_the_command_line(scripts, models, monkeypatch, tmp_path):
    DQForImageGeneration.from_models(*models).save_pretrained(tmp_path / "model")
    for i in range(3):
        Image.new("RGB", (models[0].config.image_size,) * 2, (80 * i, 40, 0)).save(tmp_path / f"{i}.png")
    run(scripts["split_codebook"], monkeypatch, "--vae", tmp_path / "model", "--output_dir", tmp_path / "split")
    assert DQVAEModel.from_pretrained(tmp_path / "split").config.codebook_size == 2 * models[0].config.codebook_size
    options = ("--model", tmp_path / "model", "--vae", tmp_path / "split", "--data", tmp_path, "--text_length", 4)
    run(scripts["adopt_codes"], monkeypatch, *options, "--output_dir", tmp_path / "adopted")
    adopted = DQTransformerForImageGeneration.from_pretrained(tmp_path / "adopted")
    assert (adopted.config.text_length, adopted.config.num_classes) == (4, 0)
    assert adopted.config.codebook_size == 2 * models[0].config.codebook_size
