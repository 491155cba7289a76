"""Grain maps: which granularity codes which region.

A region is one cell of the coarsest grid; `grain_map` (B, h, w) long holds each region's granularity, 0 = coarsest.
"""

import math

import torch


def rank_routing(score, shares):
    """Grain map (B, h, w) with prescribed shares of each image's regions, the highest scores finest.

    Args:
        score: (B, h, w) float, how much a region deserves finer codes.
        shares: share of regions, in [0, 1], at each granularity but the coarsest; counts are rounded to whole regions.
    """
    num_regions = score[0].numel()
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(num_regions, device=score.device).expand_as(order)
    grain_map = torch.zeros_like(order)
    finest_first = 0.0
    for granularity in range(len(shares), 0, -1):  # a region within the first `count` ranks is at least this fine
        finest_first += shares[granularity - 1]
        count = math.floor(finest_first * num_regions + 0.5)
        grain_map = torch.where((ranks < count) & (grain_map == 0), granularity, grain_map)
    return torch.zeros_like(grain_map).scatter(1, order, grain_map).view(score.shape)


def expand_grain_map(grain_map, num_granularities):
    """Granularity of every cell of the fine grid, (B, H, W) long."""
    side = 2 ** (num_granularities - 1)
    return grain_map.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)


def top_left_cells(fine_grain_map, num_granularities):
    """Raster index of the first fine cell of the code that covers each fine cell, (B, H, W) long."""
    height, width = fine_grain_map.shape[1:]
    side = 2 ** (num_granularities - 1 - fine_grain_map)  # of a code, in fine cells
    rows = torch.arange(height, device=side.device)[:, None]
    columns = torch.arange(width, device=side.device)
    return (rows - rows % side) * width + columns - columns % side


def count_codes(grain_map):
    """Codes of each image, (B,) long: 4^g for a region of granularity g."""
    return (4**grain_map).flatten(1).sum(1)
