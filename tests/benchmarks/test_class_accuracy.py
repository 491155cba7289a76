"""The benchmark of class accuracy: its classifier and its shares, and a whole run on a small model."""

import class_accuracy
import datasets
import numpy as np
import pytest
import torch
from conftest import make_transformer, make_vae
from PIL import Image
from scipy.optimize import minimize

from dq_hf import DQForImageGeneration

NAMES = ["sun", "moon", "star"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of three classes, and images of three greys, which a data set numbers in another order."""
    place = tmp_path_factory.mktemp("accuracy")
    transformer = make_transformer(num_classes=3, id2label=dict(enumerate(NAMES)))
    DQForImageGeneration.from_models(make_vae(), transformer).save_pretrained(place / "model")
    names = sorted(NAMES)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (place / "images").mkdir()
    for split, count in (("train", 30), ("test", 6)):
        labels = [i % 3 for i in range(count)]
        images = [Image.fromarray(np.full((16, 16, 3), 110 * label + i, np.uint8)) for i, label in enumerate(labels)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
        rows.to_parquet(place / "images" / f"{split}-00000-of-00001.parquet")
    return place


def test_the_classifier_is_logistic_regression():
    source = np.random.default_rng(0)
    labels = source.integers(3, size=60)
    features = source.normal(size=(60, 2)) + 1.5 * np.eye(3, 2)[labels]
    others = source.normal(size=(200, 2)) * 2

    def scale(values):
        return (values - features.mean(0)) / (features.std(0, ddof=1) + 1e-6)

    def loss(parameters):
        weight, bias = parameters[:6].reshape(2, 3), parameters[6:]
        logits = scale(features) @ weight + bias
        likelihood = logits[np.arange(60), labels] - np.log(np.exp(logits).sum(1))
        return (weight**2).sum() * class_accuracy.PENALTY - likelihood.mean()

    best = minimize(loss, np.zeros(9), tol=1e-10).x
    expected = (scale(others) @ best[:6].reshape(2, 3) + best[6:]).argmax(1)
    classify = class_accuracy.fit(torch.tensor(features).float(), torch.tensor(labels))
    assert (classify(torch.tensor(others).float()).numpy() == expected).mean() > 0.98  # but for those on a border


def test_a_run_knows_real_images_by_the_names_of_their_classes(place):
    args = class_accuracy.Arguments(
        model=str(place / "model"),
        data=str(place / "images"),
        label_column="label",
        samples_per_class=2,
        output=str(place / "page.md"),
    )
    class_accuracy.main(args)
    rows = [line.split("|")[1:-1] for line in (place / "page.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    assert [row[:3] for row in cells[:3]] == [[name, "2", "1.00"] for name in NAMES]
    assert cells[3][2] == "1.00" and 0 <= float(cells[3][4]) <= 1
    predicted, labels = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 1])
    assert class_accuracy.class_shares(predicted, labels, 2).tolist() == pytest.approx([1 / 2, 2 / 3])


def test_images_of_other_classes_are_refused(place):
    images = datasets.load_dataset(str(place / "images"), split="test")
    with pytest.raises(ValueError, match="must be the model's, sun, comet; got moon, star, sun"):
        class_accuracy.labels_of(images, "label", ["sun", "comet"])
