"""Blocks of the DQ-VAE encoder and decoder: diffusers' parts in the paper's order, and the position layer."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

NORM_EPS = 1e-6


def residual_block(in_channels, out_channels, config):
    """GroupNorm, SiLU, conv3x3, twice, with a 1x1 shortcut where the width changes."""
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=None,
        groups=config.norm_num_groups,
        eps=NORM_EPS,
        dropout=config.dropout,
    )


def attention_block(channels, config):
    """One-head self-attention over all cells of (B, C, H, W), with GroupNorm and residual."""
    return Attention(
        channels,
        heads=1,
        dim_head=channels,
        norm_num_groups=config.norm_num_groups,
        eps=NORM_EPS,
        bias=True,
        residual_connection=True,
    )


class DQLevel(GradientCheckpointingLayer):
    """The residual blocks of one resolution, each followed by self-attention where the level has it."""

    def __init__(self, in_channels, out_channels, num_layers, attention, config):
        super().__init__()
        self.resnets = nn.ModuleList(
            residual_block(in_channels if i == 0 else out_channels, out_channels, config) for i in range(num_layers)
        )
        num_attentions = num_layers if attention else 0
        self.attentions = nn.ModuleList(attention_block(out_channels, config) for _ in range(num_attentions))

    def forward(self, hidden_states):
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, None)
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states)
        return hidden_states


class DQMiddle(GradientCheckpointingLayer):
    """Residual block, self-attention, residual block."""

    def __init__(self, channels, config):
        super().__init__()
        self.resnet_in = residual_block(channels, channels, config)
        self.attention = attention_block(channels, config)
        self.resnet_out = residual_block(channels, channels, config)

    def forward(self, hidden_states):
        return self.resnet_out(self.attention(self.resnet_in(hidden_states, None)), None)


class DQOutput(nn.Module):
    """GroupNorm, SiLU, conv3x3."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, in_channels, eps=NORM_EPS)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden_states):
        return self.conv(nn.functional.silu(self.norm(hidden_states)))


def downsample(channels):
    """Pad right and bottom by one, then conv3x3 with stride 2."""
    return Downsample2D(channels, use_conv=True, padding=0, name="op")  # the name under which diffusers keeps one conv


def upsample(channels):
    """Nearest x2, then conv3x3."""
    return Upsample2D(channels, use_conv=True)


class DQPositionEmbedding(nn.Module):
    """Adds position information on the fine grid.

    "learned": a row table plus a column table, interpolated linearly where the grid is not the training one.
    "fourier": sine of a 1x1 convolution of the coordinates (x, y), each from -1 to 1 over the grid.
    """

    def __init__(self, config):
        super().__init__()
        rows, columns = config.grid_sizes[-1]
        self.fourier = nn.Conv2d(2, config.z_channels, 1) if "fourier" in config.position_type else None
        self.learned = "learned" in config.position_type
        if self.learned:
            self.rows = nn.Embedding(rows, config.z_channels)
            self.columns = nn.Embedding(columns, config.z_channels)

    def forward(self, hidden_states):
        height, width = hidden_states.shape[-2:]
        if self.fourier is not None:
            x = torch.linspace(-1, 1, width, device=hidden_states.device, dtype=hidden_states.dtype)
            y = torch.linspace(-1, 1, height, device=hidden_states.device, dtype=hidden_states.dtype)
            coordinates = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
            hidden_states = hidden_states + torch.sin(self.fourier(coordinates[None]))
        if self.learned:
            rows = resize_table(whole_table(self.rows, hidden_states.device), height)[:, :, None]  # (C, H, 1)
            columns = resize_table(whole_table(self.columns, hidden_states.device), width)[:, None, :]  # (C, 1, W)
            hidden_states = hidden_states + (rows + columns)
        return hidden_states


def whole_table(embedding, device):
    """All rows of an embedding, (n, C), by a call: where accelerate has offloaded it, its weight is here only then."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


def resize_table(table, length):
    """A position table (n, C) as (C, length), interpolated linearly if `length` differs from n."""
    table = table.t()
    if table.shape[1] == length:
        return table
    return nn.functional.interpolate(table[None], size=length, mode="linear", align_corners=True)[0]
