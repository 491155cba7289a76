"""Images of any `datasets` source as `pixel_values`, with labels: how images of a data set are read and decoded."""

import dataclasses
import glob
import itertools
import logging
import os
import re
import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_folders import is_image_folder, load_image_folder, table_beside_images

logger = logging.getLogger(__name__)
TABLES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}  # builders of `datasets`
SHARD = re.compile(r"-\d+-of-\d+$")  # end of the name of a split's part
CLASS_IDS = "class ids"  # column, where a data set has only the names of its classes
MAX_NAMES = 20  # broken images that are named; the others are only counted


def load_images(data, split, image_column="image", streaming=False):
    """A split of a data set: a folder of images (see `image_folders`) or of Parquet files, one of `TABLES`, or a Hub id.

    Images are not decoded yet, so that a broken one is no error before `drop_broken_images`, `StreamedImages` or
    `ImageCollator` meets it.

    Args:
        streaming: read the rows as they are needed, in order, instead of storing them; a `datasets.IterableDataset`.

    Raises:
        ValueError: no such split or column, and the message lists what there is; damaged files.
        OSError: there is neither such a path nor such a data set.
    """
    path = Path(data)
    if path.is_dir() and is_image_folder(path):
        dataset = load_image_folder(path, split, streaming)
    else:
        try:
            splits = load_splits(data, streaming)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{data} is damaged: {error.__cause__ or error}") from error
        if split not in splits:
            raise ValueError(f"{data} has no split {split!r}; it has {', '.join(splits)}; name another split")
        dataset = splits[split]
    try:
        check_column(dataset, image_column, data)
    except ValueError as error:
        table = table_beside_images(path) if path.is_dir() else None
        if table is None:
            raise
        raise ValueError(f"{error}; it is not read as a folder of images because of {table}: move that away") from None
    for name, feature in (dataset.features or {}).items():
        if name == image_column:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif getattr(feature, "decode", False):  # masks or sounds, which nobody asked for
            dataset = dataset.cast_column(name, dataclasses.replace(feature, decode=False))
    return dataset


def load_splits(data, streaming):
    """Whatever `datasets` reads from a table, a folder or the Hub, by split."""
    path = Path(data).absolute()  # in full, because datasets has builders of its own named "csv" or "imagefolder"
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(
                f"images must be a folder, a data set of the Hub, or one of {', '.join(TABLES)}; got {data}"
            )
        return datasets.load_dataset(TABLES[path.suffix.lower()], data_files=as_pattern(path), streaming=streaming)
    # A path with []*? datasets would take for a pattern, and test_pairs-00000-of-00001.parquet for a part of "test", too.
    if path.is_dir() and (glob.has_magic(str(path)) or holds_shards(path)):
        return datasets.load_dataset("parquet", data_files=parquet_files(path), streaming=streaming)
    try:
        return datasets.load_dataset(str(path if path.exists() else data), streaming=streaming)
    except (OSError, ValueError) as error:
        if path.exists():
            raise
        raise OSError(
            f"{data} is no local folder or file, and no data set of the Hub that could be read: {error}"
        ) from error


def holds_shards(folder):
    """Whether a folder has Parquet files that say by their names which part of which split they are, and no card."""
    names = [path.stem for path in folder.glob("*.parquet")]
    return bool(names) and all(map(SHARD.search, names)) and not (folder / "README.md").exists()


def parquet_files(folder):
    """{split: its Parquet files}, by the folder at the top, but for `data`, else by the file's name."""
    splits = {}
    for path in sorted(folder.rglob("*.parquet")):
        parts = [part for part in path.relative_to(folder).parts if part != "data"]
        split = parts[0] if len(parts) > 1 else SHARD.sub("", path.stem)
        splits.setdefault(split, []).append(as_pattern(path))
    if not splits:
        raise ValueError(f"{folder} must hold images or Parquet files; rename it if it holds other data, without []*?")
    return splits


def as_pattern(path):
    """The pattern of this one file, for `datasets`."""
    return glob.escape(str(Path(path).absolute()))


def check_column(dataset, column, name="the data set"):
    """Raise ValueError if a data set has no such column."""
    columns = dataset.column_names or list(next(iter(dataset), {}))  # some streams tell their columns only by a row
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(columns)}")


def check_no_flip_column(dataset, column):
    """Raise ValueError unless a data set has such a column, of booleans or whole numbers: any text would count as true."""
    check_column(dataset, column)
    schema = dataset.features and dataset.features.arrow_schema
    kind = schema.field(column).type if schema else pa.array([next(iter(dataset))[column]]).type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"--no_flip_column {column} must hold booleans or whole numbers, got {kind}; write true or false, or 1 or 0"
        )


