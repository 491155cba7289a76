"""DQ-VAE: an image tokenizer that spends codes where the picture needs them (paper section 3.1, figure 3)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import capture_outputs

from .configuration_dqvae import DQVAEConfig
from .grain_map_dq import check_shares, count_codes, expand_grain_map, top_left_cells
from .hub_dq import HubMixin
from .layers_dq import (
    DQLevel,
    DQMiddle,
    DQOutput,
    DQPositionEmbedding,
    downsample,
    upsample,
)
from .modeling_utils_dq import TorchInitMixin, check_indices, seems_to_be_unit
from .quantization_dq import DQQuantizer
from .routing_dq import ROUTERS, GainRouter, mix_features

logger = logging.get_logger(__name__)


@dataclass
class DQVAEEncoderOutput(ModelOutput):
    """What `DQVAEModel.encode` gives; (H, W) is the finest granularity's grid, (h, w) the coarsest's.

    Args:
        codes: (B, H, W) long; a coarse code fills all cells that it covers.
        grain_map: (B, h, w) long, granularity of each region, 0 = coarsest.
        quantized: (B, D, H, W), the code vectors, with the encoder's gradient (straight-through).
        loss: scalar, VQ loss.
        num_codes: (B,) long, codes spent on each image.
        router_logits: (B, K, h, w), with a feature router.
        entropy: (B, h, w) nats, with an entropy router.
        hidden_states: (B, z_channels, H, W), the routed features before `quant_conv`.
        gates: (B, K, h, w), one-hot; with a feature router in training they carry the router's gradient.
        budget_loss: scalar, with a feature router that chose the grain map.
    """

    codes: torch.Tensor | None = None
    grain_map: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    num_codes: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    budget_loss: torch.Tensor | None = None


@dataclass
class DQVAEDecoderOutput(ModelOutput):
    """What `DQVAEModel.decode` gives.

    Args:
        sample: (B, 3, height, width), the image, about in [-1, 1] (not clipped).
    """

    sample: torch.Tensor | None = None


@dataclass
class DQVAEOutput(ModelOutput):
    """What `DQVAEModel.forward` gives.

    Args:
        loss: scalar, reconstruction_loss + codebook_weight * vq_loss + budget_loss.
        sample: (B, 3, height, width), the reconstruction.
        reconstruction_loss: scalar, mean absolute difference.
        vq_loss: scalar.
        budget_loss: scalar, with a feature router that chose the grain map.
        codes, grain_map, num_codes, router_logits, entropy: as in `DQVAEEncoderOutput`.
        hidden_states: on request, a tuple: the input of the encoder's first level, and what each level gives, (B, C, H, W)
            of its own resolution, those of the encoder first.
    """

    loss: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    budget_loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    grain_map: torch.Tensor | None = None
    num_codes: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class DQVAEEncoder(nn.Module):
    """Image to one feature map for each granularity, coarsest first."""

    def __init__(self, config: DQVAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.num_granularities = len(config.granularities)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            DQLevel(
                widths[max(level - 1, 0)],
                widths[level],
                config.layers_per_block,
                attention=2**level in config.encoder_attention_factors,
                config=config,
            )
            for level in range(len(widths))
        )
        self.downsamplers = nn.ModuleList(downsample(width) for width in widths[:-1])
        heads = widths[::-1][: self.num_granularities]  # coarsest first
        self.middles = nn.ModuleList(DQMiddle(width, config) for width in heads)
        self.outputs = nn.ModuleList(DQOutput(width, config.z_channels, config) for width in heads)

    def forward(self, pixel_values):
        hidden_states = self.conv_in(pixel_values)
        levels = []
        for level, block in enumerate(self.levels):
            if level > 0:
                hidden_states = self.downsamplers[level - 1](hidden_states)
            hidden_states = block(hidden_states)
            levels.append(hidden_states)
        coarsest_first = levels[::-1][: self.num_granularities]
        return [output(middle(feature)) for feature, middle, output in zip(coarsest_first, self.middles, self.outputs)]


class DQVAEDecoder(nn.Module):
    """Code vectors on the fine grid to an image."""

    def __init__(self, config: DQVAEConfig):
        super().__init__()
        widths = list(reversed(config.decoder_block_out_channels))  # lowest resolution first
        self.position_embedding = DQPositionEmbedding(config)
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.middle = DQMiddle(widths[0], config)
        self.levels = nn.ModuleList(
            DQLevel(
                widths[max(level - 1, 0)],
                widths[level],
                config.decoder_layers_per_block + 1,
                attention=2 ** (len(widths) - 1 - level) in config.decoder_attention_factors,
                config=config,
            )
            for level in range(len(widths))
        )
        self.upsamplers = nn.ModuleList(upsample(width) for width in widths[:-1])
        self.output = DQOutput(widths[-1], 3, config)

    def forward(self, hidden_states):
        hidden_states = self.conv_in(self.position_embedding(hidden_states))
        hidden_states = self.middle(hidden_states)
        for level, block in enumerate(self.levels):
            if level > 0:
                hidden_states = self.upsamplers[level - 1](hidden_states)
            hidden_states = block(hidden_states)
        return self.output(hidden_states)


class ExactLoadingMixin:
    """Stands before `PreTrainedModel`: codebook and thresholds are float32 in any dtype.

    `entropy_thresholds` of a configuration go before those of the weights.
    """

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for module in (model.quantizer, model.router):  # transformers keeps them so in half precision only
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.float())
        model.router.finish_loading(model.config)
        return (model, info) if output_loading_info else model


class DQVAEModel(HubMixin, ExactLoadingMixin, TorchInitMixin, PreTrainedModel):
    """The tokenizer: encoder, router, quantiser, decoder (arXiv 2305.11718, section 3.1).

    Any image size that the coarsest granularity divides is accepted, square or not.
    """

    config_class = DQVAEConfig
    base_model_prefix = "vae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Its attention is diffusers': torch's scaled_dot_product_attention, whatever is chosen for the generator beside it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules = ["DQLevel", "DQMiddle"]
    _keep_in_fp32_modules_strict = {"quantizer", "router.thresholds"}
    _can_record_outputs = {"hidden_states": DQLevel}
    weights_that_may_be_infinite = {"router.thresholds"}  # until they are calibrated; the router checks them

    def __init__(self, config: DQVAEConfig):
        config.validate()
        super().__init__(config)
        self.encoder = DQVAEEncoder(config)
        self.router = ROUTERS[config.router](config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantizer = DQQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = DQVAEDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        """What reads the pixels: the encoder's first convolution."""
        return self.encoder.conv_in

    def set_input_embeddings(self, value):
        """Another module in its place."""
        self.encoder.conv_in = value

    def requires_grad_(self, requires_grad=True):
        """As in torch, but a gain router stays frozen: no loss of this model reaches it (see `learn_router`)."""
        super().requires_grad_(requires_grad)
        if isinstance(self.router, GainRouter):
            self.router.requires_grad_(False)
        return self

    def region_scores(self, pixel_values):
        """How much each region of images (B, 3, height, width) deserves finer codes, (B, h, w) float32: the router's score."""
        pixel_values = self._check_pixel_values(pixel_values)
        features = None
        if self.router.uses_features:
            features = self.encoder(pixel_values.to(self.encoder.conv_in.weight.dtype))
        return self.router.look(pixel_values, features).score

    def encode(self, pixel_values, fine_ratio=None, grain_map=None, return_dict=True) -> DQVAEEncoderOutput:
        """Tokenise images.

        The router chooses each region's granularity, unless one of the two options prescribes it. In training mode
        the codebook moves, unless `quant_conv` is frozen (as all weights are under an adapter), and a feature router
        whose weights are not frozen draws its choice from torch's global generator.

        Args:
            pixel_values: (B, 3, height, width) float in [-1, 1], sides multiples of the coarsest granularity.
            fine_ratio: share of each image's regions, in [0, 1], that become fine (rounded to whole regions), those
                that the router's own score ranks first. With more than two granularities a list of shares, one for
                each granularity but the coarsest.
            grain_map: (B, h, w) integers, the granularity of each region.
            return_dict: False gives a tuple, as in transformers and diffusers.

        Raises:
            TypeError, ValueError: an input of another type, shape or range, or weights whose features are not finite.
        """
        pixel_values = self._check_pixel_values(pixel_values)
        num_granularities = len(self.config.granularities)
        shares = None if fine_ratio is None else check_shares("fine_ratio", fine_ratio, num_granularities)
        if grain_map is not None:
            if fine_ratio is not None:
                raise ValueError("give either fine_ratio or grain_map, not both")
            factor = self.config.granularities[0]
            regions = (len(pixel_values), pixel_values.shape[2] // factor, pixel_values.shape[3] // factor)
            grain_map = check_indices("grain_map", grain_map, regions, num_granularities, pixel_values.device)

        features = self.encoder(pixel_values.to(self.encoder.conv_in.weight.dtype))
        routed = self.router(pixel_values, features, grain_map, shares)
        hidden_states = mix_features(features, routed.gates)

        fine_grain_map = expand_grain_map(routed.grain_map, num_granularities)
        cell_weights = self.cell_weights(fine_grain_map)
        top_left = top_left_cells(fine_grain_map, num_granularities)
        learn = self.quant_conv.weight.requires_grad  # else the codebook would leave the vectors that it stands for
        vectors = self.quant_conv(hidden_states)
        if not (self.training or torch.compiler.is_compiling() or torch.isfinite(vectors).all()):
            raise ValueError(
                "the encoder's features are not finite, so they have no codes: its weights are NaN, or too large for their "
                "dtype; load it with dtype=torch.bfloat16 or torch.float32"
            )
        quantizer_output = self.quantizer(vectors, cell_weights, top_left, learn)
        output = DQVAEEncoderOutput(
            codes=quantizer_output.codes,
            grain_map=routed.grain_map,
            quantized=quantizer_output.quantized.to(hidden_states.dtype),
            loss=quantizer_output.loss,
            num_codes=count_codes(routed.grain_map),
            router_logits=routed.router_logits,
            entropy=routed.entropy,
            hidden_states=hidden_states,
            gates=routed.gates,
            budget_loss=routed.loss,
        )
        return output if return_dict else output.to_tuple()

    def cell_weights(self, fine_grain_map):
        """Loss weight (B, 1, H, W) of each cell of the fine grid, 4^-(K-1-g), so that every code counts once."""
        return 4.0 ** (fine_grain_map - len(self.config.granularities) + 1)[:, None]

    def decode(self, quantized, return_dict=True) -> DQVAEDecoderOutput:
        """Image of code vectors (B, D, H, W) on the finest granularity's grid; `return_dict` as in `encode`."""
        if not isinstance(quantized, torch.Tensor) or not quantized.is_floating_point():
            got = getattr(quantized, "dtype", type(quantized).__name__)
            raise TypeError(f"quantized must be a float tensor, got {got}")
        if quantized.dim() != 4 or quantized.shape[1] != self.config.codebook_dim or quantized.numel() == 0:
            raise ValueError(
                f"quantized must have shape (B, {self.config.codebook_dim}, H, W), got {tuple(quantized.shape)}; "
                "for code indices use decode_codes"
            )
        if not (self.training or torch.compiler.is_compiling() or torch.isfinite(quantized).all()):
            raise ValueError("quantized must be finite, got NaN or infinite values")
        hidden_states = self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype))
        sample = self.decoder(hidden_states)
        return DQVAEDecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_codes(self, codes, return_dict=True) -> DQVAEDecoderOutput:
        """Image of codes (B, H, W), integers in [0, codebook_size), on the finest granularity's grid."""
        codes = check_indices(
            "codes", codes, ("B", "H", "W"), self.config.codebook_size, self.quantizer.codebook.device
        )
        return self.decode(self.quantizer.lookup(codes), return_dict)

    def decode_each(self, codes, present=None) -> DQVAEDecoderOutput:
        """As `decode_codes`, one image at a time.

        Convolutions of another batch size may round differently; a generated image should not depend on its
        neighbours, not even in its last bit. Next to sampling, decoding takes no time.

        Args:
            present: (B, H, W) bool, False where a code is still to come: its vector is zero. None: all are there.
        """
        if present is None:
            samples = [self.decode_codes(image[None]).sample for image in codes]
        else:
            vectors = self.quantizer.lookup(codes) * present[:, None]
            samples = [self.decode(image[None]).sample for image in vectors]
        return DQVAEDecoderOutput(sample=torch.cat(samples))

    @capture_outputs
    def forward(
        self,
        pixel_values,
        fine_ratio=None,
        grain_map=None,
        return_loss=True,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ) -> DQVAEOutput:
        """Reconstruct images, with the model's own losses (L1, VQ, budget).

        Args:
            pixel_values, fine_ratio, grain_map: as in `encode`.
            return_loss: False leaves `loss` out.
            output_hidden_states, return_dict: as in transformers.
            output_attentions: refused; the tokenizer's attention is torch's own, which does not give its weights.
        """
        if output_attentions:
            raise ValueError("a tokenizer gives no attention weights; leave out output_attentions")
        encoded = self.encode(pixel_values, fine_ratio=fine_ratio, grain_map=grain_map)
        sample = self.decode(encoded.quantized).sample
        reconstruction_loss = (sample.float() - pixel_values.float()).abs().mean()
        loss = reconstruction_loss + self.config.codebook_weight * encoded.loss
        if encoded.budget_loss is not None:
            loss = loss + encoded.budget_loss
        return DQVAEOutput(
            loss=loss if return_loss else None,
            sample=sample,
            reconstruction_loss=reconstruction_loss,
            vq_loss=encoded.loss,
            budget_loss=encoded.budget_loss,
            codes=encoded.codes,
            grain_map=encoded.grain_map,
            num_codes=encoded.num_codes,
            router_logits=encoded.router_logits,
            entropy=encoded.entropy,
        )

    def _check_pixel_values(self, pixel_values):
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            got = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise TypeError(f"pixel_values must be a float tensor in [-1, 1], got {got}; use DQImageProcessor")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must have shape (B, 3, height, width), got {tuple(pixel_values.shape)}")
        factor = self.config.granularities[0]
        for name, side in zip(("height", "width"), pixel_values.shape[2:]):
            if side == 0 or side % factor:
                raise ValueError(f"{name} must be a multiple of {factor}, got {side}; resize or pad the image")
        if pixel_values.shape[0] == 0:  # len() would fix the number of images in an exported graph
            raise ValueError("pixel_values must hold at least one image, got a batch of 0")
        if not torch.compiler.is_compiling():
            low, high = pixel_values.detach().aminmax()
            if not (low >= -1.001 and high <= 1.001):  # false for NaN too; the margin is bfloat16 rounding
                raise ValueError(
                    f"pixel_values must be finite and lie in [-1, 1], got values from {low:.4g} to {high:.4g}; "
                    "use DQImageProcessor"
                )
            if seems_to_be_unit(low, high):
                logger.warning_once(
                    "pixel_values are read as [-1, 1], and no value of these is below 0: if they lie in [0, 1], give 2 * x - 1, "
                    "or images to DQImageProcessor"
                )
        return pixel_values
