r"""Encode images once, so that DQ-Transformer (stage 2) trains on their codes and needs neither images nor encoder.

CPU smoke run with the embedded tokenizer, seconds:

    accelerate launch --cpu examples/encode_dataset.py --output_dir runs/codes --max_images 200

One GPU, one's own images and tokenizer:

    accelerate launch examples/encode_dataset.py --data path/to/images --vae runs/vae/model --output_dir runs/codes

Captioned images, each also shifted twice, where those of letters are not mirrored:

    accelerate launch examples/encode_dataset.py --data examples/data/emoji-captions --test_split test test_pairs \
        --label_column none --caption_column captions --no_flip_column letters --copies 3 --max_shift 4 \
        --output_dir runs/captioned-codes

Several GPUs or machines, which must share `output_dir`: the same after `accelerate config`, or with a file of
`examples/configs`; any number of processes writes the same rows. Where only the package is installed,
`-m dq_hf.scripts.encode_dataset` stands for `examples/encode_dataset.py`. Then `train_dqtransformer.py --codes runs/codes` trains
on them, with the same `--vae`. A run that was stopped leaves nothing in `output_dir`; give the command again. With
`--overwrite` the old cache is deleted only when the new one is in its place.
"""

import math
import shlex
import shutil
import sys
from dataclasses import MISSING, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dq_hf import DEFAULT_MODEL, DQImageProcessor
from dq_hf.data.augmentation import Augmentation, may_flip
from dq_hf.data.captions import all_captions, captions_of
from dq_hf.data.codes import (
    CAPTIONS,
    INDEX_FILE,
    code_features,
    count_rows,
    encode_batches,
    write_codes,
    write_index,
)
from dq_hf.data.images import ImageCollator, check_column, drop_broken_images, find_labels, first_rows, load_images
from dq_hf.hub.folders import check_place, partial_of, put_in_place
from dq_hf.loading import load_tokenizer
from dq_hf.training.checkpoints import together
from dq_hf.training.options import EMOJI, check_data, option, require, require_different, require_share, run_script
from dq_hf.training.run import lock


@dataclass(kw_only=True)
class Arguments:
    """Options of the code cache."""

    output_dir: str = option(MISSING, "Folder of the code cache.")
    vae: str = option(
        f"{DEFAULT_MODEL}/vae", "Tokenizer: folder or Hub id of a DQVAEModel, or of both models together."
    )
    data: str = option(EMOJI, "Images: a folder, Parquet files, or a data set of the Hub.")
    train_split: str = option("train", "Split to train on.")
    test_split: list[str] = option(
        ["test"], "Held-out splits, as many as there are; none means that only the training split is encoded."
    )
    image_column: str = option("image", "Column with the images.")
    label_column: str | None = option(
        None, "Column with the class labels; none means codes without classes. Default: label, if there are labels."
    )
    caption_column: str | None = option(
        None, "Column with the captions, one or several an image, for a generator with text. Default: no captions."
    )
    max_uncaptioned_share: float = option(
        0.01, "Images without a caption count as images of no text; it is an error if their share is larger than this."
    )
    max_images: int | None = option(None, "Encode at most this many images of each split. Default: all.")
    max_broken_share: float = option(
        0.01, "Images that cannot be read are left out; it is an error if their share is larger than this."
    )

    horizontal_flips: bool = option(True, "Encode the mirror images of the training split, too.")
    no_flip_column: str | None = option(
        None, "Column that is true for images that are never mirrored, such as those of letters. Default: none."
    )
    copies: int = option(
        1,
        "Versions of each training image: itself, and others that are shifted at random; each with its mirror image.",
    )
    max_shift: int = option(0, "Pixels by which the further versions are shifted at most, along each axis.")
    seed: int = option(0, "Seed of the shifts.")
    batch_size: int = option(32, "Images at a time, in each process.")
    num_workers: int = option(0, "Processes that read images, for each process that encodes.")
    overwrite: bool = option(False, "Replace the code cache in --output_dir.")

    def __post_init__(self):
        require(self, 1, "max_images", "batch_size", "copies")
        require(self, 0, "num_workers", "max_shift", "seed")
        require_share(self, "max_broken_share", "max_uncaptioned_share")
        self.caption_column, self.no_flip_column = (
            None if name == "none" else name for name in (self.caption_column, self.no_flip_column)
        )
        self.test_split = [] if self.test_split == ["none"] else self.test_split
        require_different(self, "test_split")
        if self.train_split in self.test_split:
            raise ValueError(f"--test_split must not have the training split, got {' '.join(self.test_split)}")
        if (self.copies > 1) != (self.max_shift > 0):
            raise ValueError(
                f"--copies above 1 needs --max_shift above 0, and the other way round; got {self.copies} and "
                f"{self.max_shift}"
            )


