"""Images of any `datasets` source as `pixel_values`, with labels; the one place that decodes an image."""

import itertools
import logging
import zlib
from pathlib import Path

import datasets
import torch
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)
MAX_NAMES = 20  # broken images that are named; the others are only counted


def load_images(data, split, image_column="image", streaming=False):
    """A split of a data set: a folder of images (class folders give labels), Parquet, or a Hub id.

    Images are not decoded yet, so that a broken one is no error before `drop_broken_images`, `StreamedImages` or
    `ImageCollator` meets it.

    Args:
        streaming: read the rows as they are needed, in order, instead of storing them; a `datasets.IterableDataset`.

    Raises:
        ValueError: no such split or column; the message lists what there is.
        OSError: there is neither such a path nor such a data set.
    """
    path = Path(data)  # absolute, because datasets has builders of its own named "parquet", "csv", "imagefolder"
    if path.is_file():
        splits = datasets.load_dataset("parquet", data_files=str(path.absolute()), streaming=streaming)
    else:
        try:
            splits = datasets.load_dataset(str(path.absolute() if path.exists() else data), streaming=streaming)
        except (OSError, ValueError) as error:
            if path.exists():
                raise
            raise OSError(
                f"{data} is no local folder or file, and no data set of the Hub that could be read: {error}"
            ) from error
    if split not in splits:
        raise ValueError(f"{data} has no split {split!r}; it has {', '.join(splits)}")
    dataset = splits[split]
    check_column(dataset, image_column, data)
    if dataset.features is None:
        return dataset
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def check_column(dataset, column, name="the data set"):
    """Raise ValueError if a data set has no such column."""
    columns = dataset.column_names or list(next(iter(dataset), {}))  # some streams tell their columns only by a row
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(columns)}")


def class_names(dataset, label_column):
    """Class names of a label column, in the order of their ids.

    Raises:
        ValueError: no such column, or it is not a `ClassLabel`.
    """
    feature = (dataset.features or {}).get(label_column)
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"label column {label_column!r} must hold class labels (datasets.ClassLabel), got {feature}; "
            "use dataset.class_encode_column, or train without labels (--label_column none)"
        )
    return feature.names


def decode_image(value):
    """The whole PIL image of a row's value: a PIL image, a path, bytes, or a dict of both.

    Raises:
        ValueError: the image is broken, or of a kind that `DQImageProcessor` refuses.
    """
    try:
        image, feature = value, datasets.Image()
        if not isinstance(value, (Image.Image, dict)):
            value = feature.encode_example(value)
        if isinstance(value, dict):
            image = feature.decode_example({"path": None, "bytes": None} | value)
        image.load()
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
    checked = images.map(
        image_problem,
        input_columns=[image_column],
        remove_columns=[image_column],
        features=datasets.Features({"problem": datasets.Value("string")}),
        num_proc=num_proc,
        desc="check images",
    )
    problems = checked[:]["problem"]
    good = [row for row, problem in enumerate(problems) if problem is None]
    if len(good) == len(dataset):
        return dataset
    broken = (row for row, problem in enumerate(problems) if problem is not None)
    names = [describe(images[row][image_column], row, problems[row]) for row in itertools.islice(broken, MAX_NAMES)]
    num_broken = len(dataset) - len(good)
    if not good or num_broken > max_share * len(dataset):
        raise too_many_broken(num_broken, len(dataset), max_share, names)
    more = f"; and {num_broken - len(names)} more" if num_broken > len(names) else ""
    logger.warning(
        "%d of %d images cannot be read and are left out: %s%s", num_broken, len(dataset), "; ".join(names), more
    )
    return dataset.select(good)


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


def describe(value, row, problem):
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
        label_column: None leaves out "class_labels".
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
        pixel_values = self.processor(images)["pixel_values"]
        if self.augmentation is not None:
            pixel_values = self.augmentation(pixel_values, rows, self.epoch)
        batch = {"pixel_values": pixel_values}
        if self.label_column is not None:
            batch["class_labels"] = torch.tensor([row[self.label_column] for row in rows])
        if self.more is not None:
            batch |= self.more(rows, [zlib.crc32(image.flatten().numpy()) for image in pixel_values], self.epoch)
        return batch

    def _decode(self, value, row):
        """The PIL image, or ValueError with its name."""
        try:
            return decode_image(value)
        except ValueError as error:
            raise ValueError(f"an image cannot be read: {describe(value, row, error)}; remove it") from error
