"""The tensors of a release's checkpoint under our names."""

import re

import torch

from ..data.fingerprint import THRESHOLDS
from ..modeling.modeling_dqtransformer import DQTransformerForImageGeneration
from ..modeling.modeling_dqvae import DQVAEModel
from .checkpoint import describe
from .config import GRAINS
from .text import cut, listed

# Our name -> the release's, applied in this order; `vae_names` adds those that depend on sizes.
BLOCK_NAMES = (
    (r"\.resnet_in\.", ".block_1."),
    (r"\.resnet_out\.", ".block_2."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.attention\.", ".attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
VAE_NAMES = (
    (r"^encoder\.levels\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.levels\.(\d+)\.attentions\.", r"encoder.down.\1.attn."),
    (r"^encoder\.downsamplers\.(\d+)\.", r"encoder.down.\1.downsample."),
    (r"^router\.gate\.", "encoder.router.gate."),
    (r"^decoder\.position_embedding\.fourier\.", "decoder.position_bias_fourier.lff.ffm.conv."),
    (r"^decoder\.position_embedding\.rows\.", "decoder.position_bias_learned.row_embed."),
    (r"^decoder\.position_embedding\.columns\.", "decoder.position_bias_learned.col_embed."),
    (r"^decoder\.middle\.", "decoder.mid."),
    (r"^decoder\.output\.(norm|conv)\.", r"decoder.\1_out."),
    (r"^quantizer\.codebook$", "quantize.codebook.weight"),
    (r"^quantizer\.cluster_size$", "quantize.codebook.cluster_size_ema"),
    (r"^quantizer\.embed_sum$", "quantize.codebook.embed_ema"),
)
TRANSFORMER_NAMES = (
    (r"^content_embedding\.", "content_emb."),
    (r"^position_embeddings\.0\.", "content_coarse_pos_emb."),
    (r"^position_embeddings\.1\.", "content_fine_pos_emb."),
    (r"^stream_embedding\.weight$", "pos_emb"),
    (r"^granularity_embedding\.", "seg_emb."),
    (r"^(position|content)_transformer\.layers\.", r"\1_transformer."),
    (r"\.input_layernorm\.", ".ln1."),
    (r"\.post_attention_layernorm\.", ".ln2."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"_head\.norm\.", "_head.0."),
    (r"_head\.projection\.", "_head.1."),
)
# Left out: the loss networks and the buffers of the causal mask.
VAE_IGNORED = r"loss\."
TRANSFORMER_IGNORED = r"(position|content)_transformer\.\d+\.attn\.mask$"


def vae_state_dict(state_dict, config, prefix=""):
    """State dict of a `DQVAEModel`, but for the router's thresholds, from the release's keys that begin with `prefix`.

    Args:
        state_dict: {key: tensor}.

    Raises:
        ValueError: keys missing, unknown, of another shape or with values that are not finite.
    """
    return rename(state_dict, DQVAEModel, config, vae_names(config), VAE_IGNORED, prefix)


def transformer_state_dict(state_dict, config, prefix=""):
    """State dict of a `DQTransformerForImageGeneration`; otherwise as `vae_state_dict`."""
    return rename(state_dict, DQTransformerForImageGeneration, config, TRANSFORMER_NAMES, TRANSFORMER_IGNORED, prefix)


def vae_names(config):
    """The name table of a DQ-VAE: granularities are words in the release, and decoder levels are counted upwards."""
    grains = {len(words): words for words in GRAINS.values()}[len(config.granularities)]
    names = []
    for granularity, word in enumerate(grains):
        names += [
            (rf"^encoder\.middles\.{granularity}\.", f"encoder.mid_{word}."),
            (rf"^encoder\.outputs\.{granularity}\.(norm|conv)\.", rf"encoder.\1_out_{word}."),
            (rf"^router\.norms\.{granularity}\.", f"encoder.router.feature_norm_{word}."),
        ]
    last = len(config.decoder_block_out_channels) - 1
    for level in range(last + 1):
        names += [
            (rf"^decoder\.levels\.{level}\.resnets\.", f"decoder.up.{last - level}.block."),
            (rf"^decoder\.levels\.{level}\.attentions\.", f"decoder.up.{last - level}.attn."),
            (rf"^decoder\.upsamplers\.{level}\.", f"decoder.up.{last - level}.upsample."),
        ]
    return (*names, *VAE_NAMES, *BLOCK_NAMES)


def rename(state_dict, model_class, config, names, ignored, prefix):
    """The release's tensors under our names and in our shapes; what does not fit is named in one `ValueError`."""
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected.pop(THRESHOLDS, None)
    converted, used, problems = {}, set(), []
    for name, shape in expected.items():
        key = prefix + name_in_release(name, names)
        kindless = re.sub(r"(\.position_bias)_\w+", r"\1", key)  # where a decoder has positions of one kind only
        if key not in state_dict and kindless in state_dict:
            key = kindless
        used.add(key)
        if key not in state_dict:
            problems.append(f"{key} is missing (our {name})")
        elif problem := problem_of(state_dict[key], shape_in_release(name, shape)):
            problems.append(f"{key} {problem}")
        else:
            rows = slice(-1) if name == "quantizer.codebook" else slice(None)
            converted[name] = state_dict[key][rows].reshape(shape).float()
    for key in state_dict:
        if key.startswith(prefix) and key not in used and not re.match(ignored, key[len(prefix) :]):
            problems.append(f"{cut(key, 100)} is unknown")
    if problems:
        raise ValueError(listed(problems))
    return converted


def name_in_release(name, names):
    """The release's name of our tensor, by a table of names."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def problem_of(value, shape):
    """What is wrong with a value of the release that should be a tensor of this shape; None if nothing is."""
    if not isinstance(value, torch.Tensor):
        return f"must be a tensor, got {describe(value)}"
    if value.shape != shape:
        return f"has shape {tuple(value.shape)}, expected {tuple(shape)}"
    if not value.dtype.is_floating_point:
        return f"must hold floating-point numbers, got {value.dtype}"
    return None if torch.isfinite(value).all() else "must hold finite numbers"


def shape_in_release(name, shape):
    """The release's shape of our tensor: 1x1 convolutions in attention, and a padding row in the codebook."""
    if re.search(r"\.to_(q|k|v|out\.0)\.weight$", name):
        return torch.Size((*shape, 1, 1))
    if name == "quantizer.codebook":
        return torch.Size((shape[0] + 1, shape[1]))
    if name == "stream_embedding.weight":
        return torch.Size((1, *shape))
    return shape
