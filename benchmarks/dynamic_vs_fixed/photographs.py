"""Build the photographs of the benchmark: 64x64 tiles, split by photograph, from packages of Debian (117 MB).

    python benchmarks/dynamic_vs_fixed/photographs.py                        # fetches with apt-get
    python benchmarks/dynamic_vs_fixed/photographs.py --packages_dir debs    # from packages that are already there

`photographs.csv` lists which pictures of the packages are taken, by the SHA-256 of their files: photographs only, no
paintings and drawings. Each is reduced to 256 pixels along its shorter side and cut into tiles. An eighth of the
photographs, drawn by their hashes, are held out whole.

The pictures have licences of their own (GPL, CC-BY-SA, CC0 and others, see each package's copyright file): they are good
for measuring, but neither they nor weights trained on them should be passed on.
"""

import csv
import hashlib
import io
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import HfArgumentParser

LIST = Path(__file__).with_name("photographs.csv")
SHORT_SIDE, TILE = 256, 64  # pixels


@dataclass
class Arguments:
    output_dir: str = field(default="runs/photographs", metadata={"help": "folder for the tiles, PNG"})
    packages_dir: str | None = field(default=None, metadata={"help": "folder of .deb files; none: fetched by apt-get"})


def main(args):
    rows = read_list()
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists; remove it, or give another --output_dir")
    with tempfile.TemporaryDirectory() as folder:
        packages_dir = Path(args.packages_dir or fetch(sorted({row["package"] for row in rows}), folder))
        pictures = {}
        for number, package in enumerate(sorted(packages_dir.glob("*.deb"))):
            unpacked = Path(folder, f"unpacked-{number}")
            subprocess.run(["dpkg", "-x", package, unpacked], check=True)
            pictures |= find_pictures(unpacked)
    counts = build(rows, pictures, output_dir)
    print(", ".join(f"{split}: {count:,} tiles" for split, count in sorted(counts.items())))


def read_list():
    """Package, version, name and SHA-256 of every picture."""
    with open(LIST, newline="") as file:
        return list(csv.DictReader(file))


def fetch(packages, folder):
    """Download packages into `folder` and return it."""
    if shutil.which("apt-get") is None:
        raise RuntimeError(
            f"apt-get is needed to fetch {', '.join(packages)}; or pass their .deb files: --packages_dir"
        )
    done = subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"apt-get download {' '.join(packages)} failed; is its list up to date?\n{done.stderr}")
    return folder


def find_pictures(folder):
    """All JPEG, PNG and WebP files below a folder, those inside of Qt's .rcc files too: {SHA-256: bytes}."""
    contents = []
    for path in folder.rglob("*"):
        if path.suffix in (".jpg", ".png") and not path.is_symlink():
            contents.append(path.read_bytes())
        elif path.suffix == ".rcc":
            contents += cut_webp(path.read_bytes())
    return {hashlib.sha256(content).hexdigest(): content for content in contents}


def cut_webp(data):
    """The WebP files that stand uncompressed in some bytes: "RIFF", the size of the rest as four bytes, "WEBP"."""
    files, start = [], data.find(b"RIFF")
    while start >= 0:
        end = start + 4
        if data[start + 8 : start + 12] == b"WEBP":
            end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
            files.append(data[start:end])
        start = data.find(b"RIFF", end)
    return files


def build(rows, pictures, output_dir):
    """Write the tiles of the listed pictures; gives the number of tiles of each split.

    Raises:
        ValueError: a listed picture is not there.
    """
    missing = [row for row in rows if row["sha256"] not in pictures]
    if missing:
        names = ", ".join(f"{row['name']} of {row['package']} {row['version']}" for row in missing[:5])
        raise ValueError(
            f"expected {len(rows)} listed pictures, got {len(rows) - len(missing)}: missing are {names} and so on; take "
            "these versions of the packages"
        )
    counts = {"train": 0, "test": 0}
    for row in rows:
        split = split_of(row["sha256"])
        folder = output_dir / split
        folder.mkdir(parents=True, exist_ok=True)
        for number, tile in enumerate(tiles(pictures[row["sha256"]])):
            tile.save(folder / f"{row['sha256'][:16]}-{number:02d}.png")
            counts[split] += 1
    return counts


def split_of(sha256):
    """The side on which all tiles of a photograph are."""
    return "test" if int(sha256, 16) % 8 == 0 else "train"


def tiles(content):
    """The tiles of an encoded picture that do not overlap, row by row, from its centre part."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    columns, rows = (side // TILE for side in image.size)
    left, top = (image.width - columns * TILE) // 2, (image.height - rows * TILE) // 2
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * TILE, top + row * TILE
            yield image.crop((x, y, x + TILE, y + TILE))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
