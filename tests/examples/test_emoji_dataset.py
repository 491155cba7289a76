import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import concatenate_datasets, load_dataset
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = ("train", "test", "test_pairs")
STYLES = ["noto", "blob", "twemoji", "flat", "3d"]


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_emoji_dataset", EXAMPLES / "build_emoji_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The set in the repository


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return load_dataset(str(EXAMPLES / "data" / "emoji"), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pixels(emoji):
    """(N, 64, 64, 3) uint8 of all pictures, and the split of each."""
    images = [np.asarray(image) for split in SPLITS for image in emoji[split]["image"]]
    return np.stack(images), np.repeat(SPLITS, [len(emoji[split]) for split in SPLITS])


def test_what_the_splits_share_is_concepts_of_pairs_only(emoji):
    concepts = {split: set(emoji[split]["concept"]) for split in SPLITS}
    assert concepts["test"].isdisjoint(concepts["train"] | concepts["test_pairs"])
    assert concepts["test_pairs"] <= concepts["train"]
    pairs = [pair for split in SPLITS for pair in zip(emoji[split]["concept"], emoji[split]["style"])]
    assert len(pairs) == len(set(pairs))
    assert {split: len(emoji[split]) for split in SPLITS} == {"train": 7013, "test": 559, "test_pairs": 582}
    assert all(set(emoji[split]["style"]) == set(range(5)) for split in SPLITS)


def test_no_picture_occurs_twice_and_no_near_duplicate_is_in_two_splits(pixels):
    images, split = pixels
    assert len({image.tobytes() for image in images}) == len(images)
    # Means of 2x2 pixels, as distances from white: the builder's pictures of 32x32, but not rounded to whole numbers.
    means = images.reshape(len(images), 32, 2, 32, 2, 3).astype(np.float32).mean(axis=(2, 4))
    ink = 1 - means.reshape(len(images), -1) / 255
    energy = np.square(ink).sum(axis=1)
    for name in ("test", "test_pairs"):
        here, there = split == name, split != name
        energies = energy[here, None] + energy[there]
        assert (energies - 2 * ink[here] @ ink[there].T > 0.0195 * energies / 2).all()


def test_variants_of_one_person_are_in_one_split(emoji):
    concepts = {split: set(emoji[split]["concept"]) for split in ("train", "test")}

    def split_of(concept):
        return [split for split in concepts if concept in concepts[split]]

    for person in ("{}-200D-1F680", "{}-200D-1F9B0", "{}-200D-2695", "{}-200D-1F373", "{}-200D-1F33E"):
        splits = [split_of(person.format(gender)) for gender in ("1F468", "1F469", "1F9D1")]
        assert splits[0] == splits[1] == splits[2]
    for emoji_of_one in ("1F3C3", "1F6B6", "1F9D9", "1F486", "1F937"):
        assert split_of(emoji_of_one) == split_of(f"{emoji_of_one}-200D-2640") == split_of(f"{emoji_of_one}-200D-2642")
    assert len({tuple(split_of(f"{code:X}")) for code in range(0x1F550, 0x1F568)}) == 1  # clock faces


def test_captions_name_the_thing_and_the_style(emoji):
    rows = concatenate_datasets([emoji[split].remove_columns("image") for split in SPLITS])
    by_pair = {(row["concept"], STYLES[row["style"]]): row for row in rows}
    assert by_pair["1F40C", "flat"]["captions"] == [
        "snail",
        "animal, escargot, garden, nature, slug",
        "snail, animals",
        "snail, flat style",
        "animal, escargot, garden, nature, slug, flat style",
        "snail, animals, flat style",
    ]
    for row in rows:
        captions, style = row["captions"], STYLES[row["style"]]
        half = len(captions) // 2
        assert captions[half:] == [f"{caption}, {style} style" for caption in captions[:half]]
        assert all(caption == caption.lower().strip() != "" for caption in captions)


def test_prompts_are_captions_of_training_pictures_in_several_styles(emoji, builder):
    prompts = (EXAMPLES / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == builder.prompts(emoji) and len(set(prompts)) == 32
    assert set(prompts) <= {caption for captions in emoji["train"]["captions"] for caption in captions}
    assert {prompt.rpartition(", ")[2].removesuffix(" style") for prompt in prompts} == set(STYLES)


def test_letters_are_marked(emoji):
    letters = dict(zip(emoji["train"]["concept"], emoji["train"]["letters"]))
    assert all(letters[concept] for concept in ("1F1E6-1F1F9", "0033-20E3", "1F19A", "27A1", "1F559", "1F5FE"))
    assert not any(letters[concept] for concept in ("1F600", "2764", "1F98A", "1F697"))


def test_files_are_small_and_hold_their_pictures(emoji, pixels):
    files = list((EXAMPLES / "data" / "emoji" / "data").iterdir())
    assert all(path.stat().st_size <= 20e6 for path in files)
    assert sum(path.stat().st_size for path in files) <= 28e6
    undecoded = emoji["test"].cast_column("image", ImageFeature(decode=False))["image"]
    assert all(image["path"] is None and image["bytes"][8:16] == b"WEBPVP8L" for image in undecoded)
    images, _ = pixels
    assert images.shape[1:] == (64, 64, 3)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=(1, 2)).mean() > 0.75
    assert not (images == 255).all(axis=(1, 2, 3)).any()


def test_notice_names_sources_and_licences():
    notice = (EXAMPLES / "data" / "emoji" / "NOTICE.md").read_text(encoding="utf-8")
    for words in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC BY 4.0", "Microsoft", "LobeHub", "Miles Johnson"):
        assert words in notice


# The builder, on packages with four emoji


def pack(folder, package, files):
    """The .tgz file that `npm pack` would write."""
    name = package.lstrip("@").replace("/", "-").replace("@", "-")
    with tarfile.open(folder / f"{name}.tgz", "w:gz") as archive:
        for path, content in files.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def rectangle(fill, x=0, width=8, opacity=1.0):
    return {"body": f'<path fill="{fill}" fill-opacity="{opacity}" d="M{x} 0h{width}v16h-{width}z"/>'}


@pytest.fixture
def packages(tmp_path, builder):
    """A fox and a pointing hand in five styles; a plus of which two styles draw the same; a component; skin tones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    entries = [
        {"hexcode": "1F98A", "label": "Fox", "tags": ["face", "fox", "Sly"], "group": 3, "subgroup": 34},
        {"hexcode": "1F449", "label": "backhand index pointing right", "group": 1, "subgroup": 18},
        {"hexcode": "2764-FE0F", "label": "lover’s heart", "tags": ["love"], "group": 0, "subgroup": 14},
        {"hexcode": "1F3FB", "label": "light skin tone", "group": 2, "subgroup": 32},
    ]
    names = {
        "groups": {"0": "smileys-emotion", "1": "people-body", "2": "component", "3": "animals-nature"},
        "subgroups": {"14": "heart", "18": "hand-single-finger", "32": "skin-tone", "34": "animal-mammal"},
    }
    pack(folder, builder.CAPTIONS_PACKAGE, {"en/data.json": entries, "meta/groups.json": names})
    chars = {"1f98a": "fox", "1f449": "hand", "1f449-1f3fb": "hand", "2764": "lovers-heart", "1f3fb": "skin"}
    for index, style in enumerate(("noto", "blob", "twemoji", "flat")):
        icons = {
            "fox": rectangle("#f80", width=9 + index),
            "left": rectangle("#00f", width=2 + index),
            "lovers-heart": rectangle("#f00", opacity=0.2 if index < 2 else 1 / (index + 1)),
            "skin": rectangle("#fc0"),
        }
        if style == "blob":  # no table of code points: names as in the other sets, and as in the labels
            icons |= {"hand": rectangle("#0ff")}
            files = {"chars.json": {}, "icons.json": {"icons": icons, "width": 16, "height": 16}}
        else:
            aliases = {"hand": {"parent": "left", "hFlip": True}}
            icons = {"icons": icons, "aliases": aliases, "width": 16, "height": 16}
            files = {"chars.json": chars, "icons.json": icons}
        pack(folder, builder.PACKAGES[style], files)
    files = {}
    for name in ("1f98a", "1f449", "1f3fb", "2764-fe0f", "1f449-1f3fb"):
        buffer = io.BytesIO()
        Image.new("RGBA", (32, 32), (len(name), 80, 0, 128)).save(buffer, format="WEBP", lossless=True)
        files[f"assets/{name}.webp"] = buffer.getvalue()
    pack(folder, builder.PACKAGES["3d"], files)
    return folder


def rows_of(dataset):
    rows = concatenate_datasets(list(dataset.values()))
    return {(row["concept"], STYLES[row["style"]]): row for row in rows}


def test_builder_takes_what_has_a_label_in_every_style(builder, packages, tmp_path):
    builder.save(builder.build(packages, size=16), tmp_path / "out")
    rows = rows_of(load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")))
    missing = {("2764", "blob"), ("1F449", "3d")}  # equal to noto's heart; equal to the fox in 3d
    assert set(rows) == {(key, style) for key in ("1F98A", "1F449", "2764") for style in STYLES} - missing
    assert rows["1F98A", "noto"]["captions"][:3] == ["fox", "face, sly", "fox, animals"]
    assert rows["2764", "flat"]["captions"][3] == "lover's heart, flat style"
    assert [rows[key, "noto"]["letters"] for key in ("1F98A", "1F449", "2764")] == [False, True, False]


def test_builder_draws_on_white(builder, packages):
    rows = rows_of(builder.build(packages, size=16))
    picture = np.asarray(rows["2764", "noto"]["image"])
    assert picture.shape == (16, 16, 3)
    # 0.2 * (255, 0, 0) + 0.8 * (255, 255, 255), left of the middle.
    assert picture[8, 2].tolist() == [255, 204, 204] and picture[8, 12].tolist() == [255, 255, 255]
    mirrored = np.asarray(rows["1F449", "noto"]["image"])
    assert mirrored[8, 15].tolist() == [0, 0, 255] and mirrored[8, 0].tolist() == [255, 255, 255]


def test_builder_is_deterministic_and_replaces_only_by_force(builder, packages, tmp_path):
    dataset = builder.build(packages, size=16)
    first = builder.save(dataset, tmp_path / "first")
    second = builder.save(builder.build(packages, size=16), tmp_path / "second")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with pytest.raises(FileExistsError, match="--force"):
        builder.save(dataset, tmp_path / "first")
    assert builder.save(dataset, tmp_path / "first", force=True) == first


def test_large_splits_are_written_in_shards(builder, packages, tmp_path):
    dataset = builder.build(packages, size=16)
    rows = sum(len(part) for part in dataset.values())
    paths = builder.save(dataset, tmp_path / "out", shard_megabytes=0.001)
    assert len(paths) > len(dataset)
    assert len(rows_of(load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")))) == rows


def test_near_duplicates_stay_together(builder):
    """Random pictures of 200 concepts in three styles; some are copies with a little noise."""
    rng = np.random.default_rng(0)
    concepts = {f"{1000 + i}": builder.Concept(f"thing {i}", [], "objects", False) for i in range(200)}
    pictures = {
        (concept, style): rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for style in ("noto", "blob", "3d")
        for concept in concepts
    }
    items = list(pictures)
    copies = [(items[i], items[j]) for i, j in rng.integers(0, len(items), (60, 2)) if i != j]
    copies += [((concept, "noto"), (concept, "3d")) for concept in list(concepts)[::4]]
    for members in builder.group(items, lambda item: item, copies):
        for member in members:
            noise = rng.integers(-3, 4, (32, 32, 3))
            pictures[member] = np.clip(pictures[members[0]] + noise, 0, 255).astype(np.uint8)
    split = builder.split_pictures(pictures, concepts)

    assert set(split) == set(items) and set(split.values()) == set(SPLITS)
    assert all(split[first] == split[second] for first, second in copies)
    of_concept = [{split[concept, style] for style in ("noto", "blob", "3d")} for concept in concepts]
    assert all(splits == {"test"} or "train" in splits and "test" not in splits for splits in of_concept)


def test_wrong_folder_and_missing_npm_say_what_to_do(builder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"npm pack emojibase-data@17\.0\.0"):
        builder.build(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="--packages"):
        builder.fetch_packages(tmp_path)


def test_a_failed_fetch_passes_on_the_reason(builder, tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no network"):
        builder.fetch_packages(tmp_path)
