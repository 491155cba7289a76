"""Build the emoji data set of the examples: 3,812 pictures of 64x64 in nine classes, with captions.

Fetch the two source packages (136 MB, needs npm) and build:

    python examples/build_emoji_dataset.py --output_dir /tmp/emoji

Build from packages that are already unpacked, replacing the copy in this repository:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    mkdir google twitter
    tar -xzf emoji-datasource-google-16.0.0.tgz -C google
    tar -xzf emoji-datasource-twitter-16.0.0.tgz -C twitter
    python examples/build_emoji_dataset.py --google_dir google/package --twitter_dir twitter/package --force

Then `datasets.load_dataset("examples/data/emoji")` has the splits `train` and `test`. The pictures keep their own
licences, see examples/data/emoji/NOTICE.md.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import HfArgumentParser

VERSION = "16.0.0"
VENDORS = ("google", "twitter")
IMAGE_SIZE = 64
# Category of the source -> class name, in label order. The remaining category, "Component", holds bare skin tone and
# hair swatches and is dropped.
CLASS_NAMES = {
    "People & Body": "people",
    "Flags": "flags",
    "Objects": "objects",
    "Symbols": "symbols",
    "Travel & Places": "travel",
    "Smileys & Emotion": "smileys",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Activities": "activities",
}
FEATURES = Features(
    {
        "image": Image(),
        "label": ClassLabel(names=list(CLASS_NAMES.values())),
        "caption": Value("string"),
        "codepoints": Value("string"),
        "vendor": ClassLabel(names=list(VENDORS)),
    }
)


@dataclass
class BuildArguments:
    output_dir: str = field(default="examples/data/emoji", metadata={"help": "Folder for the two Parquet files."})
    google_dir: str | None = field(
        default=None, metadata={"help": f"Unpacked emoji-datasource-google@{VERSION}; fetched with npm when missing."}
    )
    twitter_dir: str | None = field(
        default=None, metadata={"help": f"Unpacked emoji-datasource-twitter@{VERSION}; fetched with npm when missing."}
    )
    force: bool = field(default=False, metadata={"help": "Replace existing Parquet files."})


def fetch_package(vendor, folder):
    """Path of the unpacked source package of `vendor`, downloaded below `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is needed to fetch the emoji; install Node.js or pass --{vendor}_dir")
    package = f"emoji-datasource-{vendor}@{VERSION}"
    done = subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`npm pack {package}` failed; pass --{vendor}_dir instead\n{done.stderr.strip()}")
    wanted = ("package/emoji.json", f"package/img/{vendor}/{IMAGE_SIZE}/")
    with tarfile.open(Path(folder) / f"emoji-datasource-{vendor}-{VERSION}.tgz") as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(Path(folder) / vendor, members=members, filter="data")
    return Path(folder) / vendor / "package"


def read_package(vendor, package_dir):
    """Rows of one vendor; skin tone variations are nested in the source's entries and thereby left out."""
    package_dir = Path(package_dir)
    index = package_dir / "emoji.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index} not found; expected the unpacked package emoji-datasource-{vendor}")
    image_dir = package_dir / "img" / vendor / str(IMAGE_SIZE)
    rows = []
    for entry in json.loads(index.read_text(encoding="utf-8")):
        if entry["category"] == "Component" or not entry[f"has_img_{vendor}"]:
            continue
        rows.append(
            {
                "image": {"bytes": white_png(image_dir / entry["image"]), "path": None},
                "label": CLASS_NAMES[entry["category"]],
                "caption": f"{entry['name']}, {entry['subcategory'].replace('-', ' ')}".lower(),
                "codepoints": entry["unified"],
                "vendor": vendor,
            }
        )
    return rows


def white_png(path):
    """Bytes of an RGB PNG: the picture composited on white, without metadata."""
    with PILImage.open(path) as image:
        # The sources mix RGBA, grey with alpha and palettes with a transparent entry.
        image = image.convert("RGBA")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"{path} must be {IMAGE_SIZE}x{IMAGE_SIZE}, got {image.width}x{image.height}")
    white = PILImage.new("RGBA", image.size, "white")
    buffer = io.BytesIO()
    PILImage.alpha_composite(white, image).convert("RGB").save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def split_key(codepoints):
    """SHA-1 of the emoji's code points as an integer."""
    return int(hashlib.sha1(codepoints.encode("ascii")).hexdigest(), 16)


def build(package_dirs):
    """The data set from a mapping of vendor to its unpacked package.

    The test split is `split_key % 10 == 0` of the source's field `unified` (upper-case hexadecimal code points joined
    by "-", for example "1F3C3-200D-2642-FE0F"). All vendors' pictures of one emoji so fall on the same side: 3,426
    for training and 386 for testing.
    """
    rows = [row for vendor, package_dir in package_dirs.items() for row in read_package(vendor, package_dir)]
    # Ordered by hash, so that every prefix is a fair sample of the classes.
    rows.sort(key=lambda row: (split_key(row["codepoints"]), row["vendor"]))
    is_test = [split_key(row["codepoints"]) % 10 == 0 for row in rows]
    splits = {
        "train": [row for row, test in zip(rows, is_test) if not test],
        "test": [row for row, test in zip(rows, is_test) if test],
    }
    return DatasetDict({name: Dataset.from_list(part, features=FEATURES) for name, part in splits.items()})


def save(dataset, output_dir, force=False):
    """Write `{split}-00000-of-00001.parquet`, the names by which `load_dataset` finds the splits."""
    output_dir = Path(output_dir)
    paths = {split: output_dir / f"{split}-00000-of-00001.parquet" for split in dataset}
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing and not force:
        raise FileExistsError(f"{', '.join(existing)} exists; pass --force to replace")
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        dataset[split].to_parquet(path)
    return paths


def main():
    (args,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        package_dirs = {
            "google": args.google_dir or fetch_package("google", folder),
            "twitter": args.twitter_dir or fetch_package("twitter", folder),
        }
        dataset = build(package_dirs)
    for split, path in save(dataset, args.output_dir, args.force).items():
        print(f"{path}: {len(dataset[split]):,} images, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