def main(arguments=None):
    run_script(encode, Arguments, __doc__, arguments)


def encode(args):
    # The others wait while one process checks the images, which with millions takes longer than the usual ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    output_dir = Path(args.output_dir).resolve()  # what a link leads to
    check_output_dir(output_dir, args.overwrite)
    check_data(args.data)
    hold = output_dir.with_name(f".{output_dir.name}.lock")
    held = together(lambda: lock(hold, output_dir) if accelerator.is_main_process else None)
    vae = load_tokenizer(args.vae).to(accelerator.device)
    with accelerator.main_process_first():  # the others read what it has cached
        splits = {name: load_split(args, name) for name in [args.train_split, *args.test_split]}
    args.label_column, names = find_labels(splits, args.label_column)
    schema = code_features(vae.config, names, captions=args.caption_column is not None).arrow_schema

    stage = partial_of(output_dir)
    if accelerator.is_main_process:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    accelerator.wait_for_everyone()
    for name, dataset in splits.items():
        share = own_share(accelerator, dataset, args.batch_size)
        number = f"{accelerator.process_index:05d}-of-{accelerator.num_processes:05d}"
        tables = encode_split(args, vae, share, name, schema, show=accelerator.is_main_process)
        write_codes(stage / f"{name}-{number}.parquet", schema, tables)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        num_rows = {name: count_rows(stage, name) for name in splits}
        options = ("data", "horizontal_flips", "no_flip_column", "copies", "max_shift", "caption_column")
        origin = {name: getattr(args, name) for name in options} | {"command": shlex.join(sys.argv)}
        write_index(stage, vae, args.vae, names, num_rows, **origin)
        put_in_place(output_dir)
        hold.unlink()
        held.close()
        print(f"{output_dir}: {', '.join(f'{count} rows of {name}' for name, count in num_rows.items())}")
    accelerator.end_training()


def encode_split(args, vae, dataset, name, schema, show):
    """Tables of this process's rows of a split: of the images as they are, and in training of their shifted versions."""
    processor, trains = DQImageProcessor.for_model(vae.config), name == args.train_split
    shift = Augmentation(args.seed, max_shift=args.max_shift)
    for version in range(args.copies if trains else 1):
        collate = ImageCollator(
            processor, args.image_column, args.label_column, shift if version > 0 else None, partial(beside, args)
        )
        collate.set_epoch(version)
        loader = DataLoader(dataset, args.batch_size, collate_fn=collate, num_workers=args.num_workers)
        title = f"encode {name}" + f", version {version + 1} of {args.copies}" * (trains and args.copies > 1)
        progress = tqdm(loader, desc=title, disable=not show)
        yield from encode_batches(vae, progress, schema, horizontal_flips=args.horizontal_flips and trains)


def beside(args, rows, pictures, epoch):
    """What goes into the cache beside the codes: captions, and which images may be mirrored."""
    captions = (
        {} if args.caption_column is None else {CAPTIONS: [captions_of(row[args.caption_column]) for row in rows]}
    )
    return {"may_flip": may_flip(rows, args.no_flip_column)} | captions


def check_output_dir(output_dir, overwrite):
    """Raise `OSError` or `ValueError` at a place for no folder, or at files but those of a code cache to be replaced."""
    check_place(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a folder, got the file {output_dir}")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not (output_dir / INDEX_FILE).exists():
        raise ValueError(f"--output_dir {output_dir} holds files that are no code cache; choose another folder")
    if not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} holds a code cache; choose another folder, or replace it by --overwrite"
        )


def load_split(args, name):
    """The images of a split that can be read."""
    dataset = load_images(args.data, name, args.image_column)
    if args.max_images is not None:
        dataset = first_rows(dataset, args.max_images)
    if args.no_flip_column is not None:
        check_column(dataset, args.no_flip_column)
    if args.caption_column is not None:
        all_captions(dataset, args.caption_column, args.max_uncaptioned_share)
    return drop_broken_images(dataset, args.image_column, args.max_broken_share, num_proc=args.num_workers or None)


def own_share(accelerator, dataset, batch_size):
    """The images of this process, whole batches in a row: an image is encoded with the same others by any process."""
    batches = math.ceil(len(dataset) / batch_size)
    index, processes = accelerator.process_index, accelerator.num_processes
    first, last = (batch_size * (batches * share // processes) for share in (index, index + 1))
    return dataset.select(range(first, min(last, len(dataset))))


if __name__ == "__main__":
    main()
