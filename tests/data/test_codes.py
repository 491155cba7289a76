"""Code caches: what the script writes, what is refused, and the batches that stage 2 reads from them."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DataLoaderConfiguration
from conftest import make_transformer, make_vae
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader

from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQImageProcessor, DQVAEModel
from dq_hf.data.codes import CodeCollator, LengthBucketSampler, code_features, load_codes, read_index, split_files
from dq_hf.data.fingerprint import codes_fingerprint, fingerprint
from dq_hf.hub.card import is_hub_dataset
from dq_hf.modeling.routing_dq import ROUTERS
from dq_hf.scripts.encode_dataset import check_output_dir

SCRIPT = Path(__file__).parents[2] / "examples" / "encode_dataset.py"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
NUM_IMAGES = {"train": 7, "test": 2}  # of each class


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with `vae` and `images`: noise in some regions, the others white, so that numbers of codes differ."""
    place = tmp_path_factory.mktemp("codes")
    make_vae().save_pretrained(place / "vae")
    source = np.random.default_rng(0)
    for split, count in NUM_IMAGES.items():
        for name in ("moon", "sun"):
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
                top, left = 4 * source.integers(4, size=2)
                pixels[top:, left:] = source.integers(0, 256, (16 - top, 16 - left, 3))
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (place / "images" / "train" / "moon" / "broken.png").write_bytes(b"no image")
    return place


