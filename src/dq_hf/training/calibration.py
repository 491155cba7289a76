"""Thresholds of a router for a set of images, in a model and in a saved folder."""

import itertools
import json
import logging
import math
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.fingerprint import THRESHOLDS
from ..hub.folders import read_json_object, whole_file
from ..modeling.grain_map_dq import check_shares
from ..modeling.modeling_utils_dq import evaluation_mode

logger = logging.getLogger(__name__)

# Scores in a known range count as equal when they differ by less than this (entropies, in nats: ten times float32's
# rounding); others where they differ by less than this part of themselves.
RESOLUTION = {"linear": 1e-6, "relative": 1e-5}
SMALLEST_SCORE = 1e-3  # below it the relative resolution becomes an absolute one
LARGEST_SCORE = 1e6  # above it all count as equal
TOLERANCE = 0.05  # of a share on other images


def calibrate(vae, batches, shares):
    """Set the thresholds at which the router gives these shares of regions, by the very scores that it routes by.

    One pass; memory does not grow with the number of images (a histogram of the scores, under 150 MB).

    Args:
        vae: a `DQVAEModel`; only `vae.router.thresholds` changes.
        batches: iterable of `pixel_values` (B, 3, H, W) in [-1, 1].
        shares: share of regions wanted at each granularity but the coarsest, in [0, 1], sum at most 1.

    Returns:
        a list of the shares that the router gives on these images from now on, in evaluation: less than those asked
        for where many regions have the same score (plain colour).

    Raises:
        ValueError: no images, images that `encode` would refuse, impossible shares, or scores that are not finite.
    """
    shares = check_shares("shares", shares, len(vae.config.granularities))
    # Bin i holds edges[i] < score <= edges[i + 1], in float32 like the router's comparison; the first and last are open.
    edges = score_edges(vae.router.highest_score)
    counts = torch.zeros(len(edges) - 1, dtype=torch.long)
    for pixel_values in tqdm(batches, desc="calibrate"):
        with torch.no_grad(), evaluation_mode(vae):
            scores = vae.region_scores(pixel_values.to(vae.device)).flatten().cpu()
        if not torch.isfinite(scores).all():
            raise ValueError("the router's scores must be finite, got NaN or infinite ones; the model is damaged")
        bins = torch.bucketize(scores, edges[1:-1])
        counts.scatter_add_(0, bins, torch.ones_like(bins))
    num_regions = int(counts.sum())
    if num_regions == 0:
        raise ValueError("calibration needs at least one image, got none")

    # A threshold may lie below all scores, above all, or halfway between two bins that hold scores and have none between
    # them, which leaves room for a GPU's rounding.
    bins = counts.nonzero()[:, 0]
    end_of_lower = torch.cat([edges[:1], edges[bins + 1]]).double()
    start_of_higher = torch.cat([edges[bins], edges[-1:]]).double()
    candidates = (end_of_lower + start_of_higher) / 2  # ascending
    num_above = num_regions - torch.cat([counts.new_zeros(1), counts[bins].cumsum(0)])  # regions above each candidate
    thresholds, achieved = [], []
    for granularity in range(len(shares)):
        wanted = math.floor(sum(shares[granularity:]) * num_regions + 0.5)  # regions above this threshold
        chosen = int((num_above > wanted).sum())  # the lowest with no more than that
        thresholds.append(candidates[chosen].item())
        achieved.append(num_above[chosen].item() / num_regions)
    vae.router.set_thresholds(thresholds)
    return [share - finer for share, finer in zip(achieved, [*achieved[1:], 0.0])]


