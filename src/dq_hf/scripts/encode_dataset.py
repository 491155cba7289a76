"""Encode images once, so that DQ-Transformer (stage 2) trains on their codes and needs neither images nor encoder.

CPU smoke run with the embedded tokenizer, seconds:

    accelerate launch --cpu examples/encode_dataset.py --output_dir runs/codes --max_images 200

One GPU, one's own images and tokenizer:

    accelerate launch examples/encode_dataset.py --data path/to/images --vae runs/vae/model --output_dir runs/codes

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
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dq_hf import DEFAULT_MODEL, DQImageProcessor
from dq_hf.data.codes import INDEX_FILE, code_features, encode_batches, write_codes, write_index
from dq_hf.data.images import ImageCollator, class_names, drop_broken_images, first_rows, load_images
from dq_hf.hub.folders import partial_of, put_in_place
from dq_hf.loading import load_tokenizer
from dq_hf.training.checkpoints import together
from dq_hf.training.options import EMOJI, check_data, option, require, require_share, run_script
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
    test_split: str | None = option("test", "Held-out split; none means that only the training split is encoded.")
    image_column: str = option("image", "Column with the images.")
    label_column: str | None = option("label", "Column with the class labels; none means codes without classes.")
    max_images: int | None = option(None, "Encode at most this many images of each split. Default: all.")
    max_broken_share: float = option(
        0.01, "Images that cannot be read are left out; it is an error if their share is larger than this."
    )

    horizontal_flips: bool = option(True, "Encode the mirror images of the training split, too.")
    batch_size: int = option(32, "Images at a time, in each process.")
    num_workers: int = option(0, "Processes that read images, for each process that encodes.")
    overwrite: bool = option(False, "Replace the code cache in --output_dir.")

    def __post_init__(self):
        require(self, 1, "max_images", "batch_size")
        require(self, 0, "num_workers")
        require_share(self, "max_broken_share")
        self.test_split, self.label_column = (
            None if name == "none" else name for name in (self.test_split, self.label_column)
        )


def main(arguments=None):
    run_script(encode, Arguments, __doc__, arguments)


def encode(args):
    # The others wait while one process checks the images, which with millions takes longer than the usual ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    output_dir = Path(args.output_dir).absolute()
    check_output_dir(output_dir, args.overwrite)
    check_data(args.data)
    hold = output_dir.with_name(f".{output_dir.name}.lock")
    held = together(lambda: lock(hold, output_dir) if accelerator.is_main_process else None)
    vae = load_tokenizer(args.vae).to(accelerator.device)
    processor = DQImageProcessor.for_model(vae.config)
    collate = ImageCollator(processor, args.image_column, args.label_column)
    split_names = [name for name in (args.train_split, args.test_split) if name is not None]
    with accelerator.main_process_first():  # the others read what it has cached
        splits = {name: load_split(args, name) for name in split_names}
    names = class_names(splits[args.train_split], args.label_column) if args.label_column else []
    schema = code_features(vae.config, names).arrow_schema

    partial = partial_of(output_dir)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    num_rows = {}
    for name, dataset in splits.items():
        flips = args.horizontal_flips and name == args.train_split
        share = own_share(accelerator, dataset, args.batch_size)
        loader = DataLoader(share, args.batch_size, collate_fn=collate, num_workers=args.num_workers)
        progress = tqdm(loader, desc=f"encode {name}", disable=not accelerator.is_main_process)
        number = f"{accelerator.process_index:05d}-of-{accelerator.num_processes:05d}"
        write_codes(partial / f"{name}-{number}.parquet", schema, encode_batches(vae, progress, names, flips))
        num_rows[name] = len(dataset) * (2 if flips else 1)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        origin = {"data": args.data, "horizontal_flips": args.horizontal_flips, "command": shlex.join(sys.argv)}
        write_index(partial, vae, args.vae, names, num_rows, **origin)
        put_in_place(output_dir)
        hold.unlink()
        held.close()
    accelerator.print(f"{output_dir}: {', '.join(f'{count} rows of {name}' for name, count in num_rows.items())}")
    accelerator.end_training()


def check_output_dir(output_dir, overwrite):
    """Raise `ValueError` at a folder with files, unless it is a code cache that may be replaced."""
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
    return drop_broken_images(dataset, args.image_column, args.max_broken_share, num_proc=args.num_workers or None)


def own_share(accelerator, dataset, batch_size):
    """The images of this process, whole batches in a row: an image is encoded with the same others by any process."""
    batches = math.ceil(len(dataset) / batch_size)
    index, processes = accelerator.process_index, accelerator.num_processes
    first, last = (batch_size * (batches * share // processes) for share in (index, index + 1))
    return dataset.select(range(first, min(last, len(dataset))))


if __name__ == "__main__":
    main()