def encode(place, arguments, launch=()):
    """Run the script from `place`, with its tokenizer and its images."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(place / "hf")}
    command = [sys.executable, *launch, str(SCRIPT), "--vae", "vae", "--data", "images", "--batch_size", "4"]
    command += ["--max_broken_share", "0.1", *arguments.split()]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def cache(place):
    """What one process writes."""
    encode(place, "--output_dir cache")
    return place / "cache"


@pytest.fixture
def vae(place):
    return DQVAEModel.from_pretrained(place / "vae")


def images_of(place, split):
    """The readable images, in the order of a folder of images, with their labels."""
    paths = sorted(path for path in (place / "images" / split).rglob("*.png") if path.stem != "broken")
    return [(Image.open(path), int(path.parent.name == "sun")) for path in paths]


def assert_row_is_of(row, image, vae):
    encoded = vae.encode(DQImageProcessor(size={"height": 16, "width": 16})(image)["pixel_values"])
    assert row["codes"].tolist() == encoded.codes.flatten().tolist()
    assert row["grain_map"].tolist() == encoded.grain_map.flatten().tolist()
    assert row["num_codes"] == encoded.num_codes.item()


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_a_cache_holds_what_the_tokenizer_gives_for_each_image_and_for_its_mirror_image_in_training(
    place, cache, vae, split
):
    images, rows = images_of(place, split), load_codes(cache, split, vae)
    if split == "train":
        images = [(version, label) for image, label in images for version in (image, ImageOps.mirror(image))]
    assert len(rows) == len(images)
    for row, (image, label) in zip(rows, images):
        assert_row_is_of(row, image, vae)
        assert row["label"] == label
    assert rows["flipped"][:].tolist() == ([False, True] * 14 if split == "train" else [False] * 4)
    assert rows.features["label"].names == ["moon", "sun"]
    assert len(set(rows["num_codes"][:].tolist())) > 2  # variable-length


@pytest.mark.slow
def test_two_processes_write_the_same_rows_over_an_old_cache(place, cache, vae):
    old = place / "two"
    old.mkdir()
    (old / "codes.json").write_text("{}")
    (old / "train-00000-of-00001.parquet").write_text("old")
    encode(place, "--output_dir two --overwrite", TWO_PROCESSES)
    assert len(list(old.glob("*-of-00002.parquet"))) == len(list(old.glob("*.parquet"))) == 4
    for split in NUM_IMAGES:
        one, two = load_codes(cache, split, vae), load_codes(old, split, vae)
        assert one.with_format(None).to_list() == two.with_format(None).to_list()
    assert not list(place.glob("partial-*"))


def test_a_cache_of_a_local_folder_names_no_data_set_of_the_hub(place, cache):
    data = read_index(cache)["data"]  # encoded from another directory, where "images" was
    assert not is_hub_dataset(data) and (place / data).samefile(place / "images") and str(place) not in data


def test_only_a_code_cache_is_overwritten(cache, tmp_path):
    check_output_dir(tmp_path / "new", overwrite=False)
    check_output_dir(tmp_path, overwrite=False)  # empty
    check_output_dir(cache, overwrite=True)
    with pytest.raises(FileExistsError, match="is not empty; choose another or give --overwrite"):
        check_output_dir(cache, overwrite=False)
    (tmp_path / "holiday.png").touch()
    with pytest.raises(FileExistsError, match="is not empty; choose another$"):
        check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="must be a folder, got the file"):
        check_output_dir(tmp_path / "holiday.png", overwrite=True)


def test_a_split_has_its_own_files_whatever_the_other_splits_are_called(tmp_path):
    splits = {"test", "test-2", "test-2-00000-of-00001", "test_pairs", "te.t", "te[s]t", "[0-9]"}
    files = {f"{split}-{part:05d}-of-00002.parquet": split for split in splits for part in range(2)}
    for name in (*files, "test-a-of-b.parquet", "test-00000-of-00001.parquet.tmp"):
        (tmp_path / name).touch()
    for split in splits:
        own = sorted(name for name, whose in files.items() if whose == split)
        assert [path.name for path in split_files(tmp_path, split)] == own


# Refusals


@pytest.fixture
def copy(cache, tmp_path):
    """A cache that may be damaged."""
    for path in cache.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_codes_of_another_vae_are_refused(cache, vae):
    with torch.no_grad():
        vae.quantizer.codebook[0, 0] += 1e-3
    message = f"codes of another VAE: fingerprint [0-9a-f]{{16}}, of vae, got one with {codes_fingerprint(vae)}; use that VAE"
    with pytest.raises(ValueError, match=message):
        load_codes(cache, "train", vae)


@pytest.mark.parametrize("content", [None, "", '{"fingerprint": "12', "[]", '{"fingerprint": "12"}'])
def test_a_folder_without_a_whole_index_is_no_cache(copy, vae, content):
    (copy / "codes.json").unlink()
    if content is not None:
        (copy / "codes.json").write_text(content)
    with pytest.raises(ValueError, match="is no code cache: codes.json is missing or damaged .* encode the images ag"):
        load_codes(copy, "train", vae)


def test_missing_and_damaged_files_of_codes_are_refused(copy, vae):
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        load_codes(copy, "validation", vae)
    file = copy / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a file of split 'train' is damaged .* encode the images again"):
        load_codes(copy, "train", vae)
    file.unlink()
    with pytest.raises(ValueError, match="split 'train' must have 28 rows, got 0; encode the images again"):
        load_codes(copy, "train", vae)


# Fingerprint


def test_a_fingerprint_survives_saving_alone_and_jointly(tiny_vae, tiny_transformer, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "alone")
    DQForImageGeneration.from_models(tiny_vae, tiny_transformer).save_pretrained(tmp_path / "joint")
    expected = fingerprint(tiny_vae)
    assert fingerprint(DQVAEModel.from_pretrained(tmp_path / "alone")) == expected
    assert fingerprint(DQVAEModel.from_pretrained(tmp_path / "joint", subfolder="vae")) == expected
    assert fingerprint(DQForImageGeneration.from_pretrained(tmp_path / "joint").vae) == expected
    assert fingerprint(make_vae().double()) == fingerprint(make_vae(commitment_beta=0.5, dropout=0.1)) == expected


@pytest.mark.parametrize(
    "name, counts",
    [
        ("encoder.conv_in.weight", True),
        ("router.gate.0.bias", True),
        ("quant_conv.bias", True),
        ("quantizer.codebook", True),
        ("post_quant_conv.bias", False),
        ("decoder.output.conv.bias", False),
    ],
)
def test_every_part_counts_in_a_fingerprint_and_in_that_of_codes_what_makes_them(name, counts):
    vae = make_vae(router="feature")
    before, of_codes = fingerprint(vae), codes_fingerprint(vae)
    with torch.no_grad():
        vae.state_dict()[name].view(-1)[0] += 1e-3
    assert fingerprint(vae) != before and (codes_fingerprint(vae) != of_codes) == counts


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("which", [fingerprint, codes_fingerprint])
def test_thresholds_count_in_both_fingerprints_however_they_came(which, router):
    begun, calibrated = make_vae(router="entropy", entropy_thresholds=[1.0]), make_vae(router=router)
    before = which(calibrated)
    calibrated.router.set_thresholds([1.0])
    assert which(calibrated) != before
    assert (which(calibrated) == which(begun)) == (router == "entropy")


def test_the_embedded_model_keeps_the_fingerprint_that_caches_of_it_have(tmp_path):
    vae = DQVAEModel.from_pretrained(DEFAULT_MODEL, subfolder="vae")
    vae.save_pretrained(tmp_path)
    assert codes_fingerprint(vae) == codes_fingerprint(DQVAEModel.from_pretrained(tmp_path)) == "732d9c0b25f07c0a"


# Batches


def test_rows_become_what_the_generator_takes(cache, vae):
    rows = load_codes(cache, "train", vae)
    batch = next(iter(DataLoader(rows, 3, collate_fn=CodeCollator(vae.config.grid_sizes))))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "codes": ((3, 8, 8), torch.long),
        "grain_map": ((3, 4, 4), torch.long),
        "class_labels": ((3,), torch.long),
    }
    assert torch.isfinite(make_transformer(num_classes=2)(**batch).loss)
    row = {"codes": np.arange(8), "grain_map": np.arange(2)}  # not square, and without a label
    batch = CodeCollator([[1, 2], [2, 4]])([row, row])
    assert batch["codes"].tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2
    assert batch["grain_map"].tolist() == [[[0, 1]]] * 2 and set(batch) == {"codes", "grain_map"}
    for codebook_size, dtype in ((2**15, "int16"), (2**15 + 1, "int32")):
        features = code_features(make_vae(codebook_size=codebook_size).config)
        assert features["codes"] == datasets.List(datasets.Value(dtype), length=64)


def random_lengths(count=205):
    """Lengths of 10 kinds."""
    return np.random.default_rng(0).permutation(count) % 10


def in_batches(indices, batch_size):
    return [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]


def test_a_batch_has_rows_of_one_length_where_there_are_enough():
    lengths = random_lengths()
    batches = in_batches(list(LengthBucketSampler(lengths, batch_size=5)), 5)
    kinds = [len(set(lengths[batch])) for batch in batches]
    assert len(batches) == 41 and kinds.count(1) >= 41 - 9  # 9 borders between 10 lengths
    first = [lengths[batch[0]] for batch in batches]
    assert first != sorted(first) and first != sorted(first, reverse=True)
    lengths = np.random.default_rng(0).integers(0, 1000, 1030)  # many: sorted in parts
    rows = list(LengthBucketSampler(lengths, batch_size=10))
    assert sorted(rows) == list(range(1030))
    spread = [np.ptp(lengths[batch]) for batch in in_batches(rows, 10)]
    assert np.mean(spread) < 60  # 50 batches sorted together: 1000 / 50; at random: 1000 * 9 / 11
    for count in (0, 3):
        assert sorted(LengthBucketSampler([7] * count, 10)) == list(range(count))


def test_every_row_comes_once_an_epoch_in_an_order_of_its_seed_and_epoch():
    sampler = LengthBucketSampler(random_lengths(), 10, seed=1)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(sampler) == 205 and sorted(epochs[-1]) == list(range(205))
    assert epochs[0] != epochs[1]
    other = LengthBucketSampler(torch.tensor(random_lengths()), 10, seed=1)
    other.set_epoch(1)
    assert list(other) == epochs[1]
    assert list(LengthBucketSampler(random_lengths(), 10, seed=2)) != epochs[0]


def test_the_batches_of_one_step_have_similar_lengths_on_all_processes():
    lengths = random_lengths(200)
    batches = BatchSampler(LengthBucketSampler(lengths, 10), 5, drop_last=True)
    shares = [list(BatchSamplerShard(batches, num_processes=2, process_index=index)) for index in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 20
    for one, two in zip(*shares):
        assert not set(one) & set(two) and len(set(lengths[one + two])) == 1


def test_a_resumed_run_sees_the_batches_that_were_left():
    def start():
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
        sampler = LengthBucketSampler(random_lengths(), 10)
        return accelerator, accelerator.prepare(DataLoader(range(205), 10, sampler=sampler, drop_last=True))

    def run(step, last_step):
        accelerator, loader = start()
        seen = []
        while step < last_step:
            epoch, batches_done = divmod(step, len(loader))
            loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(loader, batches_done)
            batches.set_epoch(epoch)  # accelerate 1.10 forgets it
            for batch in batches:
                seen.append(batch.tolist())
                step += 1
        return seen

    whole = run(0, 60)
    assert len(whole) == 60 and whole[:20] != whole[20:40]
    assert run(25, 60) == whole[25:]