def find_labels(splits, label_column=None):
    """The column with the class ids, the names of the classes, and the rows of all splits, which have that column;
    (None, [], rows) where there are no classes.

    Args:
        splits: pairs of a name and rows, as for `with_class_ids`.
        label_column: the column; None: "label", if the first split has any label in it; "none": no classes.

    Raises:
        ValueError: as `with_class_ids`.
    """
    column = label_column or "label"
    if label_column == "none" or (label_column is None and not has_labels(splits[0][1], column)):
        return None, [], [rows for _, rows in splits]
    splits = [(f"split {name!r}", rows) for name, rows in splits]
    column, names, sets = with_class_ids(splits, column, "train without classes (--label_column none)")
    seen = set(labels_of(sets[0], column))
    if seen and (unseen := [name for number, name in enumerate(names) if number not in seen]):
        logger.warning(
            "%d of %d classes have no image in %s, such as %r", len(unseen), len(names), splits[0][0], unseen[0]
        )
    return column, names, sets


def with_class_ids(sets, label_column, remedy):
    """The column with the class ids, the names of the classes in their order, and the rows of all sets, with that column.

    Args:
        sets: pairs of what an error calls it and rows: a data set, a stream, whose rows are looked at as they come, or a
            list of a stream's rows. The classes are those of the first set; strings and numbers are sorted.
        remedy: what an error proposes besides other images.

    Raises:
        ValueError: no such column, neither `datasets.ClassLabel` nor, in a stored data set, strings or whole numbers, or
            rows whose label is no class.
    """
    _, first = sets[0]
    feature, values = (first.features or {}).get(label_column), None
    if isinstance(first, datasets.Dataset) and is_string_or_integer(feature):
        values = sorted(label for label in set(labels_of(first, label_column)) - {None, ""} if not is_hidden(label))
        feature = datasets.ClassLabel(names=list(map(str, values)))
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"label column {label_column!r} must hold class labels: datasets.ClassLabel or, but for a stream, strings or whole "
            f"numbers; got {feature}. Write the names of the classes instead, or {remedy}"
        )
    ids = {value: number for number, value in enumerate(range(feature.num_classes) if values is None else values)}
    converted = []
    for title, rows in sets:
        if isinstance(rows, datasets.Dataset):
            check_column(rows, label_column, title)
        labels = labels_of(rows, label_column)
        if wrong := [label for label in labels if label not in ids]:
            raise ValueError(
                f"{title} has {len(wrong)} rows of {len(labels)} whose label is no class, such as {wrong[0]!r} (-1 "
                f"stands for a hidden one); choose a split with labels, or {remedy}"
            )
        if values is not None:  # cast_column would copy the images; this does so only where rows were left out
            rows = rows.add_column(CLASS_IDS, [ids[label] for label in labels], feature=feature)
        converted.append(rows)
    return label_column if values is None else CLASS_IDS, feature.names, converted


def is_string_or_integer(feature):
    """Whether a column has plain strings or whole numbers."""
    if not isinstance(feature, datasets.Value):
        return False
    return feature.dtype in {"string", "large_string", "string_view"} or pa.types.is_integer(feature.pa_type)


def is_hidden(label):
    """Whether a label is -1, as test splits of the Hub have it."""
    return isinstance(label, int) and label < 0


def has_labels(dataset, label_column):
    """Whether a data set has a column with any label; of a stream, whether it has the column."""
    if label_column not in (dataset.features or {}):
        return False
    return not isinstance(dataset, datasets.Dataset) or any(
        label is not None for label in labels_of(dataset, label_column)
    )


def labels_of(rows, label_column):
    """The labels of a data set or a list of rows; none of a stream, whose rows are looked at as they come."""
    if isinstance(rows, datasets.Dataset):
        return rows.with_format(None)[label_column][:]
    return [row[label_column] for row in rows] if isinstance(rows, list) else []


