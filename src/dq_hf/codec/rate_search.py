"""The finest coding of an image that fits into a number of bytes."""

import math

import torch

from ..modeling.grain_map_dq import expand_grain_map, rank_routing, refinement_shares

MOST_RATIOS = 1000  # that are tried


def fit(vae, pixel_values, max_bytes, least_bits, write):
    """The file with the largest fine ratio that has at most `max_bytes`.

    Length does not always grow with the ratio, so that all ratios are looked at, from the largest on, and those written
    that may fit.

    Args:
        pixel_values: (1, 3, height, width).
        least_bits: of codes (H, W) and grain map (h, w), a number below which no payload is.
        write: of the same, the file.

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
    least_bytes = {}
    for ratio in ratios:
        least_bytes[ratio] = int(least_bits(*coding(ratio)) / 8)
        if least_bytes[ratio] <= max_bytes and len(file := write(*coding(ratio))) <= max_bytes:
            return file
    smallest = math.inf
    for ratio in sorted(ratios, key=least_bytes.get):
        if least_bytes[ratio] >= smallest:
            break
        smallest = min(smallest, len(write(*coding(ratio))))
    raise ValueError(f"max_bytes must be at least {smallest} for this image and model, got {max_bytes}")
