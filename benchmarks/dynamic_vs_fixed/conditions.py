"""What is compared: tokenizers for 64x64 images that differ in how many codes an image gets, and in who decides where.

All have the same encoder levels down to 4x4 pixels, the same decoder levels up from there, the same codebook and the
same loss. Below 4x4 pixels a fixed-length tokenizer has one head and one more decoder level where a dynamic one has a
head for each granularity; there the widths are such that all have the same number of parameters to within 1 %.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.grain_map_dq import count_codes, rank_routing, top_left_cells
from dq_hf.modeling.modeling_dqvae import DQVAEEncoderOutput, DQVAEModel

IMAGE_SIZE = 64
SIZES = dict(
    image_size=IMAGE_SIZE,
    layers_per_block=1,
    encoder_attention_factors=[],  # only in the middle blocks, of which every granularity and the decoder have one
    decoder_attention_factors=[],
    norm_num_groups=4,
    router_norm_num_groups=4,
    router_activation=None,  # one linear layer: a second one would be 2 % of all parameters
    z_channels=64,
    codebook_size=256,
    codebook_dim=32,
    codebook_decay=0.95,  # averages over 20 steps instead of 100: the runs are short
)


@dataclass(frozen=True)
class Condition:
    """A tokenizer of the comparison.

    Args:
        granularities: downsampling factors, coarsest first.
        widths: of the encoder's levels.
        decoder_widths: of the decoder's levels.
        router: "entropy", "feature", "random" (regions drawn anew for every image and step) or "gain" (learned by a trained
            tokenizer); None: nothing to route.
        shares: wanted share of regions at each granularity but the coarsest.
        strides: of the last downsampling, (rows, columns); less than 2 x 2 makes a fixed grid larger.
        router_gradient: what the feature router learns from: all granularities ("compared"), or, as in the release, the
            one that was chosen ("selected").
        taught: of a gain router, the condition whose trained tokenizer learns it, with nothing else changed.
    """

    granularities: tuple[int, ...]
    widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    router: str | None = None
    shares: tuple[float, ...] = ()
    strides: tuple[int, int] = (2, 2)
    router_gradient: str = "compared"
    taught: str | None = None


DUAL = dict(granularities=(8, 4), widths=(8, 16, 48, 64), decoder_widths=(8, 16, 48), shares=(1 / 3,))
# 16 (1 + 3 * 11/24 + 15 * 3/8) = 128 codes on average, and 127 in whole regions like the dual ones.
TRIPLE = dict(
    granularities=(16, 8, 4), widths=(8, 16, 48, 48, 32), decoder_widths=(8, 16, 48), shares=(11 / 24, 3 / 8)
)
FIXED = dict(granularities=(8,), widths=(8, 16, 48, 60), decoder_widths=(8, 16, 48, 52))
CONDITIONS = {
    "fixed-64": Condition(**FIXED),
    "fixed-128": Condition(**FIXED, strides=(2, 1)),
    "fixed-256": Condition(**FIXED, strides=(1, 1)),
    "all-fine": Condition(**(DUAL | dict(shares=(1.0,))), router="random"),
    "random": Condition(**DUAL, router="random"),
    "entropy": Condition(**DUAL, router="entropy"),
    "feature": Condition(**DUAL, router="feature"),
    "feature-selected": Condition(**DUAL, router="feature", router_gradient="selected"),
    "gain": Condition(**DUAL, router="gain", taught="entropy"),
    "triple": Condition(**TRIPLE, router="entropy"),
    "triple-feature": Condition(**TRIPLE, router="feature"),
}


def make_model(condition):
    """A new `DQVAEModel`, random weights drawn from torch's global generator."""
    config = DQVAEConfig(
        **SIZES,
        granularities=condition.granularities,
        block_out_channels=condition.widths,
        decoder_block_out_channels=condition.decoder_widths,
        router=condition.router or "entropy",
        router_gradient=condition.router_gradient,
        budget_targets=condition.shares,
    )
    return DQVAEModel(config) if condition.shares else FixedGridVAE(config, condition.strides)


class FixedGridVAE(DQVAEModel):
    """A tokenizer of one granularity whose last downsampling and first upsampling leave out one axis, or both."""

    def __init__(self, config, strides):
        super().__init__(config)
        self.encoder.downsamplers[-1] = AxisDownsample(config.block_out_channels[-2], strides)
        self.decoder.upsamplers[0] = AxisUpsample(config.decoder_block_out_channels[-1], strides)
        rows, columns = (2 * side // stride for side, stride in zip(config.grid_sizes[-1], strides))
        position = self.decoder.position_embedding
        position.rows, position.columns = (nn.Embedding(side, config.z_channels) for side in (rows, columns))

    def encode(self, pixel_values, fine_ratio=None, grain_map=None):
        features = self.encoder(pixel_values)[0]
        grain_map = torch.zeros(len(features), *features.shape[2:], dtype=torch.long, device=features.device)
        quantized = self.quantizer(
            self.quant_conv(features), self.cell_weights(grain_map), top_left_cells(grain_map, num_granularities=1)
        )
        return DQVAEEncoderOutput(
            codes=quantized.codes,
            grain_map=grain_map,
            quantized=quantized.quantized,
            loss=quantized.loss,
            num_codes=count_codes(grain_map),
        )


class AxisDownsample(nn.Module):
    """As the library's downsampling along the axes of stride 2; along an axis of stride 1 the size stays."""

    def __init__(self, channels, strides):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=strides)
        (top, bottom), (left, right) = ((0, 1) if stride == 2 else (1, 1) for stride in strides)
        self.padding = (left, right, top, bottom)

    def forward(self, hidden_states):
        return self.conv(nn.functional.pad(hidden_states, self.padding))


class AxisUpsample(nn.Module):
    """Nearest x2 along the axes of stride 2, then conv3x3."""

    def __init__(self, channels, strides):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.strides = tuple(map(float, strides))

    def forward(self, hidden_states):
        return self.conv(nn.functional.interpolate(hidden_states, scale_factor=self.strides))


def random_grain_map(condition, num_images, generator=None):
    """Grain maps (B, h, w) with the condition's shares of regions, drawn at random."""
    side = IMAGE_SIZE // condition.granularities[0]
    return rank_routing(torch.rand(num_images, side, side, generator=generator), condition.shares)
