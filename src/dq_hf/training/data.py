"""Images for training: any `datasets` source, whole or streamed, as `pixel_values` with labels."""

import copy
import hashlib
import itertools
import json
import logging
import zlib
from pathlib import Path

import datasets
import torch
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

MAX_NAMES = 20  # broken images that are named; the others are only counted
MIN_ROWS = 100  # of a stream, before the share of broken images is judged


def load_images(data, split, image_column="image", streaming=False):
    """A split of a data set: a folder of images (class folders give labels), Parquet, or a Hub id.

    Images are not decoded yet, so that a broken one is no error before `drop_broken_images`, `StreamedImages` or
    `ImageCollator` meets it.

    Args:
        streaming: read the rows as they are needed, in order, instead of storing them; a `datasets.IterableDataset`.

    Raises:
        ValueError: no such split or column; the message lists what there is.
    """
    path = Path(data)  # absolute, because datasets has builders of its own named "parquet", "csv", "imagefolder"
    if path.is_file():
        splits = datasets.load_dataset("parquet", data_files=str(path.absolute()), streaming=streaming)
    else:
        splits = datasets.load_dataset(str(path.absolute() if path.exists() else data), streaming=streaming)
    if split not in splits:
        raise ValueError(f"{data} has no split {split!r}; it has {', '.join(splits)}")
    dataset = splits[split]
    columns = dataset.column_names or list(next(iter(dataset), {}))  # some streams tell their columns only by a row
    if image_column not in columns:
        raise ValueError(f"{data} has no column {image_column!r}; it has {', '.join(columns)}")
    if dataset.features is None:
        return dataset
    return dataset.cast_column(image_column, datasets.Image(decode=False))


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


def load_train_and_test(accelerator, data, splits, image_column, streaming, max_broken_share, max_test_images, seed):
    """Images to train on and to measure on, without those that cannot be read. All processes call it.

    Args:
        splits: names of the two.
        streaming: gives `StreamedImages` for this process, and a list of rows, the same on all processes.
        max_test_images: at most so many of the second split, drawn once and for all.
        seed: of a stream's order.

    Raises:
        ValueError: as in `load_images` and `drop_broken_images`.
    """
    with accelerator.main_process_first():  # the others read what it has cached
        train_set, test_set = (load_images(data, split, image_column, streaming) for split in splits)
        if not streaming:
            train_set, test_set = (
                drop_broken_images(images, image_column, max_broken_share) for images in (train_set, test_set)
            )
            return train_set, first_rows(test_set, max_test_images)
    place = (accelerator.process_index, accelerator.num_processes)
    train_set = StreamedImages(train_set, image_column, max_broken_share, *place, seed=seed)
    test_set = StreamedImages(test_set, image_column, max_broken_share, decoded=False)
    return train_set, list(itertools.islice(test_set, max_test_images))


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


class StreamedImages(torch.utils.data.IterableDataset):
    """One epoch of a stream, shuffled, as rows with PIL images; broken images are skipped, counted and named.

    Over all processes and all workers of their `DataLoader`s each row is given once. With at least as many files
    (`dataset.num_shards`, a multiple of the processes) as processes times workers each reads only its own files;
    otherwise all processes read all rows and keep their part, and workers without a file stay idle.

    Args:
        dataset: `datasets.IterableDataset`, as `load_images(..., streaming=True)` gives it.
        max_share: share of broken images, in [0, 1], above which it is an error. Each worker judges its own rows,
            after the first 100 and at the end of the epoch.
        shuffle_buffer: rows that are shuffled together, besides the order of the files; 0: no shuffling.
        seed: with the epoch it determines the order; the same on all processes.
        decoded: False leaves images in their files' bytes, to be kept in memory.

    Raises:
        ValueError: while iterating, too many broken images.
    """

    def __init__(
        self,
        dataset,
        image_column="image",
        max_share=0.01,
        process_index=0,
        num_processes=1,
        shuffle_buffer=1000,
        seed=0,
        decoded=True,
    ):
        check_max_share(max_share)
        self.dataset = dataset
        self.image_column = image_column
        self.max_share = max_share
        self.process_index = process_index
        self.num_processes = num_processes
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.decoded = decoded
        self.epoch = 0
        self.num_rows = self.num_broken = 0  # so far in this epoch, where no worker does the reading

    @property
    def features(self):
        """Of the stream, with the types of its columns."""
        return self.dataset.features

    def part(self, process_index, num_processes):
        """The same stream for another process."""
        part = copy.copy(self)
        part.process_index, part.num_processes = process_index, num_processes
        return part

    def set_epoch(self, epoch):
        """Choose the order in which the next iteration gives the rows."""
        self.epoch = epoch

    def __iter__(self):
        stream = self.dataset
        if self.shuffle_buffer:
            stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        stream = split_dataset_by_node(stream, self.process_index, self.num_processes)
        if self.shuffle_buffer:
            stream.set_epoch(self.epoch)
        self.num_rows = self.num_broken = 0
        names = []
        for row in stream:  # datasets gives each worker of a DataLoader its own part
            self.num_rows += 1
            try:
                image = decode_image(row[self.image_column])
            except ValueError as error:
                self.num_broken += 1
                if self.num_broken <= MAX_NAMES:
                    names.append(describe(row[self.image_column], self.num_rows - 1, error))
                    logger.warning("skipped an image that cannot be read: %s", names[-1])
            else:
                yield row | {self.image_column: image} if self.decoded else row
            if self.num_rows >= MIN_ROWS:
                self._check(names)
        self._check(names)
        if self.num_broken:
            logger.warning("skipped %d of %d images in epoch %d", self.num_broken, self.num_rows, self.epoch)

    def _check(self, names):
        """Raise ValueError if too many images were broken."""
        if self.num_broken > self.max_share * self.num_rows:
            raise too_many_broken(self.num_broken, self.num_rows, self.max_share, names)


