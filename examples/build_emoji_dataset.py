"""Build the captioned emoji set of the examples: the same things drawn in five styles, 64x64, with captions.

Fetch the six source packages (30 MB, needs npm) and build (needs `pip install resvg-py`):

    python examples/build_emoji_dataset.py --output_dir /tmp/emoji

Build from packages that `npm pack` fetched before, replacing the copy in this repository:

    mkdir packages && (cd packages && npm pack @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \\
        @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0 \\
        emojibase-data@17.0.0)
    python examples/build_emoji_dataset.py --packages packages --force --picture docs/images/emoji-styles.png \
        --prompts examples/data/prompts.txt

Then `datasets.load_dataset("examples/data/emoji")` has the splits `train`, `test` (concepts of which training has no
picture) and `test_pairs` (pictures whose concept training has in other styles only); `prompts.txt` has the prompts by
which samples are judged. The pictures keep their own licences, see examples/data/emoji/NOTICE.md.
"""

import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import ChainMap, Counter
from dataclasses import dataclass, field
from pathlib import Path

import networkx
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import HfArgumentParser

from dq_hf.pictures import image_grid

# Style -> package. Where two styles draw a concept alike, pixel by pixel, the picture counts for the first of them.
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
CAPTIONS_PACKAGE = "emojibase-data@17.0.0"
# Group of the source -> category, in label order. The remaining group, "component", holds skin tones and hair.
CATEGORIES = {
    "people-body": "people",
    "flags": "flags",
    "objects": "objects",
    "symbols": "symbols",
    "travel-places": "travel",
    "smileys-emotion": "smileys",
    "animals-nature": "animals",
    "food-drink": "food",
    "activities": "activities",
}
NUM_PROMPTS = 32
NUM_KEYWORDS = 5  # at most, in a caption of keywords
# Column `letters`: pictures that are wrong when mirrored (letters, digits, flags, arrows, clocks, maps), by the subgroup
# of the source or by a word of the label. It marks rather too many.
LETTER_SUBGROUPS = {
    "country-flag", "flag", "subdivision-flag", "keycap", "alphanum", "zodiac", "religion", "punctuation", "currency",
    "math", "av-symbol", "transport-sign", "arrow", "time", "award-medal", "money", "book-paper",
}  # fmt: skip
LETTER_WORDS = re.compile(
    r"\b(left|right|clockwise|counterclockwise|quarter|waxing|waning|crescent|map|globe|chart|symbols?|mark|button"
    r"|sign|numbers?|input|label|calendar|8 ball|mahjong|joker|playing card|slot machine|die|ticket|identification"
    r"|name badge|passport|customs|baggage|eighteen|stop|bank|atm|hotel|hospital|post office|convenience store"
    r"|restroom|room|water closet|police car|ambulance|taxi|keyboard|musical|optical|speech|anger|zzz|sleeping"
    r"|hundred points)\b"
)
TEST_ONE_IN = 12  # groups of concepts, and of the others' pictures
# Two pictures are near duplicates when their squared difference is below this share of their mean squared distance
# from white. Variants of one person and flags with different small coats of arms are closer, most faces are not.
NEAR_DUPLICATE = 0.02
# Code points of man, woman, boy, girl, child and the like; of joiner, gender, direction and hair; and of the persons
# that have a code point of their own for a gender.
PERSONS = {"1F466", "1F467", "1F468", "1F469", "1F474", "1F475", "1F9D1", "1F9D2", "1F9D3", "1F471", "1F9D4"}
PERSON_VARIANTS = {"200D", "2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
SAME_PERSON = {
    **dict.fromkeys(("1F46A", "1F46B", "1F46C", "1F46D", "1F48F", "1F491"), "family"),
    **dict.fromkeys(("1F934", "1F478", "1FAC5"), "royal"),
    **dict.fromkeys(("1F385", "1F936", "person-1F384"), "claus"),
    **dict.fromkeys(("1F930", "1FAC3", "1FAC4"), "pregnant"),
}

FEATURES = Features(
    {
        "image": Image(),
        "captions": List(Value("string")),
        "concept": Value("string"),
        "style": ClassLabel(names=list(PACKAGES)),
        "category": ClassLabel(names=list(CATEGORIES.values())),
        "letters": Value("bool"),
    }
)


@dataclass
class BuildArguments:
    output_dir: str = field(default="examples/data/emoji", metadata={"help": "Folder for the Parquet files."})
    packages: str | None = field(
        default=None, metadata={"help": "Folder with the .tgz files of the packages; fetched with npm when missing."}
    )
    size: int = field(default=64, metadata={"help": "Height and width of the pictures."})
    shard_megabytes: float = field(default=20, metadata={"help": "The largest Parquet file."})
    picture: str | None = field(
        default=None, metadata={"help": "Also write an overview here: twelve concepts in the five styles."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Also write prompts here, a line each: captions of training pictures."}
    )
    force: bool = field(default=False, metadata={"help": "Replace existing Parquet files."})


# Packages


def fetch_packages(folder):
    """Download the .tgz files of all packages into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed to fetch the emoji; install Node.js or pass --packages")
    for package in (*PACKAGES.values(), CAPTIONS_PACKAGE):
        done = subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"`npm pack {package}` failed; pass --packages instead\n{done.stderr.strip()}")


def read_package(folder, package, wanted):
    """Mapping of file name to bytes: the files of the package whose path below its root matches `wanted`."""
    path = Path(folder) / f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected the file that `npm pack {package}` writes")
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix("package/"): archive.extractfile(member).read()
            for member in archive
            if re.fullmatch(f"package/{wanted}", member.name)
        }


def concept_key(code_points):
    """Code points in one spelling: upper-case hexadecimal of four digits or more, joined by "-", without FE0F."""
    parts = [int(part, 16) for part in re.split("[-_]", code_points)]
    # A flag of a subdivision ends with a cancel tag, which some packages leave out of their names.
    return "-".join(f"{part:04X}" for part in parts if part not in (0xFE0F, 0xE007F))


# Captions


@dataclass
class Concept:
    label: str
    keywords: list[str]
    category: str
    letters: bool

    def captions(self, style):
        """Label, keywords, and label with category; each without and with the style."""
        texts = [self.label, ", ".join(self.keywords[:NUM_KEYWORDS]), f"{self.label}, {self.category}"]
        texts = [text for text in texts if text]
        return texts + [f"{text}, {style} style" for text in texts]


def plain(text):
    """Lower case, with the apostrophes and quotation marks of a keyboard."""
    return re.sub("[“”]", '"', re.sub("[‘’]", "'", text.lower()))


def read_concepts(folder):
    """Mapping of key to `Concept`: all emoji but components; skin tones are nested in the source and left out."""
    files = read_package(folder, CAPTIONS_PACKAGE, r"(en/data|meta/groups)\.json")
    names = json.loads(files["meta/groups.json"])
    concepts = {}
    for entry in json.loads(files["en/data.json"]):
        category = CATEGORIES.get(names["groups"].get(str(entry.get("group"))))
        if category is None:
            continue
        label = plain(entry["label"])
        subgroup = names["subgroups"][str(entry["subgroup"])]
        concepts[concept_key(entry["hexcode"])] = Concept(
            label,
            keywords=[tag for tag in map(plain, entry.get("tags", ())) if tag not in label.split()],
            category=category,
            letters=subgroup in LETTER_SUBGROUPS or LETTER_WORDS.search(label) is not None,
        )
    return concepts


# Pictures


def read_vector_sets(folder, concepts):
    """Mapping of style to mapping of concept to SVG, of the packages that hold vector drawings."""
    sets = {}
    for style, package in PACKAGES.items():
        files = read_package(folder, package, r"(icons|chars)\.json")
        if files:
            sets[style] = {name: json.loads(content) for name, content in files.items()}
    # An old package has no table of code points: its names are looked up in those of the others, then in the labels.
    key_of_name = {}
    for files in sets.values():
        for code_points, name in files["chars.json"].items():
            key_of_name.setdefault(name, concept_key(code_points))
    for key, concept in concepts.items():
        key_of_name.setdefault(re.sub("[^a-z0-9]+", "-", concept.label.replace("'", "")).strip("-"), key)
    drawings = {}
    for style, files in sets.items():
        icons = files["icons.json"]
        named = {concept_key(code_points): name for code_points, name in files["chars.json"].items()}
        if not named:
            for name in sorted([*icons["icons"], *icons.get("aliases", {})]):
                if name in key_of_name:
                    named.setdefault(key_of_name[name], name)
        drawings[style] = {key: svg(icons, name) for key, name in named.items() if key in concepts}
    return drawings


def svg(icons, name):
    """One drawing of a set in Iconify's format as a whole SVG document; a narrower one is centred in the square."""
    alias = icons.get("aliases", {}).get(name, {})
    unknown = alias.keys() - {"parent", "hFlip"}
    if unknown:
        raise ValueError(f"alias {name} must only mirror its parent, got {sorted(unknown)}")
    icon = icons["icons"][alias.get("parent", name)]
    box = ChainMap(icon, icons, {"left": 0, "top": 0, "width": 16, "height": 16})
    left, top, width, height = (box[key] for key in ("left", "top", "width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def render_svg(document, size):
    """(size, size, 3) uint8, on white."""
    import resvg_py

    sized = document.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    return open_on_white(resvg_py.svg_to_bytes(svg_string=sized, background="#ffffff"), size)


def open_on_white(content, size):
    """(size, size, 3) uint8 of the bytes of an image file, on white."""
    with PILImage.open(io.BytesIO(content)) as image:
        image = image.convert("RGBA")
    image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((size, size), PILImage.Resampling.LANCZOS))


def read_pictures(folder, concepts, size):
    """Mapping of (concept, style) to (size, size, 3) uint8, by style and then in the order of the concepts."""
    pictures = {}
    drawings = read_vector_sets(folder, concepts)
    for style, package in PACKAGES.items():
        if style in drawings:
            sources, render = drawings[style], render_svg
        else:
            files = read_package(folder, package, r"assets/.*\.webp")
            sources, render = {concept_key(Path(name).stem): files[name] for name in sorted(files)}, open_on_white
        pictures |= {(key, style): render(sources[key], size) for key in concepts if key in sources}
    return pictures


# Splits


def group(items, key, pairs):
    """Sorted lists of the items, by their first ones: those for which `key` gives the same are in one, and so are pairs."""
    alike = {}
    links = [(item, alike.setdefault(key(item), item)) for item in items]
    return sorted(map(sorted, networkx.connected_components(networkx.Graph([*links, *pairs]))))


def subject(key, concept):
    """What variants of one thing share: a person in all genders, ages, hair and directions, families, clock faces."""
    if re.search("o'clock|-thirty", concept.label):
        return "clock"
    if concept.category != "people":
        return key
    parts = ["person" if part in PERSONS else part for part in key.split("-") if part not in PERSON_VARIANTS]
    return SAME_PERSON.get("-".join(parts), "family" if parts.count("person") > 1 else "-".join(parts))


def near_duplicates(pictures):
    """Pairs of indices (i < j) of near duplicates among (N, H, W, 3) uint8: alike at 32x32, see `NEAR_DUPLICATE`."""
    small = [PILImage.fromarray(image).resize((32, 32), PILImage.Resampling.BOX) for image in pictures]
    ink = 1 - np.stack(small).reshape(len(small), -1).astype(np.float32) / 255
    energy = (ink**2).sum(axis=1)
    pairs = []
    for start in range(0, len(ink), 512):
        block = slice(start, start + 512)
        energies = energy[block, None] + energy
        difference = energies - 2 * ink[block] @ ink.T
        rows, columns = np.nonzero(difference < NEAR_DUPLICATE * energies / 2)
        pairs += [(start + i, j) for i, j in zip(rows.tolist(), columns.tolist()) if start + i < j]
    return pairs


def hash_of(*names):
    """SHA-1 of the joined names as an integer."""
    return int(hashlib.sha1(" ".join(names).encode("utf-8")).hexdigest(), 16)


def split_pictures(pictures, concepts):
    """Mapping of (concept, style) to "train", "test" or "test_pairs".

    Concepts are grouped first: variants of one subject, and concepts with near duplicates in whatever styles. A hash
    of the group's name holds whole groups out as `test`. What is left is grouped by (group of concepts, style), and
    near duplicates in several styles together; a hash holds such groups of pictures out as `test_pairs` where training
    keeps each of their concepts in another style.
    """
    items = list(pictures)
    pairs = [(items[i], items[j]) for i, j in near_duplicates(list(pictures.values()))]
    groups = group(
        {concept for concept, _ in items},
        lambda concept: subject(concept, concepts[concept]),
        [(first, second) for (first, _), (second, _) in pairs],
    )
    names = {concept: members[0] for members in groups for concept in members}
    split = {item: "test" if hash_of(names[item[0]]) % TEST_ONE_IN == 0 else "train" for item in items}

    seen = [item for item in items if split[item] == "train"]
    # Of a pair both are seen, or none: they belong to the same group of concepts.
    seen_pairs = [(first, second) for first, second in pairs if split[first] == "train"]
    remaining = Counter(concept for concept, _ in seen)
    for members in group(seen, lambda item: (names[item[0]], item[1]), seen_pairs):
        here = Counter(concept for concept, _ in members)
        if hash_of(*members[0]) % TEST_ONE_IN == 0 and all(remaining[concept] > here[concept] for concept in here):
            remaining -= here
            split |= dict.fromkeys(members, "test_pairs")
    return split


# The data set


def webp(picture):
    """Bytes of a lossless WebP file."""
    buffer = io.BytesIO()
    PILImage.fromarray(picture).save(buffer, format="WEBP", lossless=True, quality=80, method=6)
    return buffer.getvalue()


def build(folder, size=64):
    """The data set of the packages in `folder`. Pictures that equal an earlier one in all pixels are left out."""
    concepts = read_concepts(folder)
    pictures = read_pictures(folder, concepts, size)
    split = split_pictures(pictures, concepts)  # of all: equal pictures bind their concepts together
    distinct = {}
    for item, picture in pictures.items():
        distinct.setdefault(picture.tobytes(), item)
    rows = {"train": [], "test": [], "test_pairs": []}
    # Ordered by hash, so that every prefix is a fair sample.
    for key, style in sorted(distinct.values(), key=lambda item: hash_of(*item)):
        concept = concepts[key]
        rows[split[key, style]].append(
            {
                "image": {"bytes": webp(pictures[key, style]), "path": None},
                "captions": concept.captions(style),
                "concept": key,
                "style": style,
                "category": concept.category,
                "letters": concept.letters,
            }
        )
    return DatasetDict({name: Dataset.from_list(part, features=FEATURES) for name, part in rows.items() if part})


def save(dataset, output_dir, shard_megabytes=20, force=False):
    """Write `data/{split}-00000-of-0000n.parquet`, where `load_dataset` finds the splits; returns the paths."""
    output_dir = Path(output_dir) / "data"
    existing = sorted(output_dir.glob("*.parquet"))
    if existing and not force:
        raise FileExistsError(f"{', '.join(map(str, existing))} exists; pass --force to replace")
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in existing:
        path.unlink()
    paths = []
    for split, part in dataset.items():
        num_shards = math.ceil(part.data.nbytes / (shard_megabytes * 1e6))
        for index in range(num_shards):
            paths.append(output_dir / f"{split}-{index:05d}-of-{num_shards:05d}.parquet")
            part.shard(num_shards, index).to_parquet(paths[-1])
    return paths


def overview(dataset, columns=12):
    """One picture: a row a style, of the first concepts of `train` that all styles draw."""
    drawn = {}
    for row in dataset["train"]:
        drawn.setdefault(row["concept"], {})[row["style"]] = row["image"]
    whole = [images for images in drawn.values() if len(images) == len(PACKAGES)][:columns]
    return image_grid([images[style] for style in range(len(PACKAGES)) for images in whole], columns=len(whole))


def prompts(dataset):
    """Label with style of `NUM_PROMPTS` training pictures, drawn at random."""
    captions = dataset["train"].shuffle(seed=0).select(range(NUM_PROMPTS))["captions"]
    return [own[len(own) // 2] for own in captions]


def main():
    (args,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        if args.packages is None:
            fetch_packages(folder)
        dataset = build(args.packages or folder, args.size)
    for path in save(dataset, args.output_dir, args.shard_megabytes, args.force):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    for split, part in dataset.items():
        print(f"{split}: {len(part):,} pictures of {len(set(part['concept'])):,} concepts")
    if args.picture is not None:
        overview(dataset).save(args.picture)
    if args.prompts is not None:
        Path(args.prompts).write_text("\n".join(prompts(dataset)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
