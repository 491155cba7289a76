import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_emoji_dataset", EXAMPLES / "build_emoji_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return load_dataset(str(EXAMPLES / "data" / "emoji"), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pixels(emoji):
    """All pictures, (3812, 64, 64, 3) uint8."""
    return np.stack([np.asarray(image) for split in ("train", "test") for image in emoji[split]["image"]])


def test_counts_of_splits_and_classes(emoji):
    assert {name: len(split) for name, split in emoji.items()} == {"train": 3426, "test": 386}
    names = emoji["train"].features["label"].names
    assert names == ["people", "flags", "objects", "symbols", "travel", "smileys", "animals", "food", "activities"]
    assert np.bincount(emoji["train"]["label"]).tolist() == [702, 488, 470, 414, 392, 302, 268, 234, 156]
    assert np.bincount(emoji["test"]["label"]).tolist() == [70, 52, 58, 34, 44, 36, 50, 28, 14]


def test_splits_share_no_emoji_and_keep_both_vendors_together(emoji):
    codepoints = {name: split["codepoints"] for name, split in emoji.items()}
    assert set(codepoints["train"]).isdisjoint(codepoints["test"])
    assert emoji["train"].features["vendor"].names == ["google", "twitter"]
    for name, split in emoji.items():
        pairs = set(zip(codepoints[name], split["vendor"]))
        assert pairs == {(codepoint, vendor) for codepoint in codepoints[name] for vendor in (0, 1)}
        assert len(pairs) == len(split)


def test_captions_are_lower_case_name_and_subcategory(emoji):
    captions = dict(zip(emoji["train"]["codepoints"], emoji["train"]["caption"]))
    assert captions["1F923"] == "rolling on the floor laughing, face smiling"
    assert all(caption == caption.lower() and ", " in caption for caption in captions.values())


def test_pictures_are_rgb_on_white(emoji, pixels):
    assert emoji["test"][0]["image"].mode == "RGB"
    assert pixels.shape == (3812, 64, 64, 3)
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=(1, 2)).mean() > 0.9
    assert not (pixels == 255).all(axis=(1, 2, 3)).any()


def test_pictures_are_embedded(emoji):
    undecoded = emoji["test"].cast_column("image", type(emoji["test"].features["image"])(decode=False))
    assert all(image["path"] is None and image["bytes"].startswith(b"\x89PNG") for image in undecoded["image"])


def test_notice_names_sources_and_licences():
    notice = (EXAMPLES / "data" / "emoji" / "NOTICE.md").read_text(encoding="utf-8")
    for words in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC BY 4.0", "Cal Henderson", "MIT", "on white"):
        assert words in notice


def entry(unified, name, category, subcategory, **changes):
    """An entry of the source's emoji.json, as far as the builder reads it."""
    image = f"{unified.lower()}.png"
    return {
        "unified": unified,
        "name": name,
        "category": category,
        "subcategory": subcategory,
        "image": image,
        "has_img_google": True,
        "has_img_twitter": True,
        "skin_variations": {"1F3FB": {"image": f"{unified.lower()}-1f3fb.png"}},
    } | changes


@pytest.fixture
def packages(tmp_path):
    """The two source packages with four entries: train, dropped category, test, and train but not drawn by Google."""
    entries = [
        entry("1F44B", "WAVING HAND SIGN", "People & Body", "hand-fingers-open"),
        entry("1F3FB", "EMOJI MODIFIER FITZPATRICK TYPE-1-2", "Component", "skin-tone"),
        entry("1F348", "MELON", "Food & Drink", "food-fruit"),
        entry("1F431", "CAT FACE", "Animals & Nature", "animal-mammal", has_img_google=False),
    ]
    folders = {}
    for vendor in ("google", "twitter"):
        folders[vendor] = tmp_path / vendor
        image_dir = folders[vendor] / "img" / vendor / "64"
        image_dir.mkdir(parents=True)
        (folders[vendor] / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
        for item in entries:
            if item[f"has_img_{vendor}"]:
                picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
                picture.paste((255, 0, 0, 255), (16, 16, 32, 48))
                picture.paste((0, 0, 255, 51), (32, 16, 48, 48))
                picture.save(image_dir / item["image"])
    return folders


def test_builder_keeps_the_drawn_emoji_of_the_nine_classes(builder, packages, tmp_path):
    dataset = builder.build(packages)
    builder.save(dataset, tmp_path / "out")
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded["test"]["codepoints"]) == {"1F348"}
    rows = [row for split in loaded.values() for row in split]
    names = loaded["train"].features["label"].names
    found = {(row["codepoints"], ("google", "twitter")[row["vendor"]], names[row["label"]]) for row in rows}
    assert found == {
        ("1F44B", "google", "people"),
        ("1F44B", "twitter", "people"),
        ("1F348", "google", "food"),
        ("1F348", "twitter", "food"),
        ("1F431", "twitter", "animals"),
    }
    assert len(rows) == len(found)
    assert {row["caption"] for row in rows} >= {"waving hand sign, hand fingers open", "melon, food fruit"}


def test_builder_composites_on_white(builder, packages):
    image = builder.build(packages)["train"][0]["image"]
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((20, 20)) == (255, 0, 0)
    # Alpha 51 of 255 is one fifth: 0.2 * (0, 0, 255) + 0.8 * (255, 255, 255).
    assert image.getpixel((40, 20)) == (204, 204, 255)


def test_builder_is_deterministic(builder, packages, tmp_path):
    first = builder.save(builder.build(packages), tmp_path / "first")
    second = builder.save(builder.build(dict(reversed(packages.items()))), tmp_path / "second")
    assert [path.read_bytes() for path in first.values()] == [path.read_bytes() for path in second.values()]


def test_existing_files_are_replaced_only_by_force(builder, packages, tmp_path):
    dataset = builder.build(packages)
    builder.save(dataset, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--force"):
        builder.save(dataset, tmp_path / "out")
    builder.save(dataset, tmp_path / "out", force=True)


def test_wrong_folder_and_missing_npm_say_what_to_do(builder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="expected the unpacked package emoji-datasource-google"):
        builder.read_package("google", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="--google_dir"):
        builder.fetch_package("google", tmp_path)


def test_a_failed_fetch_passes_on_the_reason(builder, tmp_path, monkeypatch):
    monkeypatch.setattr(builder.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no network")
    monkeypatch.setattr(builder.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="no network"):
        builder.fetch_package("twitter", tmp_path)
