"""What the variable-length coding of an image costs."""

import math
from dataclasses import dataclass

from ..modeling.grain_map_dq import count_codes


@dataclass
class CodingCost:
    """What the variable-length coding of one image costs.

    Args:
        num_codes: codes, 4^g for a region of granularity g.
        code_bits: bits of the codes, log2 of the codebook's size each.
        map_bits: bits of the grain map, log2 of the number of granularities for each region.
    """

    num_codes: int
    code_bits: float
    map_bits: float

    @property
    def bits(self):
        """Bits of codes and grain map together."""
        return self.code_bits + self.map_bits


def coding_cost(grain_map, config) -> CodingCost:
    """The cost of a grain map (h, w) with a `DQVAEConfig`."""
    num_codes = int(count_codes(grain_map[None]))
    return CodingCost(
        num_codes=num_codes,
        code_bits=num_codes * math.log2(config.codebook_size),
        map_bits=grain_map.numel() * math.log2(len(config.granularities)),
    )
