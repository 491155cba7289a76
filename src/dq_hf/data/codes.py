"""Code caches, a data set's codes and grain maps encoded once, and batches of similar length."""

import json
import re
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Sampler

from .fingerprint import codes_fingerprint
from .images import as_pattern

INDEX_FILE = "codes.json"
CAPTIONS = "captions"  # column
AGAIN = "encode the images again with dq-hf encode --output_dir"
GROUP_BYTES = 2**23  # of a Parquet file's rows that are held in memory and written together


def code_features(config, class_names=(), captions=False):
    """Columns of a code cache for a VAE's configuration: grids are flattened, row by row."""
    (rows, columns), (fine_rows, fine_columns) = config.grid_sizes[0], config.grid_sizes[-1]
    features = {
        "codes": datasets.List(code_type(config), length=fine_rows * fine_columns),
        "grain_map": datasets.List(datasets.Value("uint8"), length=rows * columns),
        "num_codes": datasets.Value("int32"),
        "flipped": datasets.Value("bool"),
    }
    if class_names:
        features["label"] = datasets.ClassLabel(names=list(class_names))
    if captions:
        features[CAPTIONS] = datasets.List(datasets.Value("string"))
    return datasets.Features(features)


def row_features(config):
    """Columns of images of many sizes: names and sizes in pixels, codes and grain map as lists of rows."""
    return datasets.Features(
        {
            "file_name": datasets.Value("string"),
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            "codes": datasets.List(datasets.List(code_type(config))),
            "grain_map": datasets.List(datasets.List(datasets.Value("uint8"))),
        }
    )


def code_type(config):
    """The smallest type of a VAE's codes."""
    return datasets.Value("int16" if config.codebook_size <= 2**15 else "int32")


@torch.no_grad()
def encode_batches(vae, loader, schema, horizontal_flips=False):
    """One `pyarrow.Table` of rows for each batch of a loader, in its order; the VAE is put into evaluation mode.

    Args:
        vae: a `DQVAEModel`.
        loader: iterable of {"pixel_values": (B, 3, height, width), "may_flip": (B,) bool, "class_labels": (B,) long if
            there are classes, "captions": B lists of strings if there are captions}.
        schema: columns, the Arrow schema of `code_features`.
        horizontal_flips: each image's row is followed by its mirror image's, if it may be mirrored.
    """
    vae.eval()
    for batch in loader:
        images, may_flip = batch["pixel_values"].to(vae.device), batch["may_flip"] & horizontal_flips
        # Each row's number with 0 and, where its image is mirrored too, with 1.
        versions = torch.stack([torch.ones_like(may_flip), may_flip], dim=1).nonzero()
        rows, flipped = versions[:, 0], versions[:, 1].bool()
        if flipped.any():
            images = images[rows]
            images[flipped] = images[flipped].flip(-1)
        encoded = vae.encode(images)
        columns = {
            "codes": flat_lists(encoded.codes),
            "grain_map": flat_lists(encoded.grain_map),
            "num_codes": encoded.num_codes.cpu().numpy(),
            "flipped": flipped.numpy(),
        }
        if "label" in schema.names:
            columns["label"] = batch["class_labels"][rows].numpy()
        if CAPTIONS in schema.names:
            columns[CAPTIONS] = [batch[CAPTIONS][row] for row in rows.tolist()]
        yield pa.table(columns).cast(schema)


def flat_lists(grids):
    """Integer grids (B, H, W) as an Arrow column of B lists."""
    values = grids.flatten(1).cpu().numpy()
    return pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])


def write_codes(path, schema, tables):
    """Write tables with the columns of `schema`, none or more, to one Parquet file, as they come."""
    waiting, num_bytes = [], 0
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            waiting.append(table)
            num_bytes += table.nbytes
            if num_bytes >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, num_bytes = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def write_index(folder, vae, vae_name, class_names, num_rows, **origin):
    """Write `codes.json`, without which a folder is no code cache.

    Args:
        folder: holds `<split>-<number>-of-<number>.parquet`.
        vae: the `DQVAEModel` that encoded.
        vae_name: its folder or Hub id.
        class_names: names of the classes, or none.
        num_rows: {split: number of rows}.
        origin: what else a reader may want to know, of types that JSON has.
    """
    index = {
        "fingerprint": codes_fingerprint(vae),
        "vae": vae_name,
        "grid_sizes": vae.config.grid_sizes,
        "codebook_size": vae.config.codebook_size,
        "class_names": list(class_names),
        "num_rows": num_rows,
    }
    (Path(folder) / INDEX_FILE).write_text(json.dumps(index | origin, indent=2) + "\n")


