"""How many codes and bits images take, and how much of the codebook they use."""

import math

import torch

from dq_hf.metrics.streaming import StreamingMetric, per_image  # absolute: `evaluate` copies this file
from dq_hf.modeling.grain_map_dq import count_codes, expand_grain_map, top_left_cells
from dq_hf.modeling.modeling_utils_dq import check_indices


def count_bits(num_codes, num_regions, codebook_size, num_granularities):
    """Bits of codes, and of the grain map that says where they go: numbers of fixed length, not entropy coded."""
    return num_codes * math.log2(codebook_size), num_regions * math.log2(num_granularities)


def count_uses(codes, grain_maps, codebook_size, num_granularities):
    """How often each code is used at each granularity, (K, N) long; a coarse code counts once, not for each cell."""
    fine_grain_maps = expand_grain_map(grain_maps, num_granularities)
    cells = torch.arange(codes[0].numel(), device=codes.device).view(codes.shape[1:])
    first = top_left_cells(fine_grain_maps, num_granularities) == cells  # of those that a code covers
    uses = fine_grain_maps[first] * codebook_size + codes[first]
    return torch.bincount(uses, minlength=num_granularities * codebook_size).view(num_granularities, codebook_size)


def perplexity(uses):
    """exp of the entropy of how often codes are used, counts (N,): from 1 to the number of codes."""
    shares = uses.double() / uses.sum()
    return float((-shares.xlogy(shares).sum()).exp())


class CodeStatistics(StreamingMetric):
    """Codes and bits an image (grain map included, see `count_bits`), share of the codebook in use, and perplexity of the
    codes: exp of the entropy of how often each is used, from 1 to the size of the codebook.

    A coarse code counts once, however many cells of the fine grid it fills.

    Codes: (B, H, W) integers, on the finest grid; grain maps: (B, h, w) integers; both as `DQVAEModel.encode` gives them.

    Args:
        codebook_size: codes that there are.
        num_granularities: number of granularities.
    """

    inputs = ("codes", "grain_maps")

    def __init__(self, codebook_size, num_granularities, **kwargs):
        self.codebook_size = codebook_size
        self.num_granularities = num_granularities
        super().__init__(**kwargs)

    @property
    def identity(self):
        return {"codebook_size": self.codebook_size, "num_granularities": self.num_granularities}

    def empty_state(self):
        uses = torch.zeros(self.num_granularities, self.codebook_size, dtype=torch.long)
        return {"uses": uses, "codes": 0, "regions": 0, "count": 0}

    def update(self, codes, grain_maps):
        if codes is None or grain_maps is None:
            raise ValueError("codes and grain_maps must be given together")
        grain_maps = check_indices("grain_maps", grain_maps, ("B", "h", "w"), self.num_granularities, "cpu")
        side = 2 ** (self.num_granularities - 1)
        shape = (len(grain_maps), grain_maps.shape[1] * side, grain_maps.shape[2] * side)
        codes = check_indices("codes", codes, shape, self.codebook_size, "cpu")
        self.state["uses"] += count_uses(codes, grain_maps, self.codebook_size, self.num_granularities)
        self.state["codes"] += int(count_codes(grain_maps).sum())
        self.state["regions"] += grain_maps.numel()
        self.state["count"] += len(grain_maps)

    def result(self, state):
        count = per_image(state["count"])
        uses = state["uses"].sum(0)
        bits = sum(count_bits(state["codes"], state["regions"], self.codebook_size, self.num_granularities))
        return {
            "codes": state["codes"] / count,
            "bits": bits / count,
            "codebook usage": float((uses > 0).double().mean()),
            "perplexity": perplexity(uses),
            "num_images": count,
        }
