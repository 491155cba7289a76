"""Which learning rate, and how many steps: two conditions of `run.py`, seed 0, at several of each.

    python benchmarks/dynamic_vs_fixed/pilot.py           # 26,000 steps, an hour and a half of one core
    python benchmarks/dynamic_vs_fixed/pilot.py --report  # the table of what is finished alone: brings it up to date

The learning rates are compared at the smallest number of steps. The numbers of steps are compared with a schedule of full
length each, at the best learning rate: a curve within one run would flatten with its learning rate alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import run
from evidence import REPOSITORY, option, table, write_section
from transformers import HfArgumentParser

FOLDER = Path(__file__).parent / "pilot"
CONDITIONS = ("fixed-256", "entropy")
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
STEPS = (1000, 3000, 6000)


@dataclass
class Arguments:
    data: str = option("emoji", f"one of {', '.join(run.DATA)}")
    work_dir: str = option(str(REPOSITORY / "runs" / "pilot"), "for the weights")
    results_dir: str = option(str(FOLDER), "folder of the results")
    output: str = option(str(REPOSITORY / "docs" / "evidence-tables.md"), "Markdown file")
    report: bool = option(False, "the table of what is finished alone")


def main(args):
    for condition in () if args.report else CONDITIONS:
        for learning_rate in LEARNING_RATES:
            run_one(args, condition, learning_rate, STEPS[0])
    for steps in () if args.report else STEPS[1:]:
        for condition in CONDITIONS:
            run_one(args, condition, best_learning_rate(args, condition), steps)
    write_section(Path(args.output), f"pilot, {args.data}", psnr_table(args))


def run_one(args, condition, learning_rate, steps):
    """One run of `run.py`, unless its result is there."""
    place = setting(learning_rate, steps)
    run.main(
        run.Arguments(
            data=[args.data],
            stages=[1],
            conditions=[condition],
            seeds=[0],
            steps=steps,
            learning_rate=learning_rate,
            work_dir=str(Path(args.work_dir, place)),
            results_dir=str(Path(args.results_dir, place)),
        )
    )


def setting(learning_rate, steps):
    """Name of the folder of such runs."""
    return f"lr-{learning_rate:g}-steps-{steps}"


def quality(args, condition, learning_rate, steps):
    """Mean PSNR in dB of the held-out images, or None without a finished run."""
    path = Path(args.results_dir, setting(learning_rate, steps), args.data, f"{condition}-seed0.json")
    return np.mean(json.loads(path.read_text())["held_out"]["own"]["images"]["psnr"]) if path.exists() else None


def best_learning_rate(args, condition):
    """The best one of those that have been tried."""
    return max(LEARNING_RATES, key=lambda rate: quality(args, condition, rate, STEPS[0]) or 0)


def psnr_table(args):
    """Held-out PSNR of every finished run, and what a thousand steps more have gained."""
    rows = []
    for condition in CONDITIONS:
        best, before = best_learning_rate(args, condition), None
        for steps in STEPS:
            for rate in LEARNING_RATES if steps == STEPS[0] else (best,):
                value = quality(args, condition, rate, steps)
                if value is not None:
                    gain = "" if before is None else f"{(value - before[1]) / (steps - before[0]) * 1000:+.2f}"
                    row = {"condition": condition, "learning rate": f"{rate:g}", "steps": f"{steps:,}"}
                    rows.append(row | {"PSNR, dB": f"{value:.2f}", "gain of the last 1,000 steps, dB": gain})
            if (value := quality(args, condition, best, steps)) is not None:
                before = steps, value
    return table(rows, texts=None)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
