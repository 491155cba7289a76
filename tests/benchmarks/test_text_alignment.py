import pytest
import text_alignment
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from datasets import ClassLabel, Dataset

from dq_hf import DQForImageGeneration, DQPipeline
from dq_hf.networks.extractors import FeatureExtractor


def test_lab_of_known_colours():
    # IEC 61966-2-1 and CIE 15 for D65, as published tables have them, to a tenth.
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255], [119, 119, 119]], dtype=torch.uint8)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [50.03, 0, 0]]
    assert torch.allclose(text_alignment.lab(colours), torch.tensor(expected, dtype=torch.double), atol=0.1)


def test_main_colour_is_that_of_most_pixels_that_are_not_white():
    images = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    images[0, :, :3] = torch.tensor([200, 30, 40])[:, None, None]
    images[0, :, 3] = torch.tensor([60, 140, 225])[:, None]
    images[1, :, :2, :2] = torch.tensor([40, 90, 30])[:, None, None]  # a dark green
    assert text_alignment.main_colours(images) == ["red", "green", "white"]


class MeanColour(FeatureExtractor):
    frechet_distance_name, suffix = "FD-colour", "colour"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.freeze("mean colour")

    def features(self, images):
        return self.scale * images.mean((2, 3))


@pytest.fixture
def gallery():
    """Two reds, two greens, a blue, by their mean colour."""
    gallery = text_alignment.Gallery.__new__(text_alignment.Gallery)
    colours = torch.tensor([[250, 0, 0], [200, 10, 0], [0, 250, 0], [0, 200, 10], [0, 0, 250]])
    images = colours.to(torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)
    gallery.concepts = ["red", "red", "green", "green", "blue"]
    gallery.extractor = MeanColour()
    raw = gallery.raw_features(images)
    gallery.mean, gallery.std = raw.mean(0), raw.std(0)
    gallery.features = gallery.standardised(raw)
    gallery.images = lambda rows: images[list(rows)]
    gallery.ranges = {"train": range(5)}
    gallery.rows = Dataset.from_dict(
        {"captions": [["a"], ["b"], ["c"], ["d"], ["e"]], "style": [0, 1, 0, 1, 0]}
    ).cast_column("style", ClassLabel(names=["flat", "3d"]))
    return gallery


def test_pictures_find_the_other_styles_of_their_concept_but_not_themselves(gallery, monkeypatch):
    images = gallery.images(range(5))
    monkeypatch.setattr(text_alignment, "RANKS", (1, 3))
    assert gallery.recalls(images, list(range(5))) == [0.8, 0.8]  # blue has no second picture
    assert gallery.recalls(images[[0]], [0], ["green"]) == [0.0, 1.0]  # red, then the greens
    rows, prompts = gallery.prompts("train", 9, seed=0)
    assert sorted(zip(rows, prompts)) == list(
        enumerate(["a, flat style", "b, 3d style", "c, flat style", "d, 3d style"])
    )


def test_the_sweep_has_a_row_for_each_setting(gallery, monkeypatch):
    monkeypatch.setattr(text_alignment, "GUIDANCE", (1.0, 3.0))
    monkeypatch.setattr(text_alignment, "RANKS", (1, 3))
    text = make_text_encoder(), make_text_tokenizer()
    pipe = DQPipeline(make_vae(), make_transformer(**TEXT), *text)
    pipe.set_progress_bar_config(disable=True)
    table = text_alignment.sweep(text_alignment.Arguments(prompts=4), pipe, gallery).split("\n\n")[1].splitlines()
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if "---" not in line]
    assert [row[:3] for row in rows[:3]] == [["1", "0.6", "0.9"], ["1", "0.6", "1"], ["1", "0.7", "0.9"]]
    assert len(rows) == 16
    for row in rows:
        figures = dict(zip(names, map(float, row)))
        assert figures["FD"] > 0 and all(0 <= figures[name] <= 1 for name in ("precision", "recall", "R@1", "R@10"))


def test_a_class_model_is_refused(tiny_vae, tiny_transformer_class, tmp_path):
    DQForImageGeneration.from_models(tiny_vae, tiny_transformer_class).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not trained with text"):
        text_alignment.main(text_alignment.Arguments(model=str(tmp_path)))
