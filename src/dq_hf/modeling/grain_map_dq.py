"""Grain maps: which granularity codes which region.

A region is one cell of the coarsest grid; `grain_map` (B, h, w) long holds each region's granularity, 0 = coarsest.
"""

import itertools
import math
from numbers import Real

import torch


def check_shares(name, shares, num_granularities):
    """Shares of regions at each granularity but the coarsest, as a list; one number is a list of one.

    Args:
        name: of the argument, for messages.
        shares: a number or a list of numbers.
        num_granularities: K, of which the last K - 1 have a share.

    Raises:
        TypeError: no number or list of numbers.
        ValueError: another count, a number out of [0, 1], or a sum above 1.
    """
    given, shares = shares, shares if isinstance(shares, (list, tuple)) else [shares]
    if any(isinstance(share, bool) or not isinstance(share, Real) for share in shares):
        raise TypeError(f"{name} must be a number in [0, 1] or a list of such, got {given!r}")
    if len(shares) != num_granularities - 1:
        raise ValueError(
            f"{name} needs {num_granularities - 1} share(s), one for each granularity but the coarsest; got {given!r}"
        )
    if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ValueError(f"{name} must lie in [0, 1], several shares with a sum of at most 1; got {given!r}")
    return list(shares)


def refinement_shares(chance, num_granularities):
    """Shares as in `check_shares` where each of a region's K - 1 refinements is made with this chance; for K = 2 it is the share."""
    steps = num_granularities - 1
    return [math.comb(steps, g) * chance**g * (1 - chance) ** (steps - g) for g in range(1, num_granularities)]


def check_thresholds(name, thresholds, num_granularities):
    """Raise `ValueError` unless these are K - 1 finite ascending numbers."""
    finer = num_granularities - 1
    if len(thresholds) != finer or not all(map(math.isfinite, thresholds)) or sorted(thresholds) != thresholds:
        raise ValueError(
            f"{name} must be {finer} finite ascending number(s), one for each granularity but the coarsest; "
            f"got {thresholds}"
        )


def share_counts(shares, num_regions):
    """How many of an image's regions have each granularity, coarsest first, K whole numbers.

    Args:
        shares: of each granularity but the coarsest. The number of regions at least as fine as a granularity is the
            nearest whole one, halves upwards.
    """
    at_least, finest_first = [0], 0.0
    for share in shares[::-1]:
        finest_first += share
        at_least.append(math.floor(finest_first * num_regions + 0.5))
    at_least.append(num_regions)
    return [more - less for less, more in itertools.pairwise(at_least)][::-1]


def rank_routing(score, shares):
    """Grain map (B, h, w) with prescribed shares of each image's regions, the highest scores finest.

    Args:
        score: (B, h, w) float, how much a region deserves finer codes.
        shares: share of regions, in [0, 1], at each granularity but the coarsest; counted as in `share_counts`.
    """
    num_regions = score[0].numel()
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(num_regions, device=score.device).expand_as(order)
    grain_map = torch.zeros_like(order)
    counts = share_counts(shares, num_regions)
    for granularity in range(len(shares), 0, -1):  # a region within the first ranks is at least this fine
        is_finer = ranks < sum(counts[granularity:])
        grain_map = torch.where(is_finer & (grain_map == 0), granularity, grain_map)
    return torch.zeros_like(grain_map).scatter(1, order, grain_map).view(score.shape)


def expand_grain_map(grain_map, num_granularities):
    """Granularity of every cell of the fine grid, (B, H, W) long."""
    return repeat_cells(grain_map, 2 ** (num_granularities - 1))


def repeat_cells(grid, side):
    """A grid (..., h, w) whose every cell becomes side x side cells."""
    return grid if side == 1 else grid.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)


def one_hot_gates(grain_map, num_granularities):
    """Gates (B, K, h, w) float of a grain map (B, h, w): 1 at each region's granularity, else 0."""
    return torch.nn.functional.one_hot(grain_map, num_granularities).permute(0, 3, 1, 2).float()


def top_left_cells(fine_grain_map, num_granularities):
    """Raster index of the first fine cell of the code that covers each fine cell, (B, H, W) long."""
    height, width = fine_grain_map.shape[1:]
    side = 2 ** (num_granularities - 1 - fine_grain_map)  # of a code, in fine cells
    rows = torch.arange(height, device=side.device)[:, None]
    columns = torch.arange(width, device=side.device)
    return (rows - rows % side) * width + columns - columns % side


def check_cells(codes, grain_map, num_granularities):
    """Raise ValueError unless codes (B, H, W) are those of the grain maps (B, h, w): one in each cell."""
    cells = top_left_cells(expand_grain_map(grain_map, num_granularities), num_granularities).flatten(1)
    if (codes.flatten(1) != codes.flatten(1).gather(1, cells)).any():
        raise ValueError("codes differ within a cell of grain_map's granularity; encode the image with this grain_map")


def count_codes(grain_map):
    """Codes of each image, (B,) long: 4^g for a region of granularity g."""
    return (4**grain_map).flatten(1).sum(1)
