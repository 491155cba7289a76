"""InceptionV3 as the Fréchet inception distance uses it (a graph of TensorFlow 1, December 2015)."""

import torch
import torch.nn.functional as F
from torch import nn

INPUT_SIDE = 299
NUM_CLASSES = 1008


class ConvNormReLU(nn.Module):
    """Convolution, batch norm, ReLU. `stride` 2 has no padding, 1 keeps the size unless `padded` is false."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padded=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [side // 2 for side in kernel] if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, hidden_states):
        return F.relu(self.bn(self.conv(hidden_states)), inplace=True)


class InceptionBlock(nn.Module):
    """Branches side by side, and a pooling one behind them, joined over the channels.

    Args:
        branches: [[(name, channels, kernel), ...], ...]; two convolutions of one branch that end in "a" and "b" take
            the same input, and the branch gives both.
        pool: "avg" or "max", of 3x3 cells.
        pool_channels: of a convolution after the pooling; None: there is none, and the block has stride 2.
    """

    def __init__(self, in_channels, branches, pool, pool_channels=None):
        super().__init__()
        self.stride = 2 if pool_channels is None else 1
        self.pool = pool
        self.chains = [[name for name, _, _ in branch] for branch in branches]
        self.out_channels = pool_channels or in_channels
        for branch in branches:
            channels = in_channels
            for index, (name, width, kernel) in enumerate(branch):
                last = index == len(branch) - 1
                self.add_module(name, ConvNormReLU(channels, width, kernel, self.stride if last else 1))
                if not name.endswith("a"):
                    channels = width
                if last or name.endswith("a"):
                    self.out_channels += width
        if pool_channels is not None:
            self.branch_pool = ConvNormReLU(in_channels, pool_channels, 1)

    def forward(self, hidden_states):
        outputs = []
        for chain in self.chains:
            hidden = hidden_states
            for name in chain:
                output = self.get_submodule(name)(hidden)
                if name.endswith("a"):
                    outputs.append(output)
                else:
                    hidden = output
            outputs.append(hidden)
        padding = 1 if self.stride == 1 else 0
        if self.pool == "max":
            pooled = F.max_pool2d(hidden_states, 3, self.stride, padding)
        else:  # of the cells inside only, as TensorFlow does
            pooled = F.avg_pool2d(hidden_states, 3, self.stride, padding, count_include_pad=False)
        outputs.append(self.branch_pool(pooled) if self.stride == 1 else pooled)
        return torch.cat(outputs, dim=1)


def blocks_35(channels, pool_channels):
    """At 35x35 cells."""
    branches = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return InceptionBlock(channels, branches, "avg", pool_channels)


def block_to_17(channels):
    """From 35x35 to 17x17 cells."""
    branches = [
        [("branch3x3", 384, 3)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return InceptionBlock(channels, branches, "max")


def blocks_17(channels, width):
    """At 17x17 cells."""
    row, column = (1, 7), (7, 1)
    branches = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ],
    ]
    return InceptionBlock(channels, branches, "avg", 192)


def block_to_8(channels):
    """From 17x17 to 8x8 cells."""
    branches = [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        ],
    ]
    return InceptionBlock(channels, branches, "max")


def blocks_8(channels, pool):
    """At 8x8 cells."""
    row, column = (1, 3), (3, 1)
    branches = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            ("branch3x3dbl_3a", 384, row),
            ("branch3x3dbl_3b", 384, column),
        ],
    ]
    return InceptionBlock(channels, branches, pool, 192)


class InceptionV3(nn.Module):
    """Pooled features (B, 2048) and class logits (B, 1008) of images; parameters are named as in the known PyTorch port.

    Images are (B, 3, H, W) float in [0, 1]; the graph's own bilinear resampling to 299x299, without half-pixel centres
    and without antialiasing, is part of it. The logits are those of the inception score, without the bias.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, padded=False)
        channels = 192
        for name, make, *options in (
            ("Mixed_5b", blocks_35, 32),
            ("Mixed_5c", blocks_35, 64),
            ("Mixed_5d", blocks_35, 64),
            ("Mixed_6a", block_to_17),
            ("Mixed_6b", blocks_17, 128),
            ("Mixed_6c", blocks_17, 160),
            ("Mixed_6d", blocks_17, 160),
            ("Mixed_6e", blocks_17, 192),
            ("Mixed_7a", block_to_8),
            ("Mixed_7b", blocks_8, "avg"),
            ("Mixed_7c", blocks_8, "max"),
        ):
            block = make(channels, *options)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, images):
        hidden_states = (resize_like_tensorflow(images * 255) - 128) / 128  # (B, 3, 299, 299)
        for name, module in self.named_children():
            if name == "fc":
                break
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                hidden_states = F.max_pool2d(hidden_states, 3, stride=2)
            hidden_states = module(hidden_states)
        features = hidden_states.mean(dim=(2, 3))  # (B, 2048)
        return features, F.linear(features, self.fc.weight)


def resize_like_tensorflow(images):
    """Bilinear to 299x299: output cell i lies at i * (side / 299) of the input."""
    for dim in (2, 3):
        side = images.shape[dim]
        places = torch.arange(INPUT_SIDE, dtype=torch.float64, device="cpu") * (side / INPUT_SIDE)
        lower = places.long()
        shape = [-1 if axis == dim else 1 for axis in range(4)]
        weights = (places - lower).to(images.device, images.dtype).view(shape)
        upper = (lower + 1).clamp(max=side - 1).to(images.device)
        below, above = images.index_select(dim, lower.to(images.device)), images.index_select(dim, upper)
        images = below + (above - below) * weights
    return images
