"""Draw the curves of a training run, of either stage, one panel a quantity, training and held-out figures together.

    python examples/plot_log.py runs/vae/log.jsonl --output curves.png

The log of a run that is still going on can be drawn too. The ending of `--output` says the format: png, svg, pdf.
"""

import argparse
import math
import sys
from pathlib import Path

from dq_hf.hub.card_text import TERMS, term
from dq_hf.training.progress import RunLog

# Held-out figures that are not called test_<what training logs>, and their panels.
HELD_OUT = {"psnr": "psnr", "codes_per_image": "codes"}
# Text and unit of what only the log has.
LOG_TERMS = {
    "codes": TERMS["codes_per_image"],
    "d_grad_norm": ("norm of the discriminator's gradient", ""),
    "coarse_position_loss": ("position loss, coarse", "nats an element"),
    "fine_position_loss": ("position loss, fine", "nats an element"),
}
COLOURS = {"training": "C0", "held out": "C1", "calibration": "C2"}
COLUMNS = 4
PANEL_INCHES = (3.6, 2.4)
DOTS_PER_INCH = 100


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("log", help="log.jsonl in the run's folder")
    parser.add_argument("--output", default="curves.png", help="picture to write (%(default)s)")
    args = parser.parse_args()
    try:
        draw(read_rows(args.log), args.log).savefig(args.output)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(args.output)


def read_rows(path):
    """Rows of a log, one or more, each with a step; raises ValueError at anything else."""
    if Path(path).is_dir():
        raise ValueError(f"expected the file log.jsonl of a run, got the folder {path}")
    try:
        rows = RunLog(path).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no log of a run ({error}); give its log.jsonl") from error
    for row in rows:
        numbers = row.values() if isinstance(row, dict) and "step" in row else [None]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(f"{path}: expected rows of numbers with a step, got {row}; repair or delete the file")
    if not any(len(row) > 1 for row in rows):
        raise ValueError(f"{path} holds no figures yet; the first come after --log_every steps of the run")
    return rows


def find_curves(rows):
    """Steps and values of the curves: {panel: {kind: ([steps], [values])}}, as they first appear.

    Kinds are "training", "held out", "held out, <split>" of further splits, and "calibration", one value for a share of
    regions.
    """
    panels = {}
    for row in rows:
        for name, value in row.items():
            if name == "step":
                continue
            name, _, split = name.partition("/")  # of held-out images but those of the first split
            panel = HELD_OUT.get(name, name.removeprefix("test_"))
            kind = "held out" if name in HELD_OUT or name.startswith("test_") else "training"
            if split:
                kind = f"held out, {split}"
            if name.startswith("calibrated_"):
                panel, kind = name.removeprefix("calibrated_"), "calibration"
            steps, values = panels.setdefault(panel, {}).setdefault(kind, ([], []))
            steps.append(row["step"])
            values.append(value)
    return panels


def draw(rows, title):
    """A matplotlib figure of all curves; a dotted line stands at the first step logged with the discriminator.

    Raises `ImportError` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib; install it with `pip install -c constraints.txt -e ".[train]"`'
        ) from error
    panels = find_curves(rows)
    start = next((row["step"] for row in rows if "g_loss" in row), None)
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (columns * PANEL_INCHES[0], lines * PANEL_INCHES[1] + 0.6)  # the rest for title and legend
    figure = Figure(size, dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontsize=11)
    legend, colours = {}, dict(COLOURS)
    for number, (name, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, number, sharex=figure.axes[0] if figure.axes else None)
        text, unit = LOG_TERMS.get(name) or term(name)
        axes.set_title(text, fontsize=9)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if number > len(panels) - columns:
            axes.set_xlabel("step", fontsize=8)
        for kind, (steps, values) in curves.items():
            colour = colours.setdefault(kind, f"C{len(colours)}")
            style = {"color": colour, "linewidth": 1 if kind == "training" else 1.5}
            marker = "." if kind.startswith("held out") or len(steps) == 1 else None
            [legend[kind]] = axes.plot(steps, values, marker=marker, **style)
        if start is not None:
            legend["discriminator starts"] = axes.axvline(start, color="0.4", linestyle=":", linewidth=1)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), fontsize=9)
    return figure


if __name__ == "__main__":
    main()