def read_index(folder):
    """What `write_index` wrote; raises ValueError if it is missing or damaged."""
    try:
        index = json.loads((Path(folder) / INDEX_FILE).read_text())
        missing = {"fingerprint", "vae", "num_rows", "data"} - set(index)
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} is no code cache: {INDEX_FILE} is missing or damaged ({error!r}); {AGAIN}"
        ) from error
    return index


def count_rows(folder, split):
    """Rows of a split's files."""
    return sum(pq.read_metadata(file).num_rows for file in split_files(folder, split))


def split_files(folder, split):
    """The files of a split, in their order."""
    name = re.compile(re.escape(split) + r"-\d+-of-\d+\.parquet")
    return sorted(path for path in Path(folder).iterdir() if name.fullmatch(path.name))


def load_codes(folder, split, vae):
    """A split of a code cache, columns as in `code_features` (numpy).

    Raises:
        ValueError: no cache or a damaged one, another VAE's, or no such split.
    """
    folder = Path(folder).absolute()
    index = read_index(folder)
    theirs, vae_name, all_rows = index["fingerprint"], index["vae"], index["num_rows"]
    if theirs != (ours := codes_fingerprint(vae)):
        raise ValueError(
            f"{folder} holds the codes of another VAE: fingerprint {theirs}, of {vae_name}, got one with {ours}; "
            f"use that VAE, or {AGAIN}"
        )
    if split not in all_rows:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(all_rows)}")
    try:
        num_rows = count_rows(folder, split)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{folder}: a file of split {split!r} is damaged ({error}); {AGAIN}") from error
    if num_rows != all_rows[split]:
        raise ValueError(f"{folder}: split {split!r} must have {all_rows[split]} rows, got {num_rows}; {AGAIN}")
    return datasets.Dataset.from_parquet([as_pattern(file) for file in split_files(folder, split)]).with_format(
        "numpy"
    )


class CodeCollator:
    """Rows of a code cache to {"codes": (B, H, W) long, "grain_map": (B, h, w) long, "class_labels": (B,) long if any}.

    Args:
        grid_sizes: [rows, columns] of each granularity's grid, coarsest first, as in the configurations.
        more: further entries, as of an `ImageCollator`.
    """

    def __init__(self, grid_sizes, more=None):
        self.shapes = {"codes": grid_sizes[-1], "grain_map": grid_sizes[0]}
        self.more = more
        self.epoch = 0

    def set_epoch(self, epoch):
        """To be called before each epoch; workers of a DataLoader see it when they start."""
        self.epoch = epoch

    def __call__(self, rows):
        batch = {
            name: torch.as_tensor(np.stack([row[name] for row in rows])).long().view(-1, *shape)
            for name, shape in self.shapes.items()
        }
        if "label" in rows[0]:
            batch["class_labels"] = torch.tensor([int(row["label"]) for row in rows])
        if self.more is not None:
            batch |= self.more(rows, [zlib.crc32(codes.numpy()) for codes in batch["codes"]], self.epoch)
        return batch


class LengthBucketSampler(Sampler):
    """All indices once an epoch, in a random order in which a batch's rows have similar lengths.

    The order depends on the seed and on the epoch (`set_epoch`) only, so that every process draws the same.

    Args:
        lengths: of the rows; of a code cache `dataset["num_codes"][:]`.
        batch_size: rows of one step, those of all processes together.
        seed: another one, another order.
    """

    pool = 50  # batches whose rows are sorted together: more pad less, fewer mix better

    def __init__(self, lengths, batch_size, seed=0):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        source = np.random.default_rng((self.seed, self.epoch))
        order = source.permutation(len(self.lengths))
        whole = len(order) - len(order) % self.batch_size  # the rest comes last, unsorted: any row may be in it
        pool = self.pool * self.batch_size
        pools = [order[first : min(first + pool, whole)] for first in range(0, whole, pool)]
        batches = [rows[self.lengths[rows].argsort()].reshape(-1, self.batch_size) for rows in pools]
        for batch in source.permutation(np.concatenate(batches)) if batches else []:
            yield from batch.tolist()
        yield from order[whole:].tolist()
