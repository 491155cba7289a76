"""The finest coding of an image that fits into a number of bytes."""

import math

import torch

from ..modeling.grain_map_dq import expand_grain_map, rank_routing, refinement_shares

MOST_RATIOS = 1000  # that are tried


def finest_that_fits(vae, pixel_values, max_bytes, least_bits, length):
    """Codes (H, W) and grain map (h, w) with the largest fine ratio whose file has at most `max_bytes`.

    Length does not always grow with the ratio, so that all ratios are looked at, from the largest on.

    Args:
        pixel_values: (1, 3, height, width).
        least_bits: of codes and grain map, a number below which no file is, at once.
        length: of the same, the bytes of their file.

    Raises:
        ValueError: no ratio reaches it; the message says how many bytes are needed.
    """
    num_granularities, factor = len(vae.config.granularities), vae.config.granularities[0]
    score = vae.region_scores(pixel_values)
    shape = (1, pixel_values.shape[2] // factor, pixel_values.shape[3] // factor)
    # A code depends on its own region's granularity alone.
    codes = [
        vae.encode(pixel_values, grain_map=torch.full(shape, g, device=score.device)).codes[0]
        for g in range(num_granularities)
    ]
    codes = torch.stack(codes)  # (K, H, W)

    def coding(ratio):
        """Codes and grain map with this ratio."""
        grain_map = rank_routing(score, refinement_shares(ratio, num_granularities))
        return codes.gather(0, expand_grain_map(grain_map, num_granularities))[0], grain_map[0]

    steps = min(math.prod(shape), MOST_RATIOS) if num_granularities > 1 else 0
    ratios = [step / steps for step in range(steps, 0, -1)] + [0.0]
    least, lengths = {}, {}
    for ratio in ratios:
        grids = coding(ratio)
        least[ratio] = least_bits(*grids) / 8
        if least[ratio] <= max_bytes:
            lengths[ratio] = length(*grids)
            if lengths[ratio] <= max_bytes:
                return grids
    smallest = min(lengths.values(), default=math.inf)
    for ratio in sorted(set(ratios) - set(lengths), key=least.get):
        if least[ratio] >= smallest:
            break
        smallest = min(smallest, length(*coding(ratio)))
    raise ValueError(f"max_bytes must be at least {smallest} for this image and model, got {max_bytes}")
