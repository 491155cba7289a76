"""Folders of images as people have them: splits, classes, captions, links, and paths with any signs."""

import json
import os
import zipfile

import datasets
import pytest
from PIL import Image

from dq_hf.data.image_folders import image_names
from dq_hf.data.images import decode_image, drop_broken_images, load_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder, names):
    """Plain images, each of the grey value of its place in the list."""
    for grey, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), grey).save(folder / name)
    return folder


def greys(dataset):
    return [decode_image(row["image"]).getpixel((0, 0)) for row in dataset]


both = pytest.mark.parametrize("streaming", [False, True])


@both
def test_splits_are_the_folders_at_the_top_whatever_classes_and_files_are_called(tmp_path, streaming):
    names = ["test/test/a.png", "test/train/train.png", "train/test/b.png", "train/train/validation.png"]
    write(tmp_path, names)
    train, test = (load_images(tmp_path, split, streaming=streaming) for split in ("train", "test"))
    assert greys(train) == [2, 3] and greys(test) == [0, 1]
    assert train.features["label"].names == test.features["label"].names == ["test", "train"]
    assert [row["label"] for row in train] == [row["label"] for row in test] == [0, 1]


def test_any_split_is_read_and_usual_names_stand_for_each_other(tmp_path):
    write(tmp_path, ["train/a.png", "val/b.png", "pairs/c.png"])
    assert [greys(load_images(tmp_path, split)) for split in ("validation", "val", "pairs")] == [[1], [1], [2]]
    with pytest.raises(
        ValueError, match="has no split 'test'; it has pairs, train, val; put images into .*test, or name"
    ):
        load_images(tmp_path, "test")
    with pytest.raises(
        ValueError, match="has no folders of splits, so all its images are in that one; put images into"
    ):
        load_images(tmp_path / "train", "test")


def test_a_class_is_the_first_folder_below_the_split(tmp_path):
    write(tmp_path, ["train/cat/a.png", "train/cat/small/b.png", "train/dog/2024/c.png", "test/bird/d.png"])
    dataset = load_images(tmp_path, "train")
    assert dataset.features["label"].names == ["bird", "cat", "dog"]
    assert greys(dataset) == [0, 1, 2] and dataset["label"][:] == [1, 1, 2]


def test_one_class_is_a_class_and_images_in_no_folder_have_no_label(tmp_path):
    write(
        tmp_path,
        ["one/train/cat/a.png", "none/train/b.png", "none/test/c.png", "mixed/train/d.png", "mixed/train/cat/e.png"],
    )
    assert load_images(tmp_path / "one", "train").features["label"].names == ["cat"]
    assert load_images(tmp_path / "none", "train").column_names == ["image"]
    assert sorted(load_images(tmp_path / "mixed", "train")["label"][:], key=str) == [0, None]


@both
def test_links_are_followed_and_no_circle_is(tmp_path, streaming):
    write(tmp_path / "elsewhere", ["cats/a.png", "b.png"])
    (tmp_path / "set" / "test").mkdir(parents=True)
    (tmp_path / "set" / "train").mkdir()
    (tmp_path / "set" / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "set" / "train" / "dog").mkdir()
    (tmp_path / "set" / "train" / "dog" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "set" / "train" / "dog" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "set" / "train")
    (tmp_path / "set link").symlink_to(tmp_path / "set")
    for name in ("set", "linked", "set link"):
        dataset = load_images(tmp_path / name, "train", streaming=streaming)
        assert greys(dataset) == [0, 1] and dataset.features["label"].names == ["cat", "dog"]


