"""Entropy thresholds for a set of images."""

import math

import torch
from tqdm.auto import tqdm

from ..modeling.routing_dq import NUM_BINS, image_entropy

# Entropies that differ by less than this, in nats, count as equal: ten times float32's rounding of them.
RESOLUTION = 1e-6


def calibrate_thresholds(batches, patch_size, shares):
    """Thresholds at which the entropy router gives these shares of regions, measured with the function that routes.

    One pass; memory does not grow with the number of images (a histogram of the entropies, under 100 MB).

    Args:
        batches: iterable of `pixel_values` (B, 3, H, W) in [-1, 1].
        patch_size: side of a region in pixels, the coarsest granularity.
        shares: share of regions wanted at each granularity but the coarsest, in [0, 1], sum at most 1.

    Returns:
        thresholds in nats, ascending, and the shares that they achieve on these images, exactly as `EntropyRouter`
        counts them: less than those asked for where many regions have the same entropy (plain colour).

    Raises:
        ValueError: no images, sides that `patch_size` does not divide, or impossible shares.
    """
    if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares must lie in [0, 1] with a sum of at most 1, got {shares}")
    # Bin i holds edges[i] < entropy <= edges[i + 1], in float32 like the router's comparison; the first and last are
    # open. Inner edges lie half a resolution off 0, the entropy of many plain regions.
    inner = (torch.arange(math.ceil(math.log(NUM_BINS) / RESOLUTION) + 1, dtype=torch.float64) + 0.5) * RESOLUTION
    edges = torch.cat([torch.tensor([-1.0]), inner.float(), torch.tensor([math.log(NUM_BINS) + 1])])
    counts = torch.zeros(len(edges) - 1, dtype=torch.long)
    for pixel_values in tqdm(batches, desc="calibrate"):
        if pixel_values.shape[2] % patch_size or pixel_values.shape[3] % patch_size:
            raise ValueError(
                f"sides of images must be multiples of {patch_size}, got {tuple(pixel_values.shape[2:])}; resize them"
            )
        bins = torch.bucketize(image_entropy(pixel_values, patch_size).flatten().cpu(), edges[1:-1])
        counts.scatter_add_(0, bins, torch.ones_like(bins))
    occupied = counts.nonzero()[:, 0]
    if len(occupied) == 0:
        raise ValueError("calibration needs at least one image, got none")

    # Split k leaves the first k occupied bins at or below the threshold: halfway from the last of them to the next,
    # to leave room for a GPU's rounding.
    below = torch.cat([edges[:1], edges[occupied + 1]]).double()
    above = torch.cat([edges[occupied], edges[-1:]]).double()
    num_above = counts.sum() - torch.cat([counts.new_zeros(1), counts[occupied].cumsum(0)])
    num_regions = int(num_above[0])
    thresholds, achieved = [], []
    for granularity in range(len(shares)):
        wanted = math.floor(sum(shares[granularity:]) * num_regions + 0.5)  # regions above this threshold
        split = int((num_above > wanted).sum())  # the first split with no more than that
        thresholds.append(float(below[split] + above[split]) / 2)
        achieved.append(int(num_above[split]) / num_regions)
    return thresholds, [share - finer for share, finer in zip(achieved, [*achieved[1:], 0.0])]
