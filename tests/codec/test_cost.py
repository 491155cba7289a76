"""Costs and quality of reconstructions, against arithmetic."""

import math

import numpy as np
import pytest
import torch
from conftest import make_vae

from dq_hf.codec.cost import coding_cost, peak_signal_to_noise_ratio, reconstruct


def test_cost_counts_codes_and_the_bits_of_codes_and_map():
    config = make_vae(granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16]).config
    cost = coding_cost(torch.tensor([[0, 1, 2], [0, 0, 2]]), config)
    assert cost.num_codes == 3 * 1 + 1 * 4 + 2 * 16
    assert cost.code_bits == 39 * 4  # a codebook of 16
    assert cost.map_bits == pytest.approx(6 * math.log2(3))
    assert cost.bits == cost.code_bits + cost.map_bits


def test_psnr():
    first = np.random.default_rng(0).uniform(-1, 1, (3, 5)).astype(np.float32)
    second = np.random.default_rng(1).uniform(-1, 1, (3, 5)).astype(np.float32)
    expected = 10 * np.log10(1 / np.mean(((first + 1) / 2 - (second + 1) / 2) ** 2))  # of images in [0, 1]
    assert peak_signal_to_noise_ratio(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, abs=1e-4)
    assert peak_signal_to_noise_ratio(torch.ones(2), torch.ones(2)) == math.inf


def test_reconstruction_is_what_the_model_decodes(tiny_vae):
    pixel_values = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = reconstruct(tiny_vae, pixel_values, fine_ratio=0.25)
    assert found.grain_map.shape == (4, 6) and found.grain_map.sum() == 6 and found.cost.num_codes == 18 + 6 * 4
    with torch.no_grad():
        encoded = tiny_vae.encode(pixel_values, grain_map=found.grain_map[None])
        decoded = tiny_vae.decode(encoded.quantized).sample.clamp(-1, 1)
    assert torch.equal(found.codes, encoded.codes[0])
    torch.testing.assert_close(found.pixel_values, decoded)
    assert not found.pixel_values.requires_grad
