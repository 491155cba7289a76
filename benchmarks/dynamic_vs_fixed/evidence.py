"""Tables and plots of what has been measured so far, from the JSON files of finished runs.

    python benchmarks/dynamic_vs_fixed/evidence.py          # brings docs/evidence-tables.md up to date; seconds

Conditions without a finished run have no row, and a folder without tokenizers, or generators, no table of them.

The fair opponent of a tokenizer with 127 codes on average is none with 64 and none with 256: it is the fixed-length curve
at 127 codes, linear in the logarithm of the number of codes (or bits) between its measured points.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conditions import CONDITIONS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from stage_2 import GENERATORS
from transformers import HfArgumentParser

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path.append(str(HERE.parent))
from report import option, table, write_section  # noqa: E402

CURVE = ("fixed-64", "fixed-128", "fixed-256")
HEADLINE = "emoji"  # results of which the page has a plot of its own
# Rows of the tables: condition, and how the held-out images were routed.
ROWS = [(name, way) for name in CONDITIONS for way in ("own", "exact")]
# Besides with the fixed-length curve each is compared with these; fixed-128, a point of the curve, has a code more than 127.
OPPONENTS = {
    "all-fine": (),
    "random": ("fixed-128",),
    "entropy": ("fixed-128", "random"),
    "feature": ("fixed-128", "random", "entropy", "feature-selected"),
    "feature-selected": ("fixed-128", "random"),
    "gain": ("fixed-128", "random", "entropy", "feature"),
    "triple": ("fixed-128", "random", "entropy"),
    "triple-feature": ("fixed-128", "random", "triple"),
}
# What a tokenizer spends on an image: codes, bits of fixed length, and bits of the codec's payload by the static prior.
RATES = {"codes": ".1f", "bits": ".0f", "coded bits": ".0f"}
NUM_SEEDS = 3
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Measure:
    """A measure: its name, how it is written, and whether more of it is better."""

    name: str
    form: str
    more_is_better: bool


PER_IMAGE = {
    "psnr": Measure("PSNR, dB", ".2f", True),
    "ssim": Measure("SSIM", ".4f", True),
    "perceptual": Measure("PD-EffLite0", ".4f", False),
}
OF_SET = {
    "psnr_of_mean_error": Measure("PSNR of mean error, dB", ".2f", True),
    "frechet": Measure("FD-EffLite0", ".1f", False),
}
MEASURES = PER_IMAGE | OF_SET


@dataclass
class Arguments:
    results_dir: str = option(str(HERE / "results"), "folder of the results")
    output: str = option(str(REPOSITORY / "docs" / "evidence-tables.md"), "Markdown file")
    images_dir: str = option(str(REPOSITORY / "docs" / "images"), "folder of the plots")


def main(args):
    for folder in sorted(path for path in Path(args.results_dir).iterdir() if path.is_dir()):
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]
        groups = json.loads((folder / "held_out.json").read_text())["groups"]
        tokenizers = [result for result in results if result["condition"] in CONDITIONS]
        generators = [result for result in results if result["condition"] in GENERATORS]
        runs = by_row(tokenizers)
        if folder.name == HEADLINE:
            plot_curves(runs, Path(args.images_dir, "dynamic_vs_fixed.png"), ["codes"], PER_IMAGE)
        if tokenizers:
            plot = Path(args.images_dir, f"dynamic_vs_fixed-{folder.name}.png")
            plot_curves(runs, plot, measured_rates(runs), MEASURES)
            image = f"![quality against codes and bits]({os.path.relpath(plot, Path(args.output).parent)})"
            parts = [common_settings(tokenizers, groups), rates_table(runs), claim_table(runs, groups), image]
            write_section(Path(args.output), f"tokenizers, {folder.name}", "\n\n".join(filter(None, parts)))
        if generators:
            write_section(Path(args.output), f"generators, {folder.name}", generators_table(generators))


def common_settings(results, groups):
    """What all runs have in common, in a sentence; `ValueError` as of `check_comparable`."""
    check_comparable(results, ("data_sha256", "steps", "batch_size", "learning_rate"))
    versions = sorted({f"torch {result['versions']['torch']}" for result in results})
    return (
        f"{results[0]['steps']} steps of {results[0]['batch_size']} images; {len(groups)} held-out images in "
        f"{len(set(groups))} independent groups; {', '.join(versions)}."
    )


def check_comparable(results, names):
    """Raise `ValueError` at runs that differ in one of these settings."""
    settings = [{name: result[name] for name in names} for result in results]
    if different := [other for other in settings if other != settings[0]]:
        raise ValueError(
            f"all runs must have the same settings, got {settings[0]} and {different[0]}; keep their results apart"
        )


def by_row(results):
    """Figures of finished tokenizer runs: {(condition, routing): {seed: figures}}."""
    runs = {}
    for result in results:
        for way, figures in result["held_out"].items():
            figures = summary(figures) | {"num_parameters": result["num_parameters"]}
            runs.setdefault((result["condition"], way), {})[result["seed"]] = figures
    return runs


def summary(figures):
    """What one run measured: arrays over the images, and numbers."""
    images = {name: np.array(values, dtype=float) for name, values in figures["images"].items()}
    return {
        "images": images,
        "codes": figures["codes"],
        "bits": figures["bits"],
        **({"coded bits": 8 * images["bytes"].mean()} if "bytes" in images else {}),  # not in the oldest results
        "shares": figures["shares"],
        **{name: images[name].mean() for name in PER_IMAGE},
        "psnr_of_mean_error": -10 * math.log10((10 ** (-images["psnr"] / 10)).mean()),
        "frechet": figures["FD-EffLite0"],
    }


def measured_rates(runs):
    """Those of `RATES` that all runs have, with their forms."""
    every = [figures for seeds in runs.values() for figures in seeds.values()]
    return {rate: form for rate, form in RATES.items() if all(rate in figures for figures in every)}


def rates_table(runs):
    """What every condition spends and reaches, means over the seeds and their range."""
    rates = measured_rates(runs)
    rows = [rates_row(*row, list(runs[row].values()), rates) for row in ROWS if row in runs]
    return table(rows, texts=None)


def rates_row(name, way, figures, rates):
    """A row of `rates_table`, of the figures of all seeds."""
    routing = {"own": "its own", "exact": "exact shares"}[way] if CONDITIONS[name].shares else ""
    spent = {rate: spread([each[rate] for each in figures], form) for rate, form in rates.items()}
    reached = {
        measure.name: spread([each[key] for each in figures], measure.form) for key, measure in MEASURES.items()
    }
    shares = np.mean([each["shares"] for each in figures], axis=0)
    return (
        {"condition": name, "routing": routing}
        | spent
        | reached
        | {
            "shares, coarsest first": " / ".join(f"{share:.3f}" for share in shares),
            "parameters": f"{figures[0]['num_parameters']:,}",
            "seeds": f"{len(figures)} of {NUM_SEEDS}",
        }
    )


def claim_table(runs, groups):
    """Differences between conditions, image by image, with intervals; an empty text where nothing can be compared."""
    rows = []
    for name, way in ROWS:
        if not CONDITIONS[name].shares:
            continue
        curve = [(fixed, "own") for fixed in CURVE]
        for rate in measured_rates(runs):
            rows.append(claim_row(runs, groups, (name, way), f"fixed-length at equal {rate}", curve, rate))
        for other in OPPONENTS[name]:
            opponent = (other, way if (other, way) in runs else "own")
            rows.append(claim_row(runs, groups, (name, way), label(*opponent), [opponent]))
    return table([row for row in rows if row], texts=None)


def label(name, way):
    """What a row of `ROWS` is called."""
    if CONDITIONS[name].router in (None, "random"):  # which have no choice of their own
        return name
    return f"{name}, {'exact shares' if way == 'exact' else 'its own choice'}"


def claim_row(runs, groups, row, opponent, others, rate=None):
    """A row of `claim_table`; None if no seed has all the runs that it takes.

    Args:
        opponent: its name.
        others: its rows of `ROWS`; with a rate those between which it is interpolated.
    """
    seeds = sorted(set.intersection(*(set(runs.get(key, {})) for key in [row, *others])))
    if not seeds:
        return None
    cells = {"compared": label(*row), "with": opponent}
    for name, measure in PER_IMAGE.items():
        differences = []
        for seed in seeds:
            ours, theirs = runs[row][seed], [runs[key][seed] for key in others]
            values = [other["images"][name] for other in theirs]
            values = interpolate(ours[rate], [other[rate] for other in theirs], values) if rate else values[0]
            differences.append(ours["images"][name] - values)
        low, high = bootstrap(np.array(differences), np.array(groups))
        mean, *ends = (f"{value:+{measure.form}}" for value in (np.mean(differences), low, high))
        cells[measure.name] = f"{mean} [{', '.join(ends)}] {verdict(low, high, measure.more_is_better)}"
    return cells | {"seeds": f"{len(seeds)} of {NUM_SEEDS}"}


def verdict(low, high, more_is_better):
    """What an interval of differences says: "better", "worse", or "open" where it holds 0."""
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == more_is_better else "worse"


def interpolate(rate, rates, values):
    """Values at a rate, linear in its logarithm between the two measured rates around it, or the two nearest to it.

    Args:
        rates: ascending numbers.
        values: arrays, one for each rate.
    """
    right = min(max(1, np.searchsorted(rates, rate)), len(rates) - 1)
    left = right - 1
    weight = math.log(rate / rates[left]) / math.log(rates[right] / rates[left])
    return (1 - weight) * values[left] + weight * values[right]


def bootstrap(differences, groups, num_resamples=NUM_RESAMPLES, seed=0):
    """A 95 % interval for the mean difference: percentiles over resampled seeds and groups of images, both with replacement.

    Args:
        differences: (seeds, images).
        groups: (images,) integers; images of one photograph, or of one emoji by two vendors, are drawn together.
    """
    rng = np.random.default_rng(seed)
    num_seeds = len(differences)
    _, groups = np.unique(groups, return_inverse=True)
    sizes = np.bincount(groups)
    sums = np.array([np.bincount(groups, weights=row) for row in differences])  # (seeds, groups)
    draws = rng.multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), size=num_resamples
    )  # times a group is drawn
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples) / num_seeds
    means = (seeds * (draws @ sums.T)).sum(axis=1) / (draws @ sizes)
    return tuple(np.percentile(means, [2.5, 97.5]))


def generators_table(results):
    """What every generator reaches in the same time, means over the seeds and their range.

    "–" stands for what an older run did not measure. `ValueError` as of `check_comparable`.
    """
    check_comparable(results, ("data_sha256", "seconds", "batch_size", "learning_rate", "samples"))
    rows = []
    for name, tokenizer in GENERATORS.items():
        runs = [result for result in results if result["condition"] == name]
        if not runs:
            continue
        held_out = [run["held_out"] for run in runs]
        row = {
            "generator": name,
            "codes of": tokenizer,
            "elements": spread([each["elements"] for each in held_out], ".1f"),
            "parameters": spread([run["num_parameters"] for run in runs], ",.0f"),
            "steps": spread([run["steps"] for run in runs], ",.0f"),
            "nats/image": spread([np.mean(each["nats"]) for each in held_out], ".1f"),
            "FD-EffLite0": spread(measured(held_out, "FD"), ".1f"),
            "of its tokenizer": spread(measured(held_out, "tokenizer-FD"), ".1f"),
            "precision": spread(measured(held_out, "precision"), ".2f"),
            "recall": spread(measured(held_out, "recall"), ".2f"),
            "CPU s/sample": spread([each["seconds_per_sample"] for each in held_out], ".3f"),
            "seeds": f"{len(runs)} of {NUM_SEEDS}",
        }
        rows.append(row)
    return table(rows, texts=None)


def measured(held_out, name):
    """A figure of generators by EfficientNet-Lite0; none if one was run before it was measured."""
    figures = [each.get(f"{name}-EffLite0") for each in held_out]
    return [] if None in figures else figures


def spread(values, form):
    """Mean of some numbers, and half of their range; "–" without any."""
    if not values:
        return "–"
    half_range = (max(values) - min(values)) / 2
    return f"{np.mean(values):{form}}" + (f" ± {half_range:{form}}" if half_range > 0 else "")


def plot_curves(runs, path, rates, measures):
    """Each measure (a column) against each rate (a row): the fixed-length curve, and the others as points."""
    figure = Figure(figsize=(4 * len(measures), 3.5 * len(rates)), layout="constrained")
    axes, colours = figure.subplots(len(rates), len(measures), squeeze=False), {}
    for rate, row in zip(rates, axes):
        for axis, (name, measure) in zip(row, measures.items()):
            curve = [points(runs, (fixed, "own"), rate, name) for fixed in CURVE]
            curve = [mean for mean, _ in curve if mean is not None]
            if curve:
                axis.plot(*zip(*curve), "k.-")
            for key in (key for key in ROWS if CONDITIONS[key[0]].shares):
                mean, seeds = points(runs, key, rate, name)
                if mean is not None:
                    colour, marker = colours.setdefault(key[0], f"C{len(colours)}"), "o" if key[1] == "own" else "s"
                    axis.plot(*mean, marker, color=colour, fillstyle="none")
                    axis.plot(*zip(*seeds), marker, color=colour, markersize=2)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set(xlabel=f"{rate} an image", ylabel=measure.name)
            axis.grid(alpha=0.3)
    if runs:
        keys = [Line2D([], [], color="k", marker=".", label="fixed-length")]
        keys += [Patch(color=colour, label=name) for name, colour in colours.items()]
        for marker, choice in (("o", "its own choice"), ("s", "exact shares")):
            keys.append(Line2D([], [], color="0.4", marker=marker, fillstyle="none", linestyle="", label=choice))
        figure.legend(handles=keys, loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)


def points(runs, key, rate, name):
    """(rate, measure) as a mean over the seeds, and of each seed; None and [] without any run."""
    seeds = [(values[rate], values[name]) for values in runs.get(key, {}).values()]
    return (tuple(np.mean(seeds, axis=0)) if seeds else None), seeds


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
