"""Configuration of DQ-VAE, the tokenizer with variable-length codes (stage 1)."""

import math
from typing import ClassVar

from .configuration_utils_dq import (
    MOST_COUNT,
    MOST_LAYERS,
    MOST_WIDTH,
    DQPreTrainedConfig,
    check_choice,
    require_at_most,
    require_finite,
    require_positive,
    require_probability,
)
from .grain_map_dq import check_shares, check_thresholds


class DQVAEConfig(DQPreTrainedConfig):
    """Sizes and choices of a `DQVAEModel` (arXiv 2305.11718, section 3.1 and appendix).

    Args:
        image_size: height and width in pixels of the training images, one number if equal. Other sizes can be
            encoded too; this one fixes the size of the learned position tables.
        granularities: downsampling factors, coarsest first, each half of the one before. One factor is a plain VQ-VAE.
        block_out_channels: width of each encoder level; log2(coarsest factor) + 1 levels.
        decoder_block_out_channels: width of each decoder level, full resolution first; log2(finest factor) + 1
            levels. Default: the encoder's first ones.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        decoder_layers_per_block: the same for the decoder, if it differs.
        encoder_attention_factors: downsampling factors of the encoder levels with self-attention. Default: the
            granularities.
        decoder_attention_factors: the same for the decoder. Default: the finest granularity.
        norm_num_groups: groups of every GroupNorm but the router's.
        dropout: inside residual blocks.
        z_channels: width of the routed features, before `quant_conv`.
        codebook_size: number of codes N.
        codebook_dim: width D of a code.
        codebook_decay: decay of the codebook's moving averages, per step.
        codebook_eps: smoothing of the cluster sizes.
        restart_dead_codes: in training, replace a code that is used less than once a step on average.
        commitment_beta: weight of the commitment term of the VQ loss.
        codebook_weight: weight of the VQ loss in the training loss.
        router: "entropy" (of each region's grey values, no parameters), "feature" (a learned gate, the paper's), "gain"
            (predicts what finer codes gain; learned from a trained tokenizer) or "random" (the control).
        router_gradient: feature router, training: "compared" (every granularity's gate sees what its features would have
            changed) or "selected" (only that of the chosen one does, as in the release).
        entropy_thresholds: entropy router: thresholds to begin with, in nats, ascending, one fewer than granularities.
            Default: evenly spaced up to the maximum, ln 32. The model holds them in its weights, where `calibrate` sets
            them; files of the configuration do not. Where this field is given at loading, it goes first.
        router_norm_num_groups: GroupNorm groups on the features that the feature or gain router sees; None: no
            normalisation.
        router_activation: "silu" or "relu" between the gate's two linear layers; None: a gate of one linear layer (of a
            gain router: "silu").
        budget_targets: share of regions wanted at each granularity but the coarsest, to which training, `calibrate` and
            `train-router` set the router. Default: equal shares of all granularities.
        budget_gamma: weight of the finest granularity's budget term.
        position_type: what the decoder adds on the fine grid: "learned", "fourier" or "fourier+learned".
    """

    model_type = "dqvae"
    keys_to_ignore_at_inference: ClassVar = ["reconstruction_loss", "vq_loss", "budget_loss"]  # by `Trainer`

    image_size: int | list[int] = 256
    granularities: list[int] | tuple[int, ...] = (16, 8)
    block_out_channels: list[int] | tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_block_out_channels: list[int] | None = None
    layers_per_block: int = 2
    decoder_layers_per_block: int | None = None
    encoder_attention_factors: list[int] | None = None
    decoder_attention_factors: list[int] | None = None
    norm_num_groups: int = 32
    dropout: int | float = 0.0
    z_channels: int = 256
    codebook_size: int = 1024
    codebook_dim: int = 256
    codebook_decay: int | float = 0.99
    codebook_eps: int | float = 1e-5
    restart_dead_codes: bool = True
    commitment_beta: int | float = 0.25
    codebook_weight: int | float = 1.0
    router: str = "entropy"
    router_gradient: str = "compared"
    entropy_thresholds: list[int | float] | None = None
    router_norm_num_groups: int | None = 32
    router_activation: str | None = "silu"
    budget_targets: list[int | float] | None = None
    budget_gamma: int | float = 10.0
    position_type: str = "fourier+learned"

    def fill_defaults(self):
        num_granularities = len(self.granularities)
        if self.budget_targets is None:
            self.budget_targets = [1 / num_granularities for _ in range(1, num_granularities)]
        if self.encoder_attention_factors is None:
            self.encoder_attention_factors = list(self.granularities)
        if self.decoder_attention_factors is None:
            self.decoder_attention_factors = self.granularities[-1:]
        if self.decoder_layers_per_block is None:
            self.decoder_layers_per_block = self.layers_per_block
        if self.decoder_block_out_channels is None:
            num_levels = len(self.block_out_channels) - num_granularities + 1
            self.decoder_block_out_channels = list(self.block_out_channels[:num_levels])

    @property
    def num_hidden_layers(self):
        """Levels of encoder and decoder."""
        return len(self.block_out_channels) + len(self.decoder_block_out_channels)

    @property
    def initial_thresholds(self):
        """Entropies in nats: `entropy_thresholds`, or evenly spaced ones."""
        if self.entropy_thresholds is not None:
            return self.entropy_thresholds
        num_granularities = len(self.granularities)
        return [math.log(32) * granularity / num_granularities for granularity in range(1, num_granularities)]

    @property
    def image_height_width(self):
        """(height, width) of the training images in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid_sizes(self):
        """[rows, columns] of each granularity's grid at the training image size, coarsest first."""
        return [[side // factor for side in self.image_height_width] for factor in self.granularities]

    def validate_fields(self):
        require_positive(self, "layers_per_block", "decoder_layers_per_block", "norm_num_groups")
        require_positive(self, "z_channels", "codebook_size", "codebook_dim", "codebook_eps")
        require_at_most(self, MOST_LAYERS, "layers_per_block", "decoder_layers_per_block")
        require_at_most(self, MOST_WIDTH, "z_channels", "codebook_dim", "image_size", "granularities")
        require_at_most(self, MOST_WIDTH, "block_out_channels", "decoder_block_out_channels")
        require_at_most(self, MOST_COUNT, "codebook_size")
        require_probability(self, "dropout", "codebook_decay")
        require_finite(self, "commitment_beta", "codebook_weight", "budget_gamma")

        factors = self.granularities
        halves = all(coarse == 2 * fine for coarse, fine in zip(factors, factors[1:]))
        if not factors or factors[-1] < 1 or factors[-1] & (factors[-1] - 1) or not halves:
            raise ValueError(
                "granularities must be successive powers of two, coarsest first, like [16, 8] or [32, 16, 8]; "
                f"got {factors}"
            )
        if len(self.image_height_width) != 2 or any(side < 1 or side % factors[0] for side in self.image_height_width):
            raise ValueError(
                f"image_size must be one or two multiples of the coarsest granularity {factors[0]}, "
                f"got {self.image_size}"
            )

        for name, factor, attention in (
            ("block_out_channels", factors[0], "encoder_attention_factors"),
            ("decoder_block_out_channels", factors[-1], "decoder_attention_factors"),
        ):
            levels = factor.bit_length()  # log2(factor) + 1
            widths = getattr(self, name)
            if len(widths) != levels:
                raise ValueError(
                    f"{name} must have {levels} widths, one for each level down to factor {factor}; got {widths}"
                )
            for width in widths:
                if width < 1 or width % self.norm_num_groups:
                    raise ValueError(
                        f"{name}: each width must be a multiple of norm_num_groups {self.norm_num_groups}, got {width}"
                    )
            possible = [2**level for level in range(levels)]
            if not set(getattr(self, attention)) <= set(possible):
                raise ValueError(f"{attention} must be among {possible}, got {getattr(self, attention)}")

        check_choice("position_type", self.position_type, ("learned", "fourier", "fourier+learned"))
        check_choice("router", self.router, ("entropy", "feature", "gain", "random"))
        check_choice("router_gradient", self.router_gradient, ("compared", "selected"))
        check_choice("router_activation", self.router_activation, ("silu", "relu", None))
        groups = self.router_norm_num_groups
        if self.router in ("feature", "gain") and groups is not None and (groups < 1 or self.z_channels % groups):
            raise ValueError(f"z_channels {self.z_channels} must be a multiple of router_norm_num_groups {groups}")
        if self.entropy_thresholds is not None:
            check_thresholds("entropy_thresholds", self.entropy_thresholds, len(self.granularities))
        check_shares("budget_targets", self.budget_targets, len(self.granularities))

    def to_diff_dict(self):
        """What the file holds: not the thresholds, which are in the weights."""
        return {name: value for name, value in super().to_diff_dict().items() if name != "entropy_thresholds"}