def decode_image(value):
    """The whole PIL image, upright, of a row's value: a PIL image, a path, bytes, or a dict of both.

    Raises:
        ValueError: the image is broken, or of a kind that `DQImageProcessor` refuses.
    """
    try:
        if isinstance(value, Image.Image):
            image = ImageOps.exif_transpose(value)
        else:
            feature = datasets.Image()
            files = value if isinstance(value, dict) else feature.encode_example(value)
            image = feature.decode_example({"path": None, "bytes": None} | files)
        image.load()
        image.info.pop("exif", None)  # damaged EXIF data do no harm, but where a copy of the image is read
    except UnidentifiedImageError:
        raise ValueError("no image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise almost any kind on damaged data
        raise ValueError("there is no image" if value is None else f"{type(error).__name__}: {error}") from error
    if image.mode in ("I", "F"):
        raise ValueError(f"a PIL image of mode {image.mode!r} has no fixed range of values")
    return image


def drop_broken_images(dataset, image_column="image", max_share=0.01, num_proc=None):
    """The rows of a data set whose images can be read; the others are counted and named in the log.

    Decodes every image once; `datasets` remembers the result as long as the files do not change.

    Args:
        dataset: `datasets.Dataset`, as `load_images` gives it.
        max_share: share of broken images, in [0, 1], above which it is an error.
        num_proc: processes that decode.

    Raises:
        ValueError: too many broken images, or no image is left.
    """
    check_max_share(max_share)
    if len(dataset) == 0:
        raise ValueError("a data set must hold at least one image, got none")
    images = dataset.select_columns([image_column])
    facts = image_problem, images._fingerprint, [stamp(path) for path in files_behind(images, image_column)]
    checked = images.map(
        image_problem,
        input_columns=[image_column],
        remove_columns=[image_column],
        features=datasets.Features({"problem": datasets.Value("string")}),
        num_proc=num_proc,
        new_fingerprint=datasets.fingerprint.Hasher.hash(facts),
        desc="check images",
    )
    broken = {row: problem for row, problem in enumerate(checked[:]["problem"]) if problem is not None}
    if not broken:
        return dataset
    some = itertools.islice(broken.items(), MAX_NAMES)
    names = [name_broken(images[row][image_column], row, problem) for row, problem in some]
    if len(broken) > max_share * len(dataset) or len(broken) == len(dataset):
        raise too_many_broken(len(broken), len(dataset), max_share, names)
    more = f"; and {len(broken) - len(names)} more" if len(broken) > len(names) else ""
    logger.warning(
        "%d of %d images cannot be read and are left out: %s%s", len(broken), len(dataset), "; ".join(names), more
    )
    return dataset.select([row for row in range(len(dataset)) if row not in broken])


def files_behind(images, column):
    """The paths of those images of a data set whose bytes are not in it."""
    paths = []
    for chunk in images.data.column(column).chunks:  # one by one: all images together may be too large for an array
        paths += chunk.field("path").filter(pc.is_null(chunk.field("bytes"))).to_pylist()
    return paths


def stamp(path):
    """What changes when a file does."""
    try:
        facts = os.stat(path)
    except (OSError, TypeError):  # it is a broken image, which is left out or refused later
        return None
    return [facts.st_size, facts.st_mtime_ns]


def first_rows(dataset, num_rows):
    """The whole data set, or so many rows of it, mixed, for rows often stand in the order of their classes."""
    return dataset if len(dataset) <= num_rows else dataset.shuffle(seed=0).select(range(num_rows))


def image_problem(value):
    """Why an image cannot be read, or None, as a row of a data set."""
    try:
        decode_image(value)
    except ValueError as error:
        return {"problem": str(error)}
    return {"problem": None}


def name_broken(value, row, problem):
    """A broken image in words: its path, or its row if it has none, and what is wrong."""
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    return f"{path or f'row {row}'} ({problem})"


def too_many_broken(num_broken, num_rows, max_share, names):
    """The error that stops a run."""
    return ValueError(
        f"at most {max_share:.2%} of the images may be broken, got {num_broken} of {num_rows}, the first: "
        f"{'; '.join(names[:5])}; repair or remove them, or allow a larger share"
    )


def check_max_share(max_share):
    """Raise ValueError unless `max_share` is a share."""
    if not 0 <= max_share <= 1:
        raise ValueError(f"the share of broken images must lie in [0, 1], got {max_share}")


class ImageCollator:
    """Rows of a data set to {"pixel_values": (B, 3, H, W) in [-1, 1], "class_labels": (B,) long}.

    Args:
        processor: `DQImageProcessor`.
        label_column: of class ids; None leaves out "class_labels".
        augmentation: `Augmentation`, of training images.
        more: further entries of a batch, a dictionary, given the rows, for each a number that stands for its picture,
            and the epoch.

    Raises:
        ValueError: when called, for an image that cannot be read; the message names it.
    """

    def __init__(self, processor, image_column="image", label_column=None, augmentation=None, more=None):
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.augmentation = augmentation
        self.more = more
        self.epoch = 0

    def set_epoch(self, epoch):
        """To be called before each epoch; workers of a DataLoader see it when they start."""
        self.epoch = epoch

    def __call__(self, rows):
        images = [self._decode(row[self.image_column], i) for i, row in enumerate(rows)]
        if self.augmentation is not None:
            size = self.processor.size
            images = [self.augmentation.crop(image, size["height"], size["width"], self.epoch) for image in images]
        pixel_values = self.processor(images)["pixel_values"]
        if self.augmentation is not None:
            pixel_values = self.augmentation(pixel_values, rows, self.epoch)
        batch = {"pixel_values": pixel_values}
        if self.label_column is not None:
            batch["class_labels"] = labels_to_tensor([row[self.label_column] for row in rows])
        if self.more is not None:
            batch |= self.more(rows, [zlib.crc32(image.flatten().numpy()) for image in pixel_values], self.epoch)
        return batch

    def _decode(self, value, row):
        """The PIL image, or ValueError with its name."""
        try:
            return decode_image(value)
        except ValueError as error:
            raise ValueError(f"an image cannot be read: {name_broken(value, row, error)}; remove it") from error


def labels_to_tensor(labels):
    """(B,) long; ValueError at a label that is None or hidden."""
    if any(label is None or label < 0 for label in labels):
        raise ValueError(
            f"each image must have a label, got {labels}; choose a split with labels, or train without classes "
            "(--label_column none)"
        )
    return torch.tensor(labels)
