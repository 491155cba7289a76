"""Blocks of encoder and decoder against plain torch arithmetic, and position tables on the trained and other grids."""

import pytest
import torch
from torch.nn import functional as F

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.layers_dq import (
    DQLevel,
    DQMiddle,
    DQOutput,
    DQPositionEmbedding,
    attention_block,
    downsample,
    residual_block,
    upsample,
)

ROWS, COLUMNS, WIDTH = 4, 6, 8


def make_config(**changes):
    """Fine grid of 4x6 cells, features of width 8."""
    sizes = dict(
        image_size=[8, 12], granularities=[4, 2], block_out_channels=[8, 8, 8], norm_num_groups=4, z_channels=WIDTH
    )
    return DQVAEConfig(**(sizes | changes))


def randomise(module):
    """Every parameter drawn anew, so that no bias is 0 and no scale 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module.eval()


def make_input(channels=WIDTH, height=4, width=6):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def norm(layer, x):
    """GroupNorm of four groups with eps 1e-6."""
    groups = x.reshape(x.shape[0], 4, -1)
    normal = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return normal.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]


def silu(x):
    return x * torch.sigmoid(x)


@torch.no_grad()
def slow_residual(block, x):
    """GroupNorm, SiLU, conv, GroupNorm, SiLU, conv, plus the input."""
    hidden = F.conv2d(silu(norm(block.norm1, x)), block.conv1.weight, block.conv1.bias, padding=1)
    hidden = F.conv2d(silu(norm(block.norm2, hidden)), block.conv2.weight, block.conv2.bias, padding=1)
    if block.conv_shortcut is not None:
        x = F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
    return x + hidden


@torch.no_grad()
def slow_attention(block, x):
    """One head over all cells, scale C^-0.5, plus the input."""
    cells = norm(block.group_norm, x).flatten(2).transpose(1, 2)  # (B, H*W, C)
    q, k, v = (cells @ part.weight.T + part.bias for part in (block.to_q, block.to_k, block.to_v))
    weights = torch.softmax(q @ k.transpose(1, 2) * x.shape[1] ** -0.5, dim=-1)
    out = weights @ v @ block.to_out[0].weight.T + block.to_out[0].bias
    return x + out.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("out_channels", [8, 16])
def test_residual_block(out_channels):
    block = randomise(residual_block(8, out_channels, make_config()))
    assert (block.conv_shortcut is not None) == (out_channels != 8)
    torch.testing.assert_close(block(make_input(), None), slow_residual(block, make_input()), atol=1e-4, rtol=1e-4)


def test_attention_block():
    block = randomise(attention_block(8, make_config()))
    torch.testing.assert_close(block(make_input()), slow_attention(block, make_input()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", [False, True])
def test_level_puts_attention_after_each_residual_block(attention):
    level = randomise(DQLevel(8, 16, 2, attention, make_config()))
    expected = make_input()
    for i in range(2):
        expected = slow_residual(level.resnets[i], expected)
        if attention:
            expected = slow_attention(level.attentions[i], expected)
    torch.testing.assert_close(level(make_input()), expected, atol=1e-3, rtol=1e-4)


def test_middle_is_residual_attention_residual():
    middle = randomise(DQMiddle(8, make_config()))
    expected = slow_attention(middle.attention, slow_residual(middle.resnet_in, make_input()))
    expected = slow_residual(middle.resnet_out, expected)
    torch.testing.assert_close(middle(make_input()), expected, atol=1e-3, rtol=1e-4)


def test_output_is_norm_silu_convolution():
    output = randomise(DQOutput(8, 3, make_config()))
    expected = F.conv2d(silu(norm(output.norm, make_input())), output.conv.weight, output.conv.bias, padding=1)
    torch.testing.assert_close(output(make_input()), expected, atol=1e-4, rtol=1e-4)


def test_downsampling_pads_right_and_bottom():
    layer = randomise(downsample(8))
    padded = torch.zeros(2, 8, 5, 7)
    padded[:, :, :4, :6] = make_input()
    weight, bias = layer.state_dict()["conv.weight"], layer.state_dict()["conv.bias"]
    torch.testing.assert_close(layer(make_input()), F.conv2d(padded, weight, bias, stride=2), atol=1e-5, rtol=1e-5)


def test_upsampling_repeats_cells_before_the_convolution():
    layer = randomise(upsample(8))
    repeated = make_input().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(make_input()), expected, atol=1e-5, rtol=1e-5)


def positions(position_type, height, width):
    """The layer, and what it adds to a grid of height x width cells, (C, H, W)."""
    layer = randomise(DQPositionEmbedding(make_config(position_type=position_type)))
    x = make_input(height=height, width=width)
    with torch.no_grad():
        added = layer(x) - x
    torch.testing.assert_close(added[0], added[1], atol=1e-5, rtol=0)
    return layer, added[0]


def test_learned_positions_are_row_plus_column_on_the_trained_grid():
    layer, added = positions("learned", ROWS, COLUMNS)
    expected = layer.rows.weight.T[:, :, None] + layer.columns.weight.T[:, None, :]
    torch.testing.assert_close(added, expected.detach(), atol=1e-6, rtol=0)
    assert not any("fourier" in name for name, _ in layer.named_parameters())


def test_learned_positions_are_interpolated_on_another_grid_from_border_to_border():
    layer, added = positions("learned", 2 * ROWS - 1, COLUMNS)  # every second row falls on a trained one
    rows, columns = layer.rows.weight.detach().T, layer.columns.weight.detach().T
    torch.testing.assert_close(added[:, ::2], rows[:, :, None] + columns[:, None, :], atol=1e-5, rtol=0)
    between = (rows[:, :-1] + rows[:, 1:]) / 2
    torch.testing.assert_close(added[:, 1::2], between[:, :, None] + columns[:, None, :], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(ROWS, COLUMNS), (3, 11), (1, 2)])
def test_fourier_positions_are_the_sine_of_a_map_of_the_coordinates(height, width):
    layer, added = positions("fourier", height, width)
    weight, bias = layer.fourier.weight.detach()[:, :, 0, 0], layer.fourier.bias.detach()
    for row in range(height):
        for column in range(width):
            x = -1 + 2 * column / max(width - 1, 1)
            y = -1 + 2 * row / max(height - 1, 1)
            expected = torch.sin(weight[:, 0] * x + weight[:, 1] * y + bias)
            torch.testing.assert_close(added[:, row, column], expected, atol=1e-5, rtol=0)


def test_both_kinds_of_positions_add_up():
    layer, added = positions("fourier+learned", ROWS, COLUMNS)
    learned = layer.rows.weight.detach().T[:, :, None] + layer.columns.weight.detach().T[:, None, :]
    layer.learned = False
    with torch.no_grad():
        fourier = layer(torch.zeros(1, WIDTH, ROWS, COLUMNS))[0]
    torch.testing.assert_close(added, learned + fourier, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(ROWS, COLUMNS), (8, 3)])
def test_positions_work_in_bfloat16(height, width):
    layer = randomise(DQPositionEmbedding(make_config()))
    x = torch.zeros(1, WIDTH, height, width)
    expected = layer(x)
    output = layer.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.02)
