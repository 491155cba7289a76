"""What training reads: data sets, stored or streamed."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import socket
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from dq_hf.data.augmentation import Augmentation
from dq_hf.data.images import (
    ImageCollator,
    check_column,
    check_no_flip_column,
    decode_image,
    drop_broken_images,
    find_labels,
    load_images,
)
from dq_hf.data.streams import StreamedImages, load_train_and_test, prepare_loader
from dq_hf.modeling.image_processing_dq import DQImageProcessor

# Data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )  # 5 s at the end of Parquet


def write_images(folder, names):
    """Plain images, each of the grey value of its place in the list."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / name)
    return folder


def png(grey, size=(4, 4)):
    """Bytes of a plain PNG image."""
    file = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(file, "png")
    return file.getvalue()


def images_of(files):
    """A data set of files' bytes, numbered."""
    features = {"image": datasets.Image(decode=False), "number": datasets.Value("int64")}
    rows = {"image": [{"bytes": file, "path": None} for file in files], "number": list(range(len(files)))}
    return Dataset.from_dict(rows, features=datasets.Features(features))


def write_tables(folder, sizes):
    """Parquet files with so many plain images each, of the grey values 0, 1, 2, ..."""
    folder.mkdir()
    dataset = images_of([png(grey) for grey in range(sum(sizes))])
    for i, end in enumerate(itertools.accumulate(sizes)):
        rows = dataset.select(range(end - sizes[i], end))
        rows.to_parquet(folder / f"train-{i:05d}-of-{len(sizes):05d}.parquet")
    return folder


