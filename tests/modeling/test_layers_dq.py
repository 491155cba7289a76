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
    downsample,
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
    hidden = conv(block.conv1, silu(norm(block.norm1, x)), padding=1)
    hidden = conv(block.conv2, silu(norm(block.norm2, hidden)), padding=1)
    return hidden + (x if block.conv_shortcut is None else conv(block.conv_shortcut, x))


@torch.no_grad()
def slow_attention(block, x):
    """One head over all cells, scale C^-0.5, plus the input."""
    cells = norm(block.group_norm, x).flatten(2).transpose(1, 2)  # (B, H*W, C)
    q, k, v = (cells @ part.weight.T + part.bias for part in (block.to_q, block.to_k, block.to_v))
    weights = torch.softmax(q @ k.transpose(1, 2) * x.shape[1] ** -0.5, dim=-1)
    out = weights @ v @ block.to_out[0].weight.T + block.to_out[0].bias
    return x + out.transpose(1, 2).reshape(x.shape)


def conv(layer, x, **options):
    return F.conv2d(x, layer.weight, layer.bias, **options)


@torch.no_grad()
@pytest.mark.parametrize("attention", [False, True])
def test_a_level_puts_attention_after_each_residual_block(attention):
    level = randomise(DQLevel(8, 16, 2, attention, make_config()))
    expected = make_input()
    for i in range(2):
        expected = slow_residual(level.resnets[i], expected)
        if attention:
            expected = slow_attention(level.attentions[i], expected)
    torch.testing.assert_close(level(make_input()), expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_middle_output_and_changes_of_size_are_plain_arithmetic():
    x, middle, output = make_input(), randomise(DQMiddle(8, make_config())), randomise(DQOutput(8, 3, make_config()))
    down, up = randomise(downsample(8)), randomise(upsample(8))
    expected = slow_residual(middle.resnet_out, slow_attention(middle.attention, slow_residual(middle.resnet_in, x)))
    torch.testing.assert_close(middle(x), expected, atol=1e-3, rtol=1e-4)
    faint = 1e-3 * x  # of a variance like the eps of the norm
    expected = conv(output.conv, silu(norm(output.norm, faint)), padding=1)
    torch.testing.assert_close(output(faint), expected, atol=1e-4, rtol=1e-4)
    padded = torch.zeros(2, 8, 5, 7)  # at the right and at the bottom
    padded[:, :, :4, :6] = x
    torch.testing.assert_close(down(x), conv(down.conv, padded, stride=2), atol=1e-5, rtol=1e-5)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), conv(up.conv, repeated, padding=1), atol=1e-5, rtol=1e-5)


def positions(position_type, height, width):
    """The layer, and what it adds to a grid of height x width cells, (C, H, W)."""
    layer = randomise(DQPositionEmbedding(make_config(position_type=position_type)))
    x = make_input(height=height, width=width)
    with torch.no_grad():
        added = layer(x) - x
    torch.testing.assert_close(added[0], added[1], atol=1e-5, rtol=0)
    return layer, added[0]


def test_learned_positions_are_row_plus_column_and_interpolated_on_another_grid_from_border_to_border():
    layer, added = positions("learned", ROWS, COLUMNS)
    rows, columns = layer.rows.weight.detach().T[:, :, None], layer.columns.weight.detach().T[:, None, :]
    torch.testing.assert_close(added, rows + columns, atol=1e-6, rtol=0)
    _, added = positions("learned", 2 * ROWS - 1, COLUMNS)  # every second row falls on a trained one
    torch.testing.assert_close(added[:, ::2], rows + columns, atol=1e-5, rtol=0)
    torch.testing.assert_close(added[:, 1::2], (rows[:, :-1] + rows[:, 1:]) / 2 + columns, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("position_type", "height", "width"),
    [("fourier", ROWS, COLUMNS), ("fourier", 3, 11), ("fourier", 1, 2), ("fourier+learned", ROWS, COLUMNS)],
)
def test_fourier_positions_are_the_sine_of_a_map_of_the_coordinates(position_type, height, width):
    layer, added = positions(position_type, height, width)
    weight, bias = layer.fourier.weight.detach()[:, :, 0, 0], layer.fourier.bias.detach()
    if position_type == "fourier+learned":
        added = added - layer.rows.weight.detach().T[:, :, None] - layer.columns.weight.detach().T[:, None, :]
    for row in range(height):
        for column in range(width):
            x = -1 + 2 * column / max(width - 1, 1)
            y = -1 + 2 * row / max(height - 1, 1)
            expected = torch.sin(weight[:, 0] * x + weight[:, 1] * y + bias)
            torch.testing.assert_close(added[:, row, column], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(ROWS, COLUMNS), (8, 3)])
def test_positions_work_in_bfloat16(height, width):
    layer = randomise(DQPositionEmbedding(make_config()))
    x = torch.zeros(1, WIDTH, height, width)
    expected = layer(x)
    output = layer.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.02)
