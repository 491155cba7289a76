"""What codings cost, against arithmetic."""

import math

import pytest
import torch
from conftest import make_vae

from dq_hf.codec.cost import coding_cost


def test_cost_counts_codes_and_the_bits_of_codes_and_map():
    config = make_vae(granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16]).config
    cost = coding_cost(torch.tensor([[0, 1, 2], [0, 0, 2]]), config)
    assert cost.num_codes == 3 * 1 + 1 * 4 + 2 * 16
    assert cost.code_bits == 39 * 4  # a codebook of 16
    assert cost.map_bits == pytest.approx(6 * math.log2(3))
    assert cost.bits == cost.code_bits + cost.map_bits
