"""Images of a data set too large to store: one stream, divided between processes, that can be resumed."""

import copy
import itertools
import json
import logging
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node

from .images import (
    MAX_NAMES,
    check_max_share,
    decode_image,
    drop_broken_images,
    first_rows,
    load_images,
    name_broken,
    too_many_broken,
)

logger = logging.getLogger(__name__)
MIN_ROWS = 100  # of a stream, before the share of broken images is judged


def load_train_and_test(accelerator, data, splits, image_column, streaming, max_broken_share, max_test_images, seed):
    """Images to train on, and a list of those to measure on, without those that cannot be read. All processes call it.

    Args:
        splits: names, the first of those to train on.
        streaming: gives `StreamedImages` for this process, and lists of rows, the same on all processes.
        max_test_images: at most so many of each further split, drawn once and for all.
        seed: of a stream's order.

    Raises:
        ValueError: as in `load_images` and `drop_broken_images`.
    """
    with accelerator.main_process_first():  # the others read what it has cached
        sets = [load_images(data, split, image_column, streaming) for split in splits]
        if not streaming:
            train_set, *test_sets = (drop_broken_images(images, image_column, max_broken_share) for images in sets)
            return train_set, [first_rows(images, max_test_images) for images in test_sets]
    train_set, *test_sets = sets
    place = (accelerator.process_index, accelerator.num_processes)
    train_set = StreamedImages(train_set, image_column, max_broken_share, *place, seed=seed)
    test_sets = [StreamedImages(images, image_column, max_broken_share, decoded=False) for images in test_sets]
    return train_set, [list(itertools.islice(images, max_test_images)) for images in test_sets]


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

    @property
    def column_names(self):
        """Of the stream; None where only its rows tell them."""
        return self.dataset.column_names

    def part(self, process_index, num_processes):
        """The same stream for another process, in its first epoch."""
        part = copy.copy(self)
        part.process_index, part.num_processes, part.epoch = process_index, num_processes, 0
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
                    names.append(name_broken(row[self.image_column], self.num_rows - 1, error))
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
