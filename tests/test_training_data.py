"""What training reads and writes: data sets, entropy thresholds, checkpoints."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.image_processing_dq import DQImageProcessor
from dq_hf.modeling.routing_dq import EntropyRouter
from dq_hf.training.calibration import calibrate_thresholds
from dq_hf.training.checkpoints import list_checkpoints, resume, save_checkpoint
from dq_hf.training.data import ImageCollator, class_names, flip_half, load_images

# Data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_images(folder, names):
    """Plain images, each of the grey value of its place in the list."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / name)
    return folder


def greys(dataset):
    return [row["image"].getpixel((0, 0))[0] for row in dataset]


@pytest.mark.parametrize("extra", [None, "annotations.json"])
def test_a_folder_of_images_is_a_training_split(tmp_path, extra):
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    if extra:
        (tmp_path / extra).write_text('{"a": [1, 2]}')
    assert greys(load_images(tmp_path, "train")) == [0, 1, 2]


def test_class_folders_give_labels_and_splits(tmp_path):
    write_images(tmp_path, ["train/cat/a.png", "train/dog/b.png", "test/dog/c.png"])
    dataset = load_images(tmp_path, "train")
    assert class_names(dataset, "label") == ["cat", "dog"] and dataset["label"] == [0, 1]
    assert greys(load_images(str(tmp_path), "test")) == [2]


def test_parquet_files_are_read(tmp_path):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in (7, 8)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    Dataset.from_dict({"picture": images, "kind": [1, 0]}, features=features).to_parquet(tmp_path / "train.parquet")
    dataset = load_images(tmp_path, "train", image_column="picture")
    assert [row["picture"].getpixel((0, 0)) for row in dataset] == [(7, 0, 0), (8, 0, 0)]
    assert class_names(dataset, "kind") == ["x", "y"]


def test_the_emoji_of_the_examples_are_loaded(request):
    dataset = load_images(request.config.rootpath / "examples" / "data" / "emoji", "test")
    assert dataset[0]["image"].size == (64, 64) and len(class_names(dataset, "label")) == 9


def test_missing_splits_and_columns_are_named(tmp_path):
    write_images(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_images(tmp_path, "test")
    with pytest.raises(ValueError, match="no column 'picture'; it has image"):
        load_images(tmp_path, "train", image_column="picture")
    with pytest.raises(ValueError, match="'label' must hold class labels .* got None"):
        class_names(load_images(tmp_path, "train"), "label")
    with pytest.raises(ValueError, match="'number' must hold class labels .* got Value"):
        class_names(Dataset.from_dict({"number": [1]}), "number")


def test_collator_makes_a_batch_with_labels():
    processor = DQImageProcessor(size={"height": 8, "width": 8})
    rows = [{"image": Image.new("L", (9, 20), value), "label": label} for value, label in ((255, 2), (0, 1))]
    batch = ImageCollator(processor, label_column="label")(rows)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, -1])
    assert batch["class_labels"].dtype == torch.long and batch["class_labels"].tolist() == [2, 1]
    assert set(ImageCollator(processor)(rows)) == {"pixel_values"}


def test_about_half_of_the_images_are_mirrored_left_to_right():
    torch.manual_seed(0)
    images = torch.randn(1000, 3, 2, 4)
    flipped = flip_half(images)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images[..., [3, 2, 1, 0]]).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 430 < mirrored.sum() < 570  # 4.4 standard deviations


# Calibration


