"""Codes and grain map by fixed frequencies: whole numbers only, so that the bytes are the same on every machine."""

import math

import numpy as np
import torch

from ..modeling.grain_map_dq import expand_grain_map, top_left_cells
from .container import STATIC
from .entropy_coder import EntropyDecoder, EntropyEncoder

MOST_FREQUENT = 2**16 - 1
ONE_MORE_REGION = 2  # counts so much, beside the 1 with which each granularity begins


class StaticPrior:
    """What a tokenizer alone knows: codes have the frequencies with which its codebook was used in training.

    The grain map, region by region, has the frequencies of the regions before with such neighbours.
    """

    flag = STATIC
    shape = None  # of any images
    class_label = prompt = None

    def __init__(self, vae):
        self.num_granularities = len(vae.config.granularities)
        self.factor = vae.config.granularities[0]  # side of a region in pixels
        self.frequencies = code_frequencies(vae.quantizer.cluster_size)

    def encode(self, codes, grain_map):
        """The payload of codes (H, W) and grain map (h, w)."""
        encoder = EntropyEncoder()
        regions = iter(grain_map.flatten().tolist())

        def write(frequencies):
            encoder.encode(granularity := next(regions), frequencies)
            return granularity

        walk(grain_map.shape, self.num_granularities, write)
        encoder.encode(self._each_once(codes, grain_map), self.frequencies)
        # The coder leaves zeros at the end out, however many: `decode` refuses what is too short for its regions.
        return encoder.to_bytes().ljust(math.ceil(self.least_bits(codes, grain_map) / 8) - 1, b"\0")

    def decode(self, payload, shape):
        """Codes (H, W) and grain map (h, w) of a payload; shape: (h, w).

        Raises:
            ValueError: what cannot be the payload of such an image.
        """
        least = math.prod(shape) * math.log2(self.frequencies.sum() / self.frequencies.max())
        if least > 8 * (len(payload) + 1):  # before there is memory for so many regions
            raise ValueError(f"{len(payload)} bytes cannot hold {shape[0]}x{shape[1]} regions")
        decoder = EntropyDecoder(payload)
        grain_map = walk(shape, self.num_granularities, lambda frequencies: decoder.decode(frequencies)[0])
        grain_map = torch.from_numpy(grain_map)
        top_left, is_first = first_cells(grain_map, self.num_granularities)
        codes = torch.zeros_like(top_left)
        codes[is_first] = torch.from_numpy(decoder.decode(self.frequencies, int(is_first.sum()))).long()
        return codes.flatten()[top_left], grain_map

    def least_bits(self, codes, grain_map):
        """Bits of the codes (H, W) alone, below which no payload is by more than a byte."""
        frequencies = self.frequencies[self._each_once(codes, grain_map)]
        return float(np.log2(self.frequencies.sum() / frequencies).sum())

    def _each_once(self, codes, grain_map):
        """The codes, in the order of their first cells, (codes,) numpy."""
        _, is_first = first_cells(grain_map, self.num_granularities)
        return codes[is_first].cpu().numpy()


def code_frequencies(cluster_size):
    """Cluster sizes (N,) as whole numbers from 1 to 2^16 - 1, int64; all the same where nothing was counted."""
    sizes = cluster_size.cpu().double().nan_to_num(0, 0, 0).clamp(min=0).tolist()
    counts = [int(size * 2**20) for size in sizes]  # float32 times a power of two is exact
    largest = max(max(counts), 1)
    return np.array([max(1, count * MOST_FREQUENT // largest) for count in counts])


def first_cells(grain_map, num_granularities):
    """For each cell of the finest grid (H, W) the raster index of its code's first cell, and whether it is that itself."""
    top_left = top_left_cells(expand_grain_map(grain_map[None], num_granularities), num_granularities)[0]
    return top_left, top_left == torch.arange(top_left.numel(), device=top_left.device).view(top_left.shape)


def walk(shape, num_granularities, choose):
    """The grain map, (h, w) int64, of what `choose(frequencies)` answers for each region, row by row.

    The frequencies (K,) are those of the regions so far whose left and upper neighbours have the same sum.
    """
    counts = np.ones((2 * num_granularities - 1, num_granularities), np.int64)
    grain_map = np.zeros((shape[0] + 1, shape[1] + 1), np.int64)  # with a row and a column of coarsest ones before it
    for row in range(1, shape[0] + 1):
        for column in range(1, shape[1] + 1):
            frequencies = counts[grain_map[row - 1, column] + grain_map[row, column - 1]]
            grain_map[row, column] = granularity = choose(frequencies)
            frequencies[granularity] += ONE_MORE_REGION
    return grain_map[1:, 1:]
