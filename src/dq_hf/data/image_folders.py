"""A folder of images as a data set: splits and classes from its folders, captions and more from files beside the images.

- `folder/<split>/<class>/.../image.png`: labels, the name of the first folder below the split;
- `folder/<split>/image.png`: no labels;
- `folder/<class>/.../image.png`: one split, "train".

A split or class folder may be a link. `metadata.jsonl`, `.csv` or `.parquet` in any of these folders, with a column
`file_name`, has further columns and takes the place of labels; else `image.txt` beside `image.png` has its captions, one a
line, which become the column `text`.
"""

import io
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from transformers.utils import logging

logger = logging.get_logger(__name__)

IMAGES = set(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .tga .ico .jp2 .j2k .jpx .avif"
    " .pcx .dds".split()
)
PACKED = {".parquet", ".arrow", ".tar", ".zip", ".gz"}  # whoever has such has no folder of images
METADATA = {
    "metadata.jsonl": lambda path: [json.loads(line) for line in lines_of(path) if line.strip()],
    "metadata.csv": lambda path: rows_of_csv(lines_of(path)),
    "metadata.parquet": lambda path: pq.read_table(path).to_pylist(),
}
NOTES = {".jsonl", ".json", ".csv", ".tsv"}  # of which only those in METADATA are read
OTHERS = ".txt .md .parquet .xml .yaml .yml .html .pdf .npy .npz .pt .py .log .ini .db".split()
BESIDE = {*OTHERS, *NOTES}  # endings of files that are known to be no images
PAPERS = {"README", "LICENSE", "NOTICE"}  # so are these
SPLITS = {  # a split: other names of its folder
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def visible_files(folder):
    """All files of a folder, through links, in order; what is hidden does not count."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        above = os.path.realpath(place) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not above.startswith(os.path.realpath(os.path.join(place, name)) + os.sep)
        ]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def is_image(path):
    """Whether a file is an image, by its name."""
    return path.suffix.lower() in IMAGES


def is_image_folder(folder):
    """Whether a folder holds images as files; one with tables of images, or with a card that lists files, does not."""
    kinds = {path.suffix.lower() for path in visible_files(folder) if path.name not in METADATA}
    card = Path(folder, "README.md")
    lists_files = card.is_file() and "configs:" in card.read_text("utf-8", errors="replace")
    return bool(kinds & IMAGES) and not kinds & PACKED and not lists_files


def table_beside_images(folder):
    """A file because of which a folder with images does not count as one; None: there is none."""
    files = [path for path in visible_files(folder) if path.name not in METADATA]
    return next((path for path in files if path.suffix.lower() in PACKED), None) if any(map(is_image, files)) else None


def image_names(folder):
    """Paths, from a folder, of all images in it and in its folders, in order; ValueError as `check_names`."""
    files = visible_files(folder)
    images = list(filter(is_image, files))
    warn_of_unread(folder, set(files).difference(images))
    paths = [path.relative_to(folder).as_posix() for path in images]
    check_names(paths)
    return paths


def warn_of_unread(folder, files):
    """Say which of these files of a folder, none of which is read, may be images of another ending."""
    unread = [path for path in files if path.suffix.lower() not in BESIDE and path.name not in PAPERS]
    if unread:
        logger.warning(
            "%d file(s) in %s are not read, such as %s; convert them to .png or .jpg if they are images",
            *(len(unread), folder, min(unread).relative_to(folder)),
        )


def check_names(paths):
    """Raise ValueError at the path of a file that no table can hold: a name that is no UTF-8, as old archives have."""
    for path in paths:
        name = os.fsencode(path)
        if name.decode(errors="replace") != path:
            raise ValueError(f"names of images and folders must be UTF-8, got {name}; rename it")


def stream_images(folder, names):
    """Images of a folder, by `image_names`, as a `datasets.IterableDataset` with columns `image` and `file_name`."""
    features = datasets.Features({"image": datasets.Image(decode=False), "file_name": datasets.Value("string")})
    place = Path(folder).absolute()
    rows = [{"image": {"path": os.path.join(place, name), "bytes": None}, "file_name": name} for name in names]
    return datasets.IterableDataset.from_generator(give, features=features, gen_kwargs={"rows": rows})


def load_image_folder(folder, split, streaming=False):
    """A split of a folder of images, as a `datasets.Dataset` or, with `streaming`, an `IterableDataset`.

    Raises:
        ValueError: no such split, a damaged file beside the images, or names as in `check_names`, which a stream may have.
    """
    folder = Path(folder).resolve()  # without "..", so that the paths of its metadata are those of its files
    places = split_folders(folder)
    name = next((name for name in (split, *SPLITS.get(split, ())) if name in places), None)
    if name is None:
        whole = (
            ": it has no folders of splits, so all its images are in that one" if places == {"train": folder} else ""
        )
        home = folder if folder in places.values() else next(iter(places.values())).parent
        remedy = f"put images into {home / split}, or name another split"
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(places)}{whole}; {remedy}")
    rows, features = read_split(folder, places, name)
    arguments = {"generator": give, "gen_kwargs": {"rows": rows}, "features": features}
    if streaming:
        return datasets.IterableDataset.from_generator(**arguments)
    check_names(row["image"]["path"] for row in rows)
    facts = rows, features.to_dict()
    return datasets.Dataset.from_generator(**arguments, fingerprint=datasets.fingerprint.Hasher.hash(facts))


def split_folders(folder):
    """{split: its folder}, by the folders at the top, or in `data` there, in capitals or not; without splits {"train": itself}."""
    names = {name for names in SPLITS.values() for name in names}
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    tops = {path.name: path for path in entries if path.is_dir()}
    found = {name for name in tops if name.lower() in names}
    lost = [path.name for path in entries if is_image(path)]
    if not found:
        return split_folders(tops["data"]) if set(tops) == {"data"} and not lost else {"train": folder}
    if len(found) == 1 < len(tops):
        logger.warning_once(
            f"all folders in {folder} are taken for splits, because {', '.join(found)} is one's name: {', '.join(tops)}; "
            f"if they are classes, put them into {folder / 'train'}"
        )
    if lost:
        logger.warning_once(f"{len(lost)} image(s) beside the splits in {folder} are not read, such as {lost[0]}")
    return {name.lower() if name in found and name.lower() not in tops else name: path for name, path in tops.items()}


def read_split(folder, places, split):
    """Rows of a split, as dictionaries, and their `datasets.Features`."""
    own = visible_files(places[split])
    above = dict.fromkeys([folder, *(place.parent for place in places.values() if place != folder)])
    top = [path for place in above for path in sorted(place.iterdir()) if path.is_file()]
    files = dict.fromkeys([*top, *own])
    unread = [path for path in files if path.suffix.lower() in NOTES and path.name not in METADATA]
    if unread:
        names = ", ".join(METADATA)
        logger.warning(
            "%d file(s) beside images are not read, such as %s; captions stand in %s", len(unread), min(unread), names
        )
    paths, metadata = set(filter(is_image, own)), read_metadata(files, places)
    paths = sorted(paths | {path for path in metadata if path.is_relative_to(places[split])})
    warn_of_unread(places[split], set(own).difference(paths))
    columns = {"image": (datasets.Image(decode=False), [{"path": str(path), "bytes": None} for path in paths])}
    if metadata:
        columns |= metadata_columns(paths, metadata, folder)
    else:
        columns |= class_columns(paths, places, split) | caption_columns(paths, own)
    kinds = {name: kind for name, (kind, _) in columns.items()}
    rows = [dict(zip(kinds, values)) for values in zip(*(values for _, values in columns.values()))]
    return rows, datasets.Features(kinds)


def metadata_columns(paths, metadata, folder):
    """{name: (type, values of these images)} of all columns of metadata.

    Raises:
        ValueError: values of several types.
    """
    columns = {}
    for name in dict.fromkeys(name for more in metadata.values() for name in more):
        values = [metadata.get(path, {}).get(name) for path in paths]
        try:
            schema = pa.schema([(name, pa.array(values).type)])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise ValueError(
                f"column {name!r} of the metadata in {folder} must have one type, got {', '.join(kinds)}; "
                "write all its values alike"
            ) from error
        columns[name] = datasets.Features.from_arrow_schema(schema)[name], values
    return columns


def class_columns(paths, places, split):
    """{"label": (its type, the labels of a split's images)}; {} if no split has classes."""
    labels = [class_of(path, places[split]) for path in paths]
    names = set(labels)
    for name, place in places.items():
        if name != split:
            names |= {class_of(path, place) for path in visible_files(place) if is_image(path)}
    names = sorted(names - {None})
    ids = {name: number for number, name in enumerate(names)}
    return {"label": (datasets.ClassLabel(names=names), [ids.get(label) for label in labels])} if names else {}


def class_of(path, place):
    """The class folder of an image in a split's folder; None for one that lies in none."""
    first, *rest = path.relative_to(place).parts
    return first if rest else None


def caption_columns(paths, files):
    """{"text": (its type, the lines of the texts beside these images)}; {} if there is no such text."""
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    own = [texts.get(path.with_suffix("")) for path in paths]
    lines = [lines_of(text) if text else [] for text in own]
    return {"text": (datasets.List(datasets.Value("string")), lines)} if any(own) else {}


def read_metadata(files, places):
    """{path of an image: its further columns}, of all files of metadata among these.

    Raises:
        ValueError: one that is damaged, has no column `file_name`, or a column `image`, or names no file of the splits; a
            column that an image has twice.
    """
    known = {}
    for file in files:
        if file.name not in METADATA:
            continue
        try:
            rows = [
                (Path(os.path.normpath(file.parent / row.pop("file_name"))), row) for row in METADATA[file.name](file)
            ]
        except (ValueError, TypeError, KeyError, AttributeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{file} must have rows with a column file_name, the path of an image from there; got {error!r}"
            ) from error
        if rows and not any(path.is_relative_to(place) for path, _ in rows for place in places.values()):
            raise ValueError(
                f"{file} names no file of the splits ({', '.join(places)}), but {rows[0][0]}; file_name must be the path "
                "from there, such as train/0.png"
            )
        for path, columns in rows:
            if "image" in columns:
                raise ValueError(f"{file} has a column image, the name of the pictures' own; rename it")
            if twice := known.setdefault(path, {}).keys() & columns.keys():
                raise ValueError(
                    f"{file} has a second {min(twice)!r} of {path}; leave one of them, and give several captions as a list "
                    "(metadata.jsonl or .parquet)"
                )
            known[path] |= columns
    return known


def rows_of_csv(lines):
    """The rows of a table, as dictionaries; a value in quotes may have several lines."""
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(io.BytesIO("\n".join(lines).encode()), parse_options=options).to_pylist()


def lines_of(path):
    """The lines of a text; ValueError if it is none. A byte order mark is no part of it, and U+2028 ends no line."""
    try:
        return path.read_text("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error


def give(rows):
    """The rows, one by one."""
    yield from rows
