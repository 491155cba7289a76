r"""Encode images once, so that DQ-Transformer (stage 2) trains on their codes and needs neither images nor encoder.

CPU smoke run with the embedded tokenizer, seconds:

    accelerate launch --cpu examples/encode_dataset.py --output_dir runs/codes --max_images 200

One GPU, one's own images and tokenizer:

    accelerate launch examples/encode_dataset.py --data path/to/images --vae runs/vae/model --output_dir runs/codes

Captioned images, each also shifted twice, where those of letters are not mirrored:

    accelerate launch examples/encode_dataset.py --data examples/data/emoji --test_split test test_pairs \
        --label_column none --caption_column captions --no_flip_column letters --copies 3 --max_shift 4 \
        --output_dir runs/captioned-codes

Several GPUs or machines, which must share `output_dir`: the same after `accelerate config`, or with a file of
`examples/configs`; any number of processes writes the same rows. Where only the package is installed,
`-m dq_hf.scripts.encode_dataset` stands for `examples/encode_dataset.py`. Then `train_dqtransformer.py --codes runs/codes` trains
on them, with the same `--vae`. A run that was stopped leaves nothing in `output_dir`; give the command again. With
`--overwrite` the old cache is deleted only when the new one is in its place.
"""

import math
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dq_hf import DQImageProcessor
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
from dq_hf.data.images import (
    ImageCollator,
    check_no_flip_column,
    drop_broken_images,
    find_labels,
    first_rows,
    load_images,
)
from dq_hf.hub.card import lasting_name
from dq_hf.hub.folders import check_output_folder, check_place, partial_of, put_in_place
from dq_hf.loading import load_tokenizer
from dq_hf.scripts.arguments import EncodeArguments
from dq_hf.training.checkpoints import by_main_process
from dq_hf.training.options import check_data, run_script
from dq_hf.training.publish import command_line
from dq_hf.training.run import lock


def main(arguments=None):
    run_script(encode, EncodeArguments, __name__, arguments)


def encode(args):
    # The others wait while one process checks the images, which with millions takes longer than the usual ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    output_dir = Path(args.output_dir).resolve()  # what a link leads to
    check_output_dir(output_dir, args.overwrite)
    check_data(args.data, args.output_dir)
    hold = output_dir.with_name(f".{output_dir.name}.lock")
    held = by_main_process(lambda: lock(hold, output_dir))
    vae = load_tokenizer(args.vae).to(accelerator.device)
    with accelerator.main_process_first():  # the others read what it has cached
        splits = {name: load_split(args, name) for name in [args.train_split, *args.test_split]}
    args.label_column, names, sets = find_labels(list(splits.items()), args.label_column)
    schema = code_features(vae.config, names, captions=args.caption_column is not None).arrow_schema

    stage = partial_of(output_dir)
    if accelerator.is_main_process:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    accelerator.wait_for_everyone()
    for name, dataset in zip(splits, sets):
        share = own_share(accelerator, dataset, args.batch_size)
        number = f"{accelerator.process_index:05d}-of-{accelerator.num_processes:05d}"
        tables = encode_split(args, vae, share, name, schema, show=accelerator.is_main_process)
        write_codes(stage / f"{name}-{number}.parquet", schema, tables)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        num_rows = {name: count_rows(stage, name) for name in splits}
        options = ("horizontal_flips", "no_flip_column", "copies", "crop", "max_shift", "caption_column")
        origin = {name: getattr(args, name) for name in options} | {"command": command_line()}
        write_index(stage, vae, args.vae, names, num_rows, data=lasting_name(args.data), **origin)
        put_in_place(output_dir)
        hold.unlink()
        held.close()
        print(f"{output_dir}: {', '.join(f'{count} rows of {name}' for name, count in num_rows.items())}")


def encode_split(args, vae, dataset, name, schema, show):
    """Tables of this process's rows of a split: of the images as they are, and in training of their other versions."""
    processor, trains = DQImageProcessor.for_model(vae.config), name == args.train_split
    change = Augmentation(args.seed, random_crop=args.crop == "random", max_shift=args.max_shift)
    versions = args.copies if trains else 1
    for version in range(versions):
        columns = processor, args.image_column, args.label_column
        collate = ImageCollator(*columns, change if version > 0 else None, partial(beside, args))
        collate.set_epoch(version)
        loader = DataLoader(dataset, args.batch_size, collate_fn=collate, num_workers=args.num_workers)
        title = f"encode {name}" if versions == 1 else f"encode {name}, version {version + 1} of {versions}"
        progress = tqdm(loader, desc=title, disable=not show)
        yield from encode_batches(vae, progress, schema, horizontal_flips=args.horizontal_flips and trains)


def beside(args, rows, pictures, epoch):
    """What goes into the cache beside the codes: captions, and which images may be mirrored."""
    entries = {"may_flip": may_flip(rows, args.no_flip_column)}
    if args.caption_column is not None:
        entries[CAPTIONS] = [captions_of(row[args.caption_column]) for row in rows]
    return entries


def check_output_dir(output_dir, overwrite):
    """Raise `OSError` at a place for no folder, or at files but those of a code cache to be replaced."""
    check_place(output_dir)
    is_cache = (output_dir / INDEX_FILE).exists()
    check_output_folder(output_dir, overwrite if is_cache else None, "--overwrite")


def load_split(args, name):
    """The images of a split that can be read."""
    dataset = load_images(args.data, name, args.image_column)
    if args.max_images is not None:
        dataset = first_rows(dataset, args.max_images)
    if args.no_flip_column is not None:
        check_no_flip_column(dataset, args.no_flip_column)
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