def greys(dataset):
    return [decode_image(row["image"]).getpixel((0, 0))[0] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extra", [None, "annotations.json"])
def test_a_folder_of_images_is_a_training_split_whatever_its_name(tmp_path, monkeypatch, extra, streaming):
    write_images(tmp_path / "imagefolder", ["a.png", "b.png", "c.png"])  # a builder of datasets is named so
    monkeypatch.chdir(tmp_path)
    if extra:
        (tmp_path / "imagefolder" / extra).write_text('{"a": [1, 2]}')
    assert greys(load_images("imagefolder", "train", streaming=streaming)) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_give_labels_and_splits(tmp_path, streaming):
    write_images(tmp_path, ["train/cat/a.png", "train/dog/b.png", "test/dog/c.png"])
    dataset = load_images(tmp_path, "train", streaming=streaming)
    assert dataset.features["label"].names == ["cat", "dog"] and [row["label"] for row in dataset] == [0, 1]
    assert greys(load_images(str(tmp_path), "test", streaming=streaming)) == [2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("one_file", [False, True])
def test_parquet_files_are_read(tmp_path, one_file, streaming):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in (7, 8)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    Dataset.from_dict({"picture": images, "kind": [1, 0]}, features=features).to_parquet(tmp_path / "train.parquet")
    data = tmp_path / "train.parquet" if one_file else tmp_path
    dataset = load_images(data, "train", image_column="picture", streaming=streaming)
    assert [decode_image(row["picture"]).getpixel((0, 0)) for row in dataset] == [(7, 0, 0), (8, 0, 0)]
    assert dataset.features["kind"].names == ["x", "y"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_whose_name_begins_like_another_is_not_mixed_into_that(tmp_path, streaming):
    for grey, split in enumerate(("test", "test_pairs", "train")):
        images_of([png(grey)]).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    splits = {
        split: greys(load_images(tmp_path, split, streaming=streaming)) for split in ("test", "test_pairs", "train")
    }
    assert splits == {"test": [0], "test_pairs": [1], "train": [2]}


def test_a_stream_may_tell_its_columns_only_by_its_rows(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    lines = [json.dumps({"image": str(tmp_path / name)}) for name in ("a.png", "b.png")]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(lines))
    assert greys(load_images(tmp_path / "rows", "train", streaming=True)) == [0, 1]
    with pytest.raises(ValueError, match="no column 'file'; it has image"):
        load_images(tmp_path / "rows", "train", "file", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_splits_and_columns_are_named(tmp_path, streaming):
    write_images(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_images(tmp_path, "test", streaming=streaming)
    with pytest.raises(ValueError, match="no column 'picture'; it has image"):
        load_images(tmp_path, "train", image_column="picture", streaming=streaming)
    with pytest.raises(ValueError, match="'label' must hold class labels.* got None"):
        find_labels([("train", load_images(tmp_path, "train", streaming=streaming))], "label")
    with pytest.raises(ValueError, match="'number' must hold class labels.* got Value"):
        find_labels([("train", Dataset.from_dict({"number": [1.5]}))], "number")


def test_strings_are_the_classes_of_the_training_split():
    sets = [
        (split, Dataset.from_dict({"kind": names})) for split, names in (("train", ["sun", "moon"]), ("test", ["sun"]))
    ]
    column, names, (train_set, test_set) = find_labels(sets, "kind")
    assert names == train_set.features[column].names == ["moon", "sun"]
    assert train_set[column][:] == [1, 0] and test_set[column][:] == [1] and train_set["kind"][:] == ["sun", "moon"]


def test_numbers_are_classes_too():
    sets = [("train", Dataset.from_dict({"kind": [10, 9, 2]})), ("test", Dataset.from_dict({"kind": [9]}))]
    column, names, (train_set, test_set) = find_labels(sets, "kind")
    assert names == ["2", "9", "10"] and train_set[column][:] == [2, 1, 0] and test_set[column][:] == [1]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_labels_may_be_strings_of_any_arrow_type(tmp_path, kind):
    labels = ["sun", "moon", "sun"]
    table = pa.table({"image": [{"bytes": png(0), "path": None}] * 3, "label": pa.array(labels).cast(kind)})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    dataset = drop_broken_images(load_images(tmp_path, "train"))
    column, names, (rows,) = find_labels([("train", dataset.shuffle(seed=0).select([0, 1, 2]))])
    assert names == ["moon", "sun"] and sorted(rows[column][:]) == [0, 1, 1]
    assert [names[row[column]] for row in rows] == [row["label"] for row in rows]


def test_classes_without_a_training_image_are_told(tmp_path, caplog):
    write_images(tmp_path, ["train/cat/0.png", "test/cat/1.png", "test/dog/2.png"])
    _, names, _ = find_labels([(split, load_images(tmp_path, split)) for split in ("train", "test")])
    assert names == ["cat", "dog"]
    assert "1 of 2 classes have no image in split 'train', such as 'dog'" in caplog.text


@pytest.mark.parametrize(
    "splits, message",
    [
        ([["sun", "moon"], ["sun", None]], "split 'test' has 1 rows of 2 whose label is no class, such as None"),
        ([["sun", ""], ["sun"]], "split 'train' has 1 rows of 2 whose label is no class, such as ''"),
        ([["sun", "moon"], ["star"]], "split 'test' has 1 rows of 1 whose label is no class, such as 'star'"),
        ([["sun"], [0]], "split 'test' has 1 rows of 1 whose label is no class, such as 0"),
        ([["sun"], [None]], "split 'test' has 1 rows of 1 whose label is no class, such as None"),
        ([[0, 1], [2, 0]], "split 'test' has 1 rows of 2 whose label is no class, such as 2"),
        ([[0, -1], [0]], "split 'train' has 1 rows of 2 whose label is no class, such as -1"),
        ([[0.0, 1.0], [1.0]], "'kind' must hold class labels.* but for a stream, strings or whole numbers; got Value"),
    ],
)
def test_labels_that_stand_for_no_class_are_refused(splits, message):
    sets = [(split, Dataset.from_dict({"kind": labels})) for split, labels in zip(("train", "test"), splits)]
    with pytest.raises(ValueError, match=message):
        find_labels(sets, "kind")


def test_a_split_without_the_label_column_is_named():
    sets = [("train", Dataset.from_dict({"kind": ["sun"]})), ("test", Dataset.from_dict({"sort": ["sun"]}))]
    with pytest.raises(ValueError, match="split 'test' has no column 'kind'; it has sort"):
        find_labels(sets, "kind")


# Broken images


def bomb():
    """A PNG file that claims 20,000 x 20,000 pixels."""
    file = bytearray(png(0))
    file[16:24] = struct.pack(">II", 20000, 20000)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


def without_range():
    """A readable file whose values have no fixed range."""
    file = io.BytesIO()
    Image.new("F", (4, 4)).save(file, "tiff")
    return file.getvalue()


def test_images_that_a_table_names_are_looked_at_anew_when_their_files_change(tmp_path):
    write_images(tmp_path, [f"files/{i}.png" for i in range(4)])
    paths = [str(tmp_path / f"files/{i}.png") for i in range(4)]
    (tmp_path / "train.csv").write_text("\n".join(["image", *paths]))
    Path(paths[2]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"got 1 of 4, the first: .*2\.png"):
        drop_broken_images(load_images(tmp_path / "train.csv", "train"))
    Image.new("RGB", (4, 4), (2, 2, 2)).save(paths[2])
    assert greys(drop_broken_images(load_images(tmp_path / "train.csv", "train"))) == [0, 1, 2, 3]
    os.unlink(paths[3])
    assert greys(drop_broken_images(load_images(tmp_path / "train.csv", "train"), max_share=0.5)) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nobody_asked_for_are_not_decoded(tmp_path, streaming):
    image, broken = {"bytes": png(7), "path": None}, {"bytes": b"broken", "path": None}
    rows = Dataset.from_dict({"image": [image], "mask": [broken], "sound": [broken], "label": [1]})
    for name, feature in {"image": datasets.Image(), "mask": datasets.Image(), "sound": datasets.Audio()}.items():
        rows = rows.cast_column(name, feature)
    rows.to_parquet(tmp_path / "train.parquet")
    (row,) = load_images(tmp_path, "train", streaming=streaming)
    assert decode_image(row["image"]).getpixel((0, 0)) == (7, 7, 7) and row["label"] == 1


def test_images_of_several_files_are_looked_at_file_by_file():
    """Joined, those of a large data set would not fit into one array."""
    images = [Dataset.from_dict({"image": [{"bytes": png(grey), "path": None}]}) for grey in (0, 1)]
    dataset = datasets.concatenate_datasets(images).cast_column("image", datasets.Image(decode=False))
    assert dataset.data.column("image").num_chunks == 2 and greys(drop_broken_images(dataset)) == [0, 1]


def test_a_file_that_is_no_table_is_named(tmp_path):
    write_images(tmp_path, ["0.png"])
    with pytest.raises(ValueError, match=r"a folder, a data set of the Hub, or one of \.parquet, .*; got .*0\.png"):
        load_images(tmp_path / "0.png", "train")


BROKEN = {
    "cut off": png(7, (64, 64))[:90],
    "empty": b"",
    "no image": b"<html>not found</html>",
    "damaged": png(7)[:40] + bytes(20) + png(7)[60:],
    "bomb": bomb(),
    "without range": without_range(),
    "missing": None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_recognised(tmp_path, monkeypatch, kind):
    for value in ({"bytes": BROKEN[kind], "path": None}, BROKEN[kind]):
        with pytest.raises(ValueError):
            decode_image(value)
    write_images(tmp_path, ["a.png"])
    monkeypatch.chdir(tmp_path)  # embedded bytes come before a file
    assert decode_image({"bytes": png(9), "path": "a.png"}).getpixel((0, 0))[0] == 9


def test_broken_images_are_left_out_and_named_and_decoded_once(tmp_path, monkeypatch, caplog):
    write_images(tmp_path, [f"{i:03d}.png" for i in range(20)])
    assert len(drop_broken_images(load_images(tmp_path, "train"))) == 20 and not caplog.records
    (tmp_path / "004.png").write_bytes(BROKEN["cut off"])
    (tmp_path / "011.png").write_bytes(BROKEN["no image"])
    for again in (False, True):
        caplog.clear()
        with monkeypatch.context() as patch:
            if again:  # from the cache of datasets: decoding would fail
                patch.setattr(Image, "open", None)
            left = drop_broken_images(load_images(tmp_path, "train"), max_share=0.1)
        assert greys(left) == [i for i in range(20) if i not in (4, 11)]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and record.getMessage().startswith("2 of 20 images")
        assert "004.png (OSError" in record.getMessage()
        assert "011.png (no image that Pillow can read)" in record.getMessage()
        assert "005.png" not in record.getMessage()


@pytest.mark.parametrize("num_proc", [None, 2])
def test_broken_images_without_a_path_are_named_by_row(caplog, num_proc):
    files = [png(i) if i % 2 else BROKEN["empty"] for i in range(60)]
    left = drop_broken_images(images_of(files), max_share=0.5, num_proc=num_proc)
    assert left["number"] == list(range(1, 60, 2))
    message = caplog.records[0].getMessage()
    assert message.startswith("30 of 60") and message.endswith("; and 10 more")
    assert message.count("row ") == 20 and "row 38 (" in message and "row 40" not in message


@pytest.mark.parametrize(
    ("files", "share", "message"),
    [
        ([png(0)] * 9 + [b""], 0.09, r"at most 9.00% .* got 1 of 10, the first: row 9 \(.*; repair or remove"),
        ([b""] * 3, 1.0, "at most 100.00% .* got 3 of 3"),
        ([], 0.01, "at least one image, got none"),
        ([png(0)], 1.5, r"must lie in \[0, 1\], got 1.5"),
    ],
)
def test_too_many_broken_images_are_an_error(files, share, message):
    assert len(drop_broken_images(images_of([png(0)] * 9 + [b""]), max_share=0.1)) == 9
    with pytest.raises(ValueError, match=message):
        drop_broken_images(images_of(files), max_share=share)


# Streams


def stream_of(files, **options):
    return StreamedImages(images_of(files).to_iterable_dataset(), **options)


def numbers(rows):
    return [row["number"] for row in rows]


def test_each_epoch_has_an_order_of_its_own():
    files = [png(0)] * 30
    stream, same, other = (stream_of(files, shuffle_buffer=10, seed=seed) for seed in (0, 0, 1))
    first = numbers(stream)
    assert first == numbers(stream) == numbers(same)
    stream.set_epoch(1)
    second = numbers(stream)
    orders = [list(range(30)), first, second, numbers(other)]
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def give_all(rows):
    return rows


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("shuffle_buffer", [0, 4])
@pytest.mark.parametrize(
    ("sizes", "num_processes", "num_workers"),
    [([7], 2, 0), ([4, 1, 6, 2], 2, 0), ([7], 3, 2), ([4, 1, 6], 2, 2), ([4, 1, 6, 2], 2, 2)],
)
def test_every_row_comes_once(tmp_path, sizes, num_processes, num_workers, shuffle_buffer):
    dataset = load_images(write_tables(tmp_path / "tables", sizes), "train", streaming=True)
    rows = []
    for i in range(num_processes):
        stream = StreamedImages(dataset, process_index=i, num_processes=num_processes, shuffle_buffer=shuffle_buffer)
        stream.set_epoch(1)
        loader = DataLoader(stream, 2, num_workers=num_workers, collate_fn=give_all)
        rows += [row["number"] for batch in loader for row in batch]
    assert sorted(rows) == list(range(sum(sizes)))


@pytest.mark.parametrize("column_names", [["image", "number"], None])
def test_the_columns_of_a_stream_are_checked_as_those_of_its_data_set(column_names):
    rows = images_of([png(0)] * 3).to_iterable_dataset()
    dataset = rows if column_names else rows.map(lambda row: row)  # which tells them only by its rows
    stream = StreamedImages(dataset)
    assert stream.column_names == dataset.column_names == column_names
    check_column(stream, "number")
    with pytest.raises(ValueError, match="no column 'letters'; it has image, number"):
        check_column(stream, "letters")


@pytest.mark.parametrize("kind", ["stored", "streamed", "streamed without types"])
@pytest.mark.parametrize(
    "values, got", [([True, None], None), ([1, 0], None), (["no", "yes"], "string"), ([1.0, float("nan")], "double")]
)
def test_no_text_says_that_an_image_is_not_mirrored(kind, values, got):
    dataset = Dataset.from_dict({"letters": values})
    if kind == "streamed":
        dataset = dataset.to_iterable_dataset()
    elif kind == "streamed without types":
        dataset = datasets.IterableDataset.from_generator(lambda: ({"letters": value} for value in values))
    if got is None:
        return check_no_flip_column(dataset, "letters")
    with pytest.raises(
        ValueError, match=f"letters must hold booleans or whole numbers, got {got}; write true or false"
    ):
        check_no_flip_column(dataset, "letters")


def test_a_part_is_the_same_stream_for_another_process():
    stream = stream_of([png(0)] * 9, shuffle_buffer=0, process_index=1, num_processes=3)
    assert numbers(stream.part(0, 1)) == list(range(9)) and numbers(stream.part(0, 3)) == [0, 3, 6]
    assert numbers(stream) == [1, 4, 7] and stream.features["number"] == datasets.Value("int64")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_to_train_and_to_measure_on(tmp_path, streaming):
    write_images(tmp_path, [f"train/{i}.png" for i in range(5)] + [f"test/{i}.png" for i in range(5)])
    (tmp_path / "test" / "1.png").write_bytes(b"")
    (tmp_path / "train" / "0.png").write_bytes(b"")
    options = dict(splits=("train", "test"), image_column="image", streaming=streaming, max_test_images=2, seed=0)
    train_set, (test_set,) = load_train_and_test(make_accelerator(), tmp_path, max_broken_share=0.2, **options)
    assert sorted(greys(train_set)) == [1, 2, 3, 4]
    assert len(test_set) == 2 and set(greys(test_set)) < {5, 7, 8, 9}
    _, (again,) = load_train_and_test(make_accelerator(), tmp_path, max_broken_share=0.2, **options)
    assert greys(again) == greys(test_set)
    with pytest.raises(ValueError, match="at most 10.00% .* got 1 of 5"):
        list(load_train_and_test(make_accelerator(), tmp_path, max_broken_share=0.1, **options)[0])


def test_a_stream_skips_counts_and_names_broken_images(caplog):
    files = [BROKEN["empty"] if i in (3, 150) else png(1) for i in range(200)]
    stream = stream_of(files, shuffle_buffer=0, max_share=0.015)
    assert numbers(stream) == [i for i in range(200) if i not in (3, 150)]
    assert (stream.num_rows, stream.num_broken) == (200, 2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 and "row 3 (" in messages[0] and "row 150 (" in messages[1]
    assert messages[2] == "skipped 2 of 200 images in epoch 0"


def test_a_stream_with_too_many_broken_images_stops_after_100_rows_or_at_its_end():
    stream = iter(stream_of([png(1), b""] + [png(1)] * 300, shuffle_buffer=0, max_share=0.005))
    assert len(list(itertools.islice(stream, 98))) == 98
    with pytest.raises(ValueError, match=r"at most 0.50% .* got 1 of 100, the first: row 1 \("):
        next(stream), next(stream)
    stream = iter(stream_of([b"", b""] + [png(1)] * 18, shuffle_buffer=0, max_share=0.05))
    assert len(list(itertools.islice(stream, 18))) == 18
    with pytest.raises(ValueError, match="got 2 of 20"):
        next(stream)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1"):
        stream_of([b""], max_share=-1)


# Batches


def make_collator(**options):
    return ImageCollator(DQImageProcessor(size={"height": 8, "width": 8}), **options)


def test_collator_decodes_makes_a_batch_with_labels_and_names_what_it_cannot_decode(tmp_path):
    write_images(tmp_path, ["a.png"])
    values = [
        *({"path": str(tmp_path / "a.png"), "bytes": None}, {"path": None, "bytes": png(255)}),
        Image.new("L", (9, 20), 255),
    ]
    rows = [{"image": value, "label": label} for label, value in enumerate(values)]
    batch = make_collator(label_column="label")(rows)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == pytest.approx([-1, 1, 1])
    assert batch["class_labels"].dtype == torch.long and batch["class_labels"].tolist() == [0, 1, 2]
    assert set(make_collator()(rows)) == {"pixel_values"}
    with pytest.raises(ValueError, match=r"cannot be read: .*no-such.png \(FileNotFoundError.*; remove it"):
        make_collator()([{"image": {"path": str(tmp_path / "no-such.png"), "bytes": None}}])
    with pytest.raises(ValueError, match=r"cannot be read: row 1 \(there is no image\)"):
        make_collator()([{"image": values[0]}, {"image": None}])


def noise_rows(count):
    source = np.random.default_rng(0)
    return [{"image": Image.fromarray(source.integers(0, 256, (8, 8, 3), np.uint8))} for _ in range(count)]


def mirrored(collate, rows):
    """Which images a collator mirrors; they must be mirrored exactly or not at all."""
    images, plain = collate(rows)["pixel_values"], make_collator()(rows)["pixel_values"]
    flips = (images == plain[..., list(range(7, -1, -1))]).flatten(1).all(1)
    assert ((images == plain).flatten(1).all(1) ^ flips).all()
    return flips


def test_half_of_the_images_are_mirrored_anew_in_each_epoch_and_alike_in_any_batch():
    rows, collate = noise_rows(1000), make_collator(augmentation=Augmentation(0, horizontal_flips=True))
    first = mirrored(collate, rows)
    assert torch.cat([mirrored(collate, [row]) for row in reversed(rows[:20])]).flip(0).equal(first[:20])
    collate.epoch = 1
    second = mirrored(collate, rows)
    other = mirrored(make_collator(augmentation=Augmentation(1, horizontal_flips=True)), rows)
    for share in (first, second, other, first ^ second, first ^ other):
        assert 430 < share.sum() < 570  # 4.4 standard deviations


# Loaders


def make_accelerator():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0))


def stream_loader(accelerator, count=11, num_workers=0, batch_size=2):
    """An endless loader of `count` images of noise."""
    files = []
    for row in noise_rows(count):
        row["image"].save(file := io.BytesIO(), "png")
        files.append(file.getvalue())
    collate = make_collator(label_column="number", augmentation=Augmentation(0, horizontal_flips=True))
    stream = stream_of(files, shuffle_buffer=5)
    return prepare_loader(
        accelerator, DataLoader(stream, batch_size, collate_fn=collate, drop_last=True, num_workers=num_workers)
    )


def assert_same_batches(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys() and all(batch[key].equal(other[key]) for key in batch)


def test_a_stream_goes_on_with_the_next_epoch_without_end():
    batches = list(itertools.islice(stream_loader(make_accelerator()), 15))  # of 5 an epoch, one image left over
    epochs = [[n for batch in batches[i : i + 5] for n in batch["class_labels"].tolist()] for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    images = {}  # by number, as mirrored in each epoch
    for batch in batches:
        for number, image in zip(batch["class_labels"].tolist(), batch["pixel_values"]):
            images.setdefault(number, set()).add(image.numpy().tobytes())
    assert max(len(versions) for versions in images.values()) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 5, 7])
def test_a_resumed_stream_gives_the_next_batch(tmp_path, done, num_workers):
    accelerator = make_accelerator()
    loader = stream_loader(accelerator, num_workers=num_workers)
    batches = []
    for batch in itertools.islice(loader, 12):
        batches.append(batch)
        if len(batches) == done:
            accelerator.save_state(tmp_path / "state")
    accelerator = make_accelerator()
    loader = stream_loader(accelerator, num_workers=num_workers)
    accelerator.load_state(tmp_path / "state")
    assert_same_batches(list(itertools.islice(loader, 12 - done)), batches[done:])


def test_a_stream_is_resumed_only_as_it_was_split(tmp_path):
    accelerator = make_accelerator()
    stream_loader(accelerator)
    accelerator.save_state(tmp_path)
    accelerator = make_accelerator()
    stream_loader(accelerator, batch_size=3)
    with pytest.raises(ValueError, match="'batch_size': 3.*got .*'batch_size': 2.*go on with the numbers"):
        accelerator.load_state(tmp_path)
    (tmp_path / "stream_0.json").unlink()
    with pytest.raises(ValueError, match="stream_0.json must be of a run with"):
        accelerator.load_state(tmp_path)


def test_a_stream_refuses_what_would_never_end():
    with pytest.raises(ValueError, match="batch_size must be at most .* got 12"):
        next(iter(stream_loader(make_accelerator(), batch_size=12)))
    loader = DataLoader(stream_of([png(0)]), num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers must be False"):
        prepare_loader(make_accelerator(), loader)


# Two processes


def in_two_processes(target, *arguments):
    """Exit codes of two forks that do `target(*arguments)` as processes of one training."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=as_rank, args=(rank, port, target, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def as_rank(rank, port, target, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    target(*arguments)


def read_together(place):
    """Write which images this process was given: streamed, streamed and resumed, and stored."""

    def make_stream():
        accelerator = make_accelerator()
        share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        stream = StreamedImages(load_images(place / "tables", "train", streaming=True), shuffle_buffer=4, **share)
        loader = DataLoader(stream, 2, collate_fn=make_collator(label_column="number"), drop_last=True)
        return accelerator, stream, prepare_loader(accelerator, loader)

    def labels(batches):
        result = []
        for batch in batches:
            accelerator.reduce(batch["pixel_values"])  # waits for the other process's batch
            result.append(batch["class_labels"].tolist())
        return result

    accelerator, stream, loader = make_stream()
    result = {"processes": accelerator.num_processes, "once": numbers(stream)}
    batches = iter(loader)
    labels(itertools.islice(batches, 5))
    accelerator.save_state(place / "state")
    accelerator.wait_for_everyone()
    result["uninterrupted"] = labels(itertools.islice(batches, 7))

    accelerator, stream, loader = make_stream()
    accelerator.load_state(place / "state")
    result["resumed"] = labels(itertools.islice(loader, 7))

    dataset = load_images(place / "tables", "train")
    stored = DataLoader(dataset, 2, shuffle=True, collate_fn=make_collator(label_column="number"))
    stored = prepare_loader(accelerator, stored)
    stored.set_epoch(1)
    result["stored"] = labels(stored)
    rest = accelerator.skip_first_batches(stored, 2)
    rest.set_epoch(1)
    result["skipped"] = labels(rest)
    (place / f"{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.end_training()


def test_two_processes_share_the_images_and_neither_runs_dry(tmp_path):
    write_tables(tmp_path / "tables", [9, 3])  # a stream gives one process 9 images and the other 3
    assert in_two_processes(read_together, tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert sorted([len(one["once"]), len(two["once"])]) == [3, 9]
    assert sorted(one["once"] + two["once"]) == list(range(12))
    assert sorted(sum(one["stored"] + two["stored"], [])) == list(range(12))
    for result in (one, two):
        assert result["processes"] == 2
        assert result["resumed"] == result["uninterrupted"] and len(result["resumed"]) == 7
        assert result["skipped"] == result["stored"][2:] and len(result["stored"]) == 3


def test_a_place_that_is_neither_a_path_nor_a_data_set_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="photos/cats is no local folder or file, and no data set of the Hub"):
        load_images("photos/cats", "train")
