"""Entropy thresholds for a set of images."""

import math

import torch
from tqdm.auto import tqdm

from ..modeling.routing_dq import NUM_BINS, image_entropy


def calibrate_thresholds(batches, patch_size, shares):
    """Thresholds at which the entropy router gives these shares of regions, measured with the function that routes.

    Args:
        batches: iterable of `pixel_values` (B, 3, H, W) in [-1, 1].
        patch_size: side of a region in pixels, the coarsest granularity.
        shares: share of regions wanted at each granularity but the coarsest, in [0, 1], sum at most 1.

    Returns:
        thresholds in nats, ascending, and the shares that they achieve on these images, less than those asked for
        where many regions have the same entropy (plain colour).

    Raises:
        ValueError: no images, sides that `patch_size` does not divide, or impossible shares.
    """
    if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares must lie in [0, 1] with a sum of at most 1, got {shares}")
    entropies = []
    for pixel_values in tqdm(batches, desc="calibrate"):
        if pixel_values.shape[2] % patch_size or pixel_values.shape[3] % patch_size:
            raise ValueError(
                f"sides of images must be multiples of {patch_size}, got {tuple(pixel_values.shape[2:])}; resize them"
            )
        entropies.append(image_entropy(pixel_values, patch_size).flatten())
    if not entropies:
        raise ValueError("calibration needs at least one image, got none")
    entropies = torch.cat(entropies).cpu()

    # Entropies lie in [0, ln 32]. A threshold halfway to the next higher one leaves room for a GPU's rounding.
    edges = torch.cat([torch.tensor([-1.0]), entropies.sort().values, torch.tensor([math.log(NUM_BINS) + 1])])
    thresholds = []
    for granularity in range(len(shares)):
        finer = sum(shares[granularity:])  # share of regions above this threshold
        below = edges[round((1 - finer) * len(entropies))]
        above = edges[torch.searchsorted(edges, below, right=True)]
        thresholds.append(float(below + above) / 2)
    achieved = [float((entropies > threshold).double().mean()) for threshold in thresholds] + [0.0]
    return thresholds, [achieved[g] - achieved[g + 1] for g in range(len(shares))]