@both
@pytest.mark.parametrize("name", ["set [v2]", "a*b?", "**", "{x,y}", "#1 50%", "\u00fc, \u96ea"])
def test_every_path_is_read(tmp_path, name, streaming):
    write(tmp_path / name / "images", ["train/[cat]/a[1].png", "train/do*g/b?.png"])
    dataset = load_images(tmp_path / name / "images", "train", streaming=streaming)
    assert greys(dataset) == [0, 1] and dataset.features["label"].names == ["[cat]", "do*g"]
    (tmp_path / name / "tables [1]").mkdir()
    images = datasets.Dataset.from_dict(
        {"image": [Image.new("L", (4, 4), 7)]}, datasets.Features({"image": datasets.Image()})
    )
    file = tmp_path / name / "tables [1]" / "train-00000-of-00001.parquet"
    images.to_parquet(file)
    assert greys(load_images(file.parent, "train", streaming=streaming)) == [7]
    assert greys(load_images(file, "train", streaming=streaming)) == [7]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/a.png"])
def test_an_image_whose_name_is_no_utf8_is_named_where_a_table_is_to_hold_it(tmp_path, name):
    write(tmp_path, ["train/b.png", "train/c.png"])
    place = os.path.join(os.fsencode(tmp_path / "train"), name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.rename(tmp_path / "train" / "b.png", place)
    for read in (image_names, lambda folder: load_images(folder, "train")):
        with pytest.raises(ValueError, match=r"must be UTF-8, got b'.*caf\\xe9.*'; rename it"):
            read(tmp_path)
    assert sorted(greys(load_images(tmp_path, "train", streaming=True))) == [0, 1]


@both
def test_captions_are_read_from_text_files_beside_the_images(tmp_path, streaming):
    write(tmp_path, ["train/a.png", "train/b.jpg", "train/c.png"])
    (tmp_path / "train" / "a.txt").write_text("a snail\nflat style\n", "utf-8")
    (tmp_path / "train" / "c.txt").write_text("\u96ea", "utf-8")
    assert [row["text"] for row in load_images(tmp_path, "train", streaming=streaming)] == [
        ["a snail", "flat style"],
        [],
        ["\u96ea"],
    ]
    (tmp_path / "train" / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="c.txt must be a text in UTF-8"):
        load_images(tmp_path, "train")


@both
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("at_the_top", [False, True])
def test_further_columns_are_read_from_metadata(tmp_path, kind, at_the_top, streaming):
    write(tmp_path, ["train/x/a.png", "train/b.png", "test/c.png"])
    place, prefix = (tmp_path, "train/") if at_the_top else (tmp_path / "train", "")
    rows = [{"file_name": f"{prefix}x/a.png", "text": "first"}, {"file_name": f"{prefix}gone.png", "text": "lost"}]
    table = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        getattr(table, f"to_{kind}")(place / f"metadata.{kind}")
    dataset = load_images(tmp_path, "train", streaming=streaming)
    assert [row["text"] for row in dataset] == [None, "lost", "first"] and "label" not in dataset.features
    if not streaming:
        assert greys(drop_broken_images(dataset, max_share=0.5)) == [1, 0]


def test_tables_of_other_names_are_not_read_and_one_warning_names_them(tmp_path, caplog):
    write(tmp_path, ["train/a.png"])
    for name in ("captions.csv", "train/Metadata.CSV", "train/notes.json"):
        (tmp_path / name).write_text("file_name,text\na.png,snail")
    dataset = load_images(tmp_path, "train")
    (record,) = caplog.records
    assert "3 file(s) beside images are not read, such as " in record.getMessage()
    assert "captions.csv; captions stand in metadata.jsonl, metadata.csv" in record.getMessage()
    caplog.clear()
    for name in ("captions.csv", "train/Metadata.CSV", "train/notes.json"):
        (tmp_path / name).unlink()
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,snail")
    assert load_images(tmp_path, "train")["text"][:] == ["snail"] and not caplog.records
    assert dataset.column_names == ["image"]


def test_files_of_unknown_endings_are_not_read_and_one_warning_a_split_names_them(tmp_path, caplog):
    write(tmp_path, ["train/cat/a.png", "test/cat/b.png"])
    for name in ("train/dog/1.heic", "train/dog/0.heic", "train/cat/c.QOI", "train/cat/plain"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in (
        "train/cat/a.txt",
        "train/cat/a.xml",
        "train/LICENSE",
        "train/README.md",
        "train/.hidden",
        "README.md",
        "LICENSE",
    ):
        (tmp_path / name).write_text("a cat")
    warning = "4 file(s) in {} are not read, such as {}; convert them to .png or .jpg if they are images"
    for split in ("train", "test"):
        load_images(tmp_path, split)
    assert [record.getMessage() for record in caplog.records] == [warning.format(tmp_path / "train", "cat/c.QOI")]
    caplog.clear()
    assert image_names(tmp_path / "train") == ["cat/a.png"]
    assert [record.getMessage() for record in caplog.records] == [warning.format(tmp_path / "train", "cat/c.QOI")]
    caplog.clear()
    names = ("dog/0.heic", "dog/1.heic", "cat/c.QOI", "cat/plain")
    rows = [{"file_name": name, "kind": "read"} for name in names]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_images(tmp_path, "train")) == 5 and not caplog.records


def test_a_folder_named_by_a_path_through_another_has_the_same_captions(tmp_path, monkeypatch):
    write(tmp_path, ["train/a.png", "beside/b.png"])
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "snail"}')
    monkeypatch.chdir(tmp_path / "beside")
    assert (
        load_images("..", "train")["text"][:] == load_images("../../" + tmp_path.name, "train")["text"][:] == ["snail"]
    )


