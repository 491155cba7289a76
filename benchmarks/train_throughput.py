"""How fast training is: images a second and peak memory of both stages, with and without the code cache.

    python benchmarks/train_throughput.py                                 # the embedded model's sizes, one CPU thread
    python benchmarks/train_throughput.py --output docs/performance.md    # puts the table of these sizes and settings into that file
    python benchmarks/train_throughput.py --device cuda --data path/to/images --vae runs/vae/model \
        --stage_1 "--image_size 256 --granularities 16 8 --block_out_channels 128 128 256 256 512" \
        --stage_2 "--hidden_size 1024 --num_attention_heads 8 --num_position_layers 6 --num_content_layers 18"

Every row is a run of the training script itself in a process of its own, which ends once enough steps are timed: a step
is all that happens between two updates of the script's progress bar, so the reading of images, the optimizers and the
moving average of the weights count too. The table has the medians of the steps after the warm-up.
"""

import importlib
import multiprocessing
import os
import resource
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from report import CLOCKS, describe_device, option, publish, synchronize, table
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL
from dq_hf.data.images import load_images
from dq_hf.scripts.arguments import GENERATOR_SIZES, TOKENIZER_SIZES, GeneratorArguments, TokenizerArguments
from dq_hf.training import run as training_run
from dq_hf.training.options import settle_sizes

EMOJI = Path(__file__).parents[1] / "examples" / "data" / "emoji"


class Row(NamedTuple):
    """A row of the table."""

    stage: int
    text: str
    script: str
    options: str
    times_steps: int = 1  # that many times --steps: with length buckets no batch takes as long as another


ROWS = {
    "plain": Row(1, "L1 and VQ loss", "train_dqvae", "--perceptual_weight 0 --disc_weight 0"),
    "full": Row(1, "perceptual and adversarial loss, too", "train_dqvae", "--disc_start 0"),
    "images": Row(2, "images, encoded at every step", "train_dqtransformer", ""),
    "codes": Row(2, "code cache, length buckets", "train_dqtransformer", "--codes {cache}", 4),
}
# Name: mixed precision, and options of the script.
SETTINGS = {
    "fp32": ("no", ""),
    "fp32-compile": ("no", "--compile"),
    "bf16": ("bf16", ""),
    "bf16-compile": ("bf16", "--compile"),
}


@dataclass
class Arguments:
    rows: list[str] = option(list(ROWS), f"of {', '.join(ROWS)}")
    settings: list[str] = option(list(SETTINGS), f"of {', '.join(SETTINGS)}")
    stage_1: str = option("", "more options of train_dqvae.py, such as sizes")
    stage_2: str = option(
        "--num_attention_heads 4 --attention_dropout 0 --attn_implementation eager",
        "more options of train_dqtransformer.py",
    )
    data: str = option(str(EMOJI), "as for the scripts; split train, column image")
    num_images: int = option(200, "drawn at random from the data, for all rows")
    vae: str = option(f"{DEFAULT_MODEL}/vae", "tokenizer of stage 2")
    batch_size: int = option(32, "images a step")
    warmup_steps: int = option(3, "that are not timed: compilation, first allocations")
    steps: int = option(3, "timed steps of a run; with the code cache four times as many")
    repeats: int = option(1, "times that all rows are run, one after another")
    threads: int = option(1, "CPU threads")
    clock: str = option("wall", '"wall", or "cpu" for CPU time, on a machine that is busy')
    device: str = option("cpu", "cpu or cuda")
    output: str | None = option(None, "Markdown file to put the table into")


@dataclass
class Run:
    """What was measured of one run."""

    warmup: float  # seconds
    steps: list[float]  # seconds
    peak_memory: int  # bytes


def main(args):
    check(args)
    sizes = describe_sizes(args)
    os.environ |= {"ACCELERATE_USE_CPU": str(args.device == "cpu"), "OMP_NUM_THREADS": str(args.threads)}
    runs = {}
    with TemporaryDirectory() as folder:
        images, cache = Path(folder) / "images.parquet", Path(folder) / "codes"
        in_new_process(args, draw_images, args, images)
        if "codes" in args.rows:
            in_new_process(args, encode, args, images, cache)
        for repeat in range(args.repeats):
            for setting in args.settings:
                for row in args.rows:
                    options = script_options(args, row, setting, images, cache)
                    options += f" --output_dir {Path(folder) / f'{row}-{setting}-{repeat}'}"
                    run = in_new_process(args, train, args, ROWS[row], options, SETTINGS[setting][0])
                    runs.setdefault((row, setting), []).append(run)
                    print(f"{row}, {setting}: {1000 * median(run.steps):.4g} ms a step", file=sys.stderr, flush=True)
    report = make_report(args, sizes, runs)
    title = f"benchmarks/train_throughput.py, {args.device}, {sizes}; {' '.join(args.settings)}"
    publish(report, title, args.output)


def check(args):
    """Raise `ValueError` at names that do not exist, numbers that cannot be, and a GPU that is not there."""
    for given, known in ((args.rows, ROWS), (args.settings, SETTINGS), ([args.clock], CLOCKS)):
        unknown = set(given) - set(known)
        if unknown:
            raise ValueError(f"expected names of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    for name in ("warmup_steps", "steps", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(args, name)}")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {args.device}; CUDA_VISIBLE_DEVICES chooses between GPUs")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU; use --device cpu")