class ImageCollator:
    """Rows of a data set to {"pixel_values": (B, 3, H, W) in [-1, 1], "class_labels": (B,) long}.

    Args:
        processor: `DQImageProcessor`.
        label_column: None leaves out "class_labels".
        flip_seed: mirrors each image left to right with probability 1/2. Whether an image is mirrored depends on
            this seed, `epoch` and its pixels only: in any batch, process and worker, and after resuming, it is the
            same. None: never.

    Raises:
        ValueError: when called, for an image that cannot be read; the message names it.
    """

    def __init__(self, processor, image_column="image", label_column=None, flip_seed=None):
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.flip_seed = flip_seed
        self.epoch = 0

    def set_epoch(self, epoch):
        """To be called before each epoch; workers of a DataLoader see it when they start."""
        self.epoch = epoch

    def __call__(self, rows):
        images = [self._decode(row[self.image_column], i) for i, row in enumerate(rows)]
        pixel_values = self.processor(images)["pixel_values"]
        if self.flip_seed is not None:
            flips = torch.tensor([self._is_mirrored(image) for image in pixel_values])
            pixel_values = torch.where(flips[:, None, None, None], pixel_values.flip(-1), pixel_values)
        batch = {"pixel_values": pixel_values}
        if self.label_column is not None:
            batch["class_labels"] = torch.tensor([row[self.label_column] for row in rows])
        return batch

    def _decode(self, value, row):
        """The PIL image, or ValueError with its name."""
        try:
            return decode_image(value)
        except ValueError as error:
            raise ValueError(f"an image cannot be read: {describe(value, row, error)}; remove it") from error

    def _is_mirrored(self, image):
        """A fair coin that knows only the seed, the epoch and the image."""
        pixels = zlib.crc32(image.flatten().numpy())  # not of the epoch too: CRC is linear, all would turn together
        return bool(hashlib.blake2b(f"{self.flip_seed} {self.epoch} {pixels}".encode()).digest()[0] & 1)


def prepare_loader(accelerator, loader):
    """A `DataLoader` of training images for this process: `accelerator.prepare`, or an `EndlessLoader` for a stream."""
    if isinstance(loader.dataset, StreamedImages):
        return EndlessLoader(accelerator, loader)
    return accelerator.prepare(loader)


class EndlessLoader:
    """Batches of `StreamedImages`, epoch after epoch without end, on the accelerator's device.

    Every process goes through epochs of its own and waits for no other, so that none runs dry when its part of the
    images is smaller. The epoch is also given to a collator that has `set_epoch`.

    `accelerator.save_state` saves each process's epoch and batch, and after `load_state` the iteration goes on with
    the very next batch. For this it reads, decodes and drops what the process had of the epoch before: at most one
    epoch, without training steps.

    Args:
        loader: `DataLoader` of `StreamedImages` that were given this process's index and the number of processes,
            which `accelerator.prepare` would split once more.

    Raises:
        ValueError: persistent workers, which would never see a new epoch; while iterating, an epoch without any
            batch; in `load_state`, a checkpoint of another number of processes or workers, or batch size.
    """

    def __init__(self, accelerator, loader):
        if loader.persistent_workers:
            raise ValueError("persistent_workers must be False for a stream, got True; its workers start every epoch")
        self.loader = loader
        self.device = accelerator.device
        self.epoch = 0
        self.batches_done = 0  # of this epoch
        self.layout = {
            "num_processes": accelerator.num_processes,
            "batch_size": loader.batch_size,
            "num_workers": loader.num_workers,
        }
        self.file_name = f"stream_{accelerator.process_index}.json"
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def __iter__(self):
        while True:
            self.loader.dataset.set_epoch(self.epoch)
            if hasattr(self.loader.collate_fn, "set_epoch"):
                self.loader.collate_fn.set_epoch(self.epoch)
            with torch.random.fork_rng(devices=[]):  # opening draws a random number, and a resumed run opens once more
                batches = iter(self.loader)
            for batch in itertools.islice(batches, self.batches_done, None):
                self.batches_done += 1
                yield send_to_device(batch, self.device)
            if self.batches_done == 0:
                raise ValueError(
                    f"batch_size must be at most a worker's share of the images, got {self.loader.batch_size}; "
                    "lower it or use fewer workers"
                )
            self.epoch, self.batches_done = self.epoch + 1, 0

    def _save(self, models, weights, folder):
        """Write the place where this process is."""
        place = {"epoch": self.epoch, "batches_done": self.batches_done}
        (Path(folder) / self.file_name).write_text(json.dumps(place | self.layout))

    def _load(self, models, folder):
        """Go to the place where this process was."""
        file = Path(folder) / self.file_name
        place = json.loads(file.read_text()) if file.exists() else {}
        saved = {name: place.get(name) for name in self.layout}
        if saved != self.layout:
            raise ValueError(
                f"{file} must be of a run with {self.layout}, got {saved}; go on with the numbers that it began with"
            )
        self.epoch, self.batches_done = place["epoch"], place["batches_done"]