@pytest.mark.parametrize("caption", ["a\u2028b\x85c\x0b", "caf\u00e9, \u96ea", 'say "so"'])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "TXT"])
def test_a_caption_is_read_as_it_is_written_with_and_without_a_byte_order_mark(tmp_path, kind, mark, caption):
    write(tmp_path, ["train/0.png"])
    quoted = caption.replace('"', '""')
    texts = {
        "jsonl": json.dumps({"file_name": "0.png", "text": [caption]}, ensure_ascii=False),
        "csv": f'file_name,text\r\n0.png,"{quoted}"\r\n',
        "TXT": caption + "\r\n",
    }
    name = "0.TXT" if kind == "TXT" else f"metadata.{kind}"
    (tmp_path / "train" / name).write_text(texts[kind], mark, newline="")
    assert load_images(tmp_path, "train")["text"][0] == (caption if kind == "csv" else [caption])


def test_captions_of_several_lines_are_read_from_a_long_csv(tmp_path):
    write(tmp_path, ["train/0.png"])
    rows = [
        f'{number}.png,"{"word " * 20}\nsecond line"' for number in range(12_000)
    ]  # more than the reader's block of 1 MiB
    (tmp_path / "train" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    dataset = load_images(tmp_path, "train")
    assert len(dataset) == 12_000 and set(dataset["text"][:]) == {"word " * 20 + "\nsecond line"}


@pytest.mark.parametrize(
    ("place", "name", "text", "message"),
    [
        (
            "train",
            "metadata.csv",
            "file_name,text\na.png,x\na.png,y",
            "metadata.csv has a second 'text' of .*a.png; leave one of them, and give several captions as a list",
        ),
        ("train", "metadata.csv", "file_name,image\na.png,x", "metadata.csv has a column image"),
        ("train", "metadata.csv", b"file_name,text\na.png,caf\xe9", "must be a text in UTF-8"),
        (
            "train",
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": ["x"]}',
            "column 'text' of the metadata in .* must have one type, got list, str",
        ),
        (
            ".",
            "metadata.csv",
            "file_name,text\na.png,x",
            r"metadata.csv names no file of the splits \(train\).*a.png; file_name must",
        ),
        (".", "metadata.csv", "file_name,text\ntrain\\a.png,x", r"names no file of the splits \(train\)"),
    ],
)
def test_metadata_of_which_captions_would_be_lost_are_refused(tmp_path, place, name, text, message):
    write(tmp_path, ["train/a.png", "train/b.png"])
    (tmp_path / place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, "train")


@pytest.mark.parametrize("text", ["{", '["a"]', '{"text": "a"}'])
def test_damaged_metadata_are_named(tmp_path, text):
    write(tmp_path, ["train/a.png"])
    (tmp_path / "train" / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metadata.jsonl must have rows with a column file_name"):
        load_images(tmp_path, "train")


def test_columns_of_several_files_of_metadata_come_together_and_none_is_lost(tmp_path):
    write(tmp_path, ["train/a.png", "train/b.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/a.png", "kind": "cat"}')
    (tmp_path / "train/metadata.csv").write_text("file_name,text\na.png,a cat")
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "b.png", "size": 3}')
    rows = [{name: row[name] for name in ("kind", "text", "size")} for row in load_images(tmp_path, "train")]
    assert rows == [dict(kind="cat", text="a cat", size=None), dict(kind=None, text=None, size=3)]
    assert load_images(tmp_path / "train", "train")["text"][:] == ["a cat", None]  # a folder without splits
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.png,another")
    with pytest.raises(ValueError, match="train/metadata.csv has a second 'text' of .*a.png; leave one"):
        load_images(tmp_path, "train")


def test_splits_in_capitals_are_splits(tmp_path):
    write(tmp_path, ["Train/cat/a.png", "TEST/dog/b.png"])
    for split in ("train", "test"):
        dataset = load_images(tmp_path, split)
        assert len(dataset) == 1 and dataset.features["label"].names == ["cat", "dog"]


def test_splits_may_lie_in_a_folder_named_data(tmp_path):
    write(tmp_path / "splits", ["data/train/cat/a.png", "data/test/dog/b.png"])
    for split in ("train", "test"):
        dataset = load_images(tmp_path / "splits", split)
        assert len(dataset) == 1 and dataset.features["label"].names == ["cat", "dog"]
    (tmp_path / "splits" / "data" / "metadata.csv").write_text("file_name,text\ntrain/cat/a.png,a cat\n")
    assert load_images(tmp_path / "splits", "train")["text"][:] == ["a cat"]
    write(tmp_path / "classes", ["data/cat/a.png", "data/dog/b.png"])
    assert load_images(tmp_path / "classes", "train").features["label"].names == ["cat", "dog"]
    write(tmp_path / "both", ["data/a.png", "b.png"])
    assert len(load_images(tmp_path / "both", "train")) == 2


def test_a_class_that_another_split_gains_is_known_without_deleting_a_cache(tmp_path):
    write(tmp_path, ["train/cat/a.png", "test/cat/b.png"])
    assert load_images(tmp_path, "train").features["label"].names == ["cat"]
    write(tmp_path, ["test/dog/c.png"])
    assert load_images(tmp_path, "train").features["label"].names == ["cat", "dog"]


def test_images_that_the_folders_of_splits_leave_out_are_told(tmp_path, caplog):
    write(tmp_path / "classes", ["car/a.png", "plane/b.png", "train/c.png"])
    write(tmp_path / "beside", ["train/a.png", "test/b.png", "c.png", "d.png"])
    write(tmp_path / "right", ["train/a.png", "test/b.png", "others/c.png"])
    for name in ("classes", "beside", "right"):
        load_images(tmp_path / name, "train")
    first, second = (record.getMessage() for record in caplog.records)
    assert "taken for splits, because train is one's name: car, plane, train; if they are classes, put them" in first
    assert "2 image(s) beside the splits" in second and "such as c.png" in second


def test_a_table_that_makes_it_no_folder_of_images_is_named(tmp_path):
    write(tmp_path, ["train/0.png"])
    (tmp_path / "train/0.txt").write_text("a cat")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "train/0.txt", "0.txt")
    with pytest.raises(ValueError, match="no column 'image'.* because of .*all.zip: move that away"):
        load_images(tmp_path, "train")


def test_damaged_tables_are_named(tmp_path):
    datasets.Dataset.from_dict({"image": [b"x" * 1000] * 50}).to_parquet(tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:80] = bytes(255 - byte for byte in data[4:80])
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="a.parquet is damaged: "):
        load_images(tmp_path / "a.parquet", "train")