def random_images(count, seed=0):
    """Noise whose strength differs between images and places."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    return noise * torch.rand(count, 1, 1, 1, generator=generator) * torch.linspace(0.2, 1, 32)


def achieved_shares(thresholds, images, patch_size):
    """Share of regions that a router with these thresholds puts at each granularity but the coarsest."""
    factors = [patch_size // 2**g for g in range(len(thresholds) + 1)]
    widths = [32] * patch_size.bit_length()
    config = DQVAEConfig(
        image_size=32, granularities=factors, block_out_channels=widths, entropy_thresholds=thresholds
    )
    grain_map = EntropyRouter(config)(images)[1]
    return [(grain_map == g).float().mean().item() for g in range(1, len(factors))]


@pytest.mark.parametrize("shares", [[0.5], [0.1], [0.9], [0.0], [1.0], [0.3, 0.2], [0.5, 0.5], [0.25, 0.0]])
def test_calibrated_thresholds_give_the_wanted_shares(shares):
    images = random_images(40)
    thresholds, achieved = calibrate_thresholds(images.split(16), 4, shares)
    assert thresholds == sorted(thresholds) and len(thresholds) == len(shares)
    assert achieved == pytest.approx(shares, abs=0.01)
    assert achieved_shares(thresholds, images, 4) == pytest.approx(achieved, abs=1e-6)


def test_calibration_holds_for_other_images_of_the_same_kind():
    thresholds, _ = calibrate_thresholds([random_images(100)], 4, [0.4])
    assert achieved_shares(thresholds, random_images(100, seed=1), 4) == pytest.approx([0.4], abs=0.1)


def test_plain_regions_stay_coarse_together():
    images = random_images(10)
    images[:, :, :16] = 0.5  # half of all regions, of one entropy
    for wanted, possible in ((0.3, 0.3), (0.5, 0.5), (0.8, 0.5), (1.0, 1.0)):
        thresholds, achieved = calibrate_thresholds([images], 4, [wanted])
        assert achieved == pytest.approx([possible], abs=0.01)
        assert achieved_shares(thresholds, images, 4) == pytest.approx(achieved, abs=1e-6)


def test_thresholds_leave_room_for_rounding():
    images = random_images(10)
    images[:, :, :16] = 0.5
    thresholds, achieved = calibrate_thresholds([images], 4, [0.5])
    assert achieved_shares([thresholds[0] - 1e-4], images, 4) == achieved_shares([thresholds[0] + 1e-4], images, 4)


@pytest.mark.parametrize(
    ("batches", "shares", "message"),
    [
        ([], [0.5], "at least one image, got none"),
        ([torch.zeros(1, 3, 30, 32)], [0.5], r"multiples of 4, got \(30, 32\); resize"),
        ([torch.zeros(1, 3, 32, 32)], [1.5], r"shares must lie in \[0, 1\]"),
        ([torch.zeros(1, 3, 32, 32)], [0.6, 0.6], "a sum of at most 1"),
    ],
)
def test_calibration_refuses(batches, shares, message):
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(batches, 4, shares)


# Checkpoints


class Counter:
    """Something to checkpoint; `broken` makes saving fail half-way."""

    def __init__(self):
        self.value, self.broken = 0, False

    def state_dict(self):
        if self.broken:
            raise OSError("no space left")
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = int(state["value"])


@pytest.fixture
def run():
    """An accelerator with a model, and a counter registered for checkpoints."""
    accelerator = Accelerator(cpu=True)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    return accelerator, accelerator.prepare(torch.nn.Linear(2, 2)), counter


def save_steps(run, folder, steps, **options):
    accelerator, model, counter = run
    for step in steps:
        counter.value = step
        with torch.no_grad():
            model.weight.fill_(step)
        save_checkpoint(accelerator, folder, step, **options)


def test_the_newest_checkpoints_are_kept_and_the_newest_is_resumed(run, tmp_path):
    accelerator, model, counter = run
    save_steps(run, tmp_path, [5, 10, 100, 20], keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    assert len(list(tmp_path.iterdir())) == 3
    counter.value = 0
    assert resume(accelerator, tmp_path) == 100
    assert counter.value == 100 and (model.weight == 100).all()


def test_a_run_without_checkpoints_starts_at_step_0(run, tmp_path):
    assert resume(run[0], tmp_path) == 0
    assert resume(run[0], tmp_path / "not-yet-there") == 0


def test_a_checkpoint_that_was_not_finished_is_never_resumed(run, tmp_path):
    accelerator, model, counter = run
    save_steps(run, tmp_path, [10])
    counter.broken = True
    with pytest.raises(OSError, match="no space left"):
        save_steps(run, tmp_path, [20])
    assert (tmp_path / "partial-checkpoint-20").is_dir()
    assert resume(accelerator, tmp_path) == 10 and (model.weight == 10).all()

    counter.broken = False  # the next attempt replaces what was left
    save_steps(run, tmp_path, [20])
    assert resume(accelerator, tmp_path) == 20 and not (tmp_path / "partial-checkpoint-20").exists()


def test_a_checkpoint_of_the_same_step_is_replaced(run, tmp_path):
    accelerator, model, counter = run
    save_steps(run, tmp_path, [10])
    counter.value = 77
    save_checkpoint(accelerator, tmp_path, 10)
    assert resume(accelerator, tmp_path) == 10 and counter.value == 77


def test_copies_that_a_user_made_do_not_count(run, tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-30.bak").mkdir()
    save_steps(run, tmp_path, [10, 20], keep=1)
    assert resume(run[0], tmp_path) == 20
    assert (tmp_path / "checkpoint-best").is_dir() and (tmp_path / "checkpoint-30.bak").is_dir()


def test_at_least_one_checkpoint_must_be_kept(run, tmp_path):
    with pytest.raises(ValueError, match="keep must be 1 or more, got 0"):
        save_steps(run, tmp_path, [10], keep=0)


def test_a_local_folder_may_be_named_like_a_builder_of_datasets(tmp_path, monkeypatch):
    (tmp_path / "imagefolder" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "imagefolder" / "train" / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "elsewhere.png")
    monkeypatch.chdir(tmp_path)
    assert len(load_images("imagefolder", "train")) == 1