class Calibration:
    """The thresholds of a model in training, and the shares of regions that they give on training images.

    A new router that does not learn is calibrated once, when a run begins; both are kept in the checkpoints, so that a run
    that goes on codes as it began. A feature router, which draws its choice in training, is calibrated anew wherever it is
    measured.

    Args:
        options: of the run: calibration_images, batch_size, seed, streaming and decoder_only.
        vae: `DQVAEModel`.
        train_set, collate: training images, and what makes batches of them.
    """

    def __init__(self, options, vae, train_set, collate):
        self.options = options
        self.vae = vae
        self.train_set = train_set
        self.collate = collate
        self.shares = {}

    def run(self):
        """Set the thresholds, the same on all processes."""
        options, config = self.options, self.vae.config
        if len(config.granularities) == 1:
            return
        subset = self.train_set.part(0, 1) if options.streaming else self.train_set.shuffle(seed=options.seed)
        own = torch.Generator()  # training draws the same numbers, however often this is done
        loader = DataLoader(subset, options.batch_size, collate_fn=self.collate, generator=own)
        num_batches = math.ceil(options.calibration_images / options.batch_size)
        images = (batch["pixel_values"] for batch in itertools.islice(loader, num_batches))
        self.shares = dict(zip(config.granularities[1:], calibrate(self.vae, images, config.budget_targets)))

    def recalibrate(self):
        """Calibrate a router that learns; the figures to log, if it was."""
        if self.vae.config.router != "feature" or self.options.decoder_only:
            return {}
        self.run()
        return self.figures()

    def figures(self):
        """The shares by their names in the log."""
        return {f"calibrated_share_{side}": share for side, share in self.shares.items()}

    def state_dict(self):
        return {"shares": self.shares}

    def load_state_dict(self, state):
        self.shares = state["shares"]


def score_edges(highest_score):
    """Edges of the histogram's bins, float32, ascending.

    Inner edges lie half a resolution off 0, the entropy of many plain regions.
    """
    if highest_score is not None:
        step = RESOLUTION["linear"]
        inner = (torch.arange(math.ceil(highest_score / step) + 1, dtype=torch.float64) + 0.5) * step
        ends = -1.0, highest_score + 1
    else:
        step = RESOLUTION["relative"]
        count = math.ceil(math.asinh(LARGEST_SCORE / SMALLEST_SCORE) / step)
        inner = SMALLEST_SCORE * torch.sinh((torch.arange(-count, count, dtype=torch.float64) + 0.5) * step)
        ends = -4 * LARGEST_SCORE, 4 * LARGEST_SCORE
    return torch.cat([torch.tensor(ends[:1]), inner.float(), torch.tensor(ends[1:])])


def warn_of_shares(achieved, wanted, where):
    """Log a warning if a share of regions is off by more than `TOLERANCE`; both lists are as for `calibrate`."""
    if any(abs(got - want) > TOLERANCE for got, want in zip(achieved, wanted)):
        logger.warning(
            f"shares of regions on {where}: {', '.join(f'{share:.3f}' for share in achieved)} instead of "
            f"{', '.join(f'{share:.3f}' for share in wanted)}; the images that the router was calibrated on are fewer, "
            "plainer or of another kind, or the encoder has changed since"
        )


def save_thresholds(folder, thresholds, shares):
    """Write thresholds into all weights of a saved tokenizer, or of the tokenizer in `vae/`, and change no other weight.

    Configurations get `shares` as their `budget_targets`, which training goes on with. All files are written before the first
    one is replaced; an error before that changes none.

    Args:
        folder: as `save_pretrained` writes it.
        thresholds: (K - 1,) float32.
        shares: of regions at each granularity but the coarsest, that the thresholds are to give.
    """
    folder = Path(folder)
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    holders = [path for path in place.glob("model*.safetensors") if "-of-" not in path.name]
    for index in place.glob("model.safetensors.index*.json"):
        shard = read_json_object(index)["weight_map"].get(THRESHOLDS)
        if shard is None:
            raise OSError(f"{index} lists no {THRESHOLDS}; save the model again")
        holders.append(place / shard)
    with ExitStack() as files:  # they are replaced in the end, the last first
        for path in dict.fromkeys([folder / "config.json", place / "config.json"]):
            content = read_json_object(path)
            content.get("vae_config", content)["budget_targets"] = shares
            partial = files.enter_context(whole_file(path))
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in holders:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            weights = load_file(path) | {THRESHOLDS: thresholds.detach().float().cpu()}
            try:
                save_file(weights, files.enter_context(whole_file(path)), metadata)
            except SafetensorError as error:  # such as a full disk
                raise OSError(f"the weights cannot be written to {path}: {error}") from error
