"""An image through the tokenizer and back: what its coding costs and what is left of it."""

import math
from dataclasses import dataclass

import torch

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


@dataclass
class Reconstruction:
    """What `reconstruct` gives of one image.

    Args:
        pixel_values: (1, 3, height, width) float32 in [-1, 1].
        codes: (H, W) long.
        grain_map: (h, w) long, granularity of each region, 0 = coarsest.
        cost: `CodingCost`.
        psnr: dB over all pixels.
    """

    pixel_values: torch.Tensor
    codes: torch.Tensor
    grain_map: torch.Tensor
    cost: CodingCost
    psnr: float


def coding_cost(grain_map, config) -> CodingCost:
    """The cost of a grain map (h, w) with a `DQVAEConfig`."""
    num_codes = int(count_codes(grain_map[None]))
    return CodingCost(
        num_codes=num_codes,
        code_bits=num_codes * math.log2(config.codebook_size),
        map_bits=grain_map.numel() * math.log2(len(config.granularities)),
    )


def peak_signal_to_noise_ratio(first, second):
    """PSNR in dB of two tensors of one shape, in [-1, 1]; infinite if they are equal."""
    error = (first - second).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


@torch.no_grad()
def reconstruct(vae, pixel_values, fine_ratio=None, grain_map=None) -> Reconstruction:
    """Encode and decode one image.

    Args:
        vae: `DQVAEModel`.
        pixel_values: (1, 3, height, width) float in [-1, 1].
        fine_ratio, grain_map: as in `DQVAEModel.encode`.
    """
    encoded = vae.encode(pixel_values, fine_ratio=fine_ratio, grain_map=grain_map)
    decoded = vae.decode_codes(encoded.codes).sample.float().clamp(-1, 1)
    return Reconstruction(
        pixel_values=decoded,
        codes=encoded.codes[0],
        grain_map=encoded.grain_map[0],
        cost=coding_cost(encoded.grain_map[0], vae.config),
        psnr=peak_signal_to_noise_ratio(decoded, pixel_values),
    )