def describe_sizes(args):
    """The sizes of models and batches, by the scripts' own defaults where no option changes them."""
    stages = []
    for kind, sizes, options in (
        (TokenizerArguments, TOKENIZER_SIZES, args.stage_1),
        (GeneratorArguments, GENERATOR_SIZES, args.stage_2),
    ):
        words = ["--output_dir", "", *shlex.split(options)]
        stages += HfArgumentParser(kind).parse_args_into_dataclasses(words)
        settle_sizes(stages[-1], sizes)
    stage_1, stage_2 = stages
    return (
        f"{stage_1.image_size} pixels, widths {' '.join(map(str, stage_1.block_out_channels))}; transformer width "
        f"{stage_2.hidden_size}, {stage_2.num_position_layers} + {stage_2.num_content_layers} layers; "
        f"batch {args.batch_size}"
    )


def script_options(args, row, setting, images, cache):
    """Options of a row's script but its output folder."""
    parts = [f"--data {images} --test_split train --batch_size {args.batch_size}"]
    if ROWS[row].stage == 1:
        parts.append(args.stage_1)
    else:
        parts.append(f"--vae {shlex.quote(args.vae)} --label_column none {args.stage_2}")
    return " ".join([*parts, ROWS[row].options.format(cache=cache), SETTINGS[setting][1]])


def in_new_process(args, function, *arguments):
    """What a function returns in a process that ends with it."""
    # A forked process need not import everything again, but cannot use CUDA.
    context = multiprocessing.get_context("fork" if args.device == "cpu" else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def draw_images(args, path):
    """Write the images of all rows to a Parquet file."""
    images = load_images(args.data, "train").shuffle(seed=0)
    images.select(range(min(args.num_images, len(images)))).to_parquet(path)


def encode(args, images, cache):
    """Make the code cache of these images."""
    torch.set_num_threads(args.threads)
    options = f"--data {images} --test_split none --vae {shlex.quote(args.vae)} --label_column none"
    run_script("encode_dataset", f"{options} --batch_size {args.batch_size} --output_dir {cache}")


def train(args, row, options, precision):
    """A `Run` of a row's script."""
    torch.set_num_threads(args.threads)
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    clock = StepClock(args, row.times_steps * args.steps)
    training_run.progress_bar = clock.start
    try:
        run_script(row.script, options)
        raise ValueError(f"{row.script}.py ended before enough steps were timed; give it more --max_steps")
    except EnoughSteps:
        pass
    if args.device == "cuda":
        peak_memory = torch.cuda.max_memory_allocated()
    else:  # Linux counts in KiB
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    warmup, steps = clock.moments[: args.warmup_steps + 1], clock.moments[args.warmup_steps :]
    return Run(warmup[-1] - warmup[0], [end - begin for begin, end in zip(steps, steps[1:])], peak_memory)


def run_script(script, options):
    """Run a script as the command line would, in this process."""
    sys.argv = [script, *shlex.split(options)]
    with redirect_stdout(sys.stderr):
        importlib.import_module(f"dq_hf.scripts.{script}").main()


class EnoughSteps(Exception):
    """Ends a script."""


class StepClock:
    """The moments at which a script's steps end, seen as its progress bar, and the end of the script."""

    def __init__(self, args, steps):
        self.now = CLOCKS[args.clock]
        self.device = args.device
        self.moments_wanted = 1 + args.warmup_steps + steps
        self.moments = []

    def start(self, *_, **__):
        """Instead of `progress_bar`, which is called just before the first step."""
        self.moments.append(self.now())
        return self

    def update(self, images):
        """The end of a step."""
        synchronize(self.device)
        self.moments.append(self.now())
        if len(self.moments) == self.moments_wanted:
            raise EnoughSteps

    def set_description(self, *_, **__):
        """Shows nothing."""

    set_postfix = set_description

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def make_report(args, sizes, runs):
    """A Markdown table, how it was made, and what the code cache gains."""
    memory = "allocated on the GPU" if args.device == "cuda" else "of the whole process"
    rows, seconds = [], {}
    for row in args.rows:
        for setting in args.settings:
            repeats = runs[row, setting]
            steps = [step for run in repeats for step in run.steps]
            seconds[row, setting] = step = median(steps)
            rows.append(
                {
                    "stage": ROWS[row].stage,
                    "trains on": ROWS[row].text,
                    "precision": setting.replace("-", ", "),
                    "images/s": f"{args.batch_size / step:.4g}",
                    "ms/step": f"{1000 * step:.4g}",
                    "steps timed": len(steps),
                    "warm-up, s": f"{median(run.warmup for run in repeats):.3g}",
                    "peak memory, GB": f"{max(run.peak_memory for run in repeats) / 1e9:.3g}",
                }
            )
    report = (
        f"{sizes[0].upper()}{sizes[1:]}; {describe_device(args.device, args.threads)}; torch {torch.__version__}; "
        f"{args.clock} time. Medians; warm-up: the first {args.warmup_steps} steps, and compilation that no earlier row or run "
        f"did; memory: the most that was {memory}.\n\n{table(rows, texts=['trains on', 'precision'])}"
    )
    if {"images", "codes"} <= set(args.rows):
        gains = [
            f"{seconds['images', setting] / seconds['codes', setting]:.1f} times ({setting.replace('-', ', ')})"
            for setting in args.settings
        ]
        report += f"\n\nWith the code cache a step of stage 2 is faster: {'; '.join(gains)}."
    return report


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
