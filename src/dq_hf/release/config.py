"""A configuration of the release as ours."""

import math
import re
from pathlib import Path

from ..modeling.configuration_dq import DQConfig
from ..modeling.configuration_dqtransformer import DQTransformerConfig
from ..modeling.configuration_dqvae import DQVAEConfig
from .text import cut, listed, read_yaml, shown
from .thresholds import entropy_threshold

GRAINS = {"Dual": ("coarse", "fine"), "Triple": ("coarse", "median", "fine")}  # the release's words, coarsest first

# Parameters of the release that change nothing in the converted model: training schedule, data keys, loss networks.
SCHEDULE = ("monitor", "warmup_epochs", "scheduler_type", "weight_decay", "ckpt_path", "ignore_keys")
LOSS = ("perceptual_weight", "pixelloss_weight", "use_actnorm")  # and all that begin with disc_

KINDS = {  # of parameters, and what they are called
    list: "a list of integers",
    float: "a finite number",
    int: "an integer",
    bool: "true or false",
    str: "a string",
}

MOST_LEVELS = 20  # of resolution; the release has 6 at most


def read_config(path, thresholds_path=None):
    """`DQVAEConfig` or `DQConfig` of the release's `config.yml`, and a line for each default that was taken.

    Args:
        path: the configuration. Its `json_path` is looked for beside it, then in the folders above it.
        thresholds_path: the table of entropy thresholds, instead of `json_path`.

    Raises:
        FileNotFoundError: no such file, or no table of entropy thresholds.
        ValueError: it is no YAML file of plain values, incomplete, contradicts itself or asks for what we do not have.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} must have a section `model`, as the release's configurations do")
    try:
        model = Section(content["model"], "model", [*(f"{word}GrainVQModel" for word in GRAINS), "Dualformer"])
        convert = generation_config if model.target == "Dualformer" else vae_config
        return convert(model, path, thresholds_path), model.defaults
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {cut(error, 1000)}") from None


class Section:
    """A `{target, params}` entry of the release's configuration, whose parameters must all be read or known.

    Args:
        entry: its value in the YAML file.
        path: where it is, for messages.
        targets: class names that it may have; what stands before the last dot of `target` is free.
        defaults: list to which a line is added for each default that is taken; sub-sections share it.
    """

    def __init__(self, entry, path, targets, defaults=None):
        if not isinstance(entry, dict) or not isinstance(entry.get("target"), str):
            raise ValueError(f"{path} must have a target and params, got {shown(entry)}")
        unknown = set(entry) - {"target", "params", "base_learning_rate", "learning_rate", "min_learning_rate"}
        if unknown:
            raise ValueError(f"{path} has unknown entries: {listed(sorted(map(cut, unknown)))}")
        self.target = entry["target"].rpartition(".")[2]
        if self.target not in targets:
            raise ValueError(
                f"{path}.target must be one of the classes {', '.join(targets)}; got {shown(entry['target'])}"
            )
        self.params = {} if entry.get("params") is None else entry["params"]
        if not isinstance(self.params, dict):
            raise ValueError(f"{path}.params must be a mapping, got {shown(self.params)}")
        self.path = path
        self.read = set()
        self.defaults = [] if defaults is None else defaults

    def value(self, key, default=None):
        """A parameter as it stands in the file, or its default; one without default is required."""
        self.read.add(key)
        if key in self.params:
            return self.params[key]
        if default is None:
            raise ValueError(f"{self.path}.params.{key} is missing")
        self.defaults.append(f"{self.path}.params.{key} is not in the configuration: {default}, the release's default")
        return default

    def get(self, key, kind, default=None):
        """A parameter of type `kind`, a key of `KINDS`."""
        value = self.value(key, default)
        if kind is float and isinstance(value, str):
            value = yaml_float(value)
        if kind is list:
            good = isinstance(value, list) and all(type(item) is int for item in value)
        else:
            good = type(value) in ((int, float) if kind is float else (kind,))
        if not good or type(value) is float and not math.isfinite(value):
            raise self.refusal(key, f"must be {KINDS[kind]}", value)
        return value

    def choose(self, key, choices):
        """A parameter that is one of these texts."""
        value = self.get(key, str)
        if value not in choices:
            raise self.refusal(key, f"must be one of {', '.join(choices)}", value)
        return value

    def require(self, key, expected, why, default=None):
        """Check a parameter whose value follows from others."""
        value = self.value(key, default)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            absent = "" if key in self.params else ", the release's default; write it into the file"
            raise ValueError(f"{self.refusal(key, f'must be {expected!r}, {why}', value)}{absent}")

    def section(self, key, targets):
        """A required sub-section."""
        return Section(self.value(key), f"{self.path}.params.{key}", targets, self.defaults)

    def refusal(self, key, must, got):
        """The `ValueError` of a parameter that is not what it must be."""
        return ValueError(f"{self.path}.params.{key} {must}; got {shown(got)}")

    def finish(self, *without_effect):
        """Refuse parameters that were not read, except the named ones."""
        unknown = sorted(cut(key) for key in set(self.params) - self.read - set(without_effect))
        if unknown:
            raise ValueError(f"{self.path}.params has parameters that the converter does not know: {listed(unknown)}")


def yaml_float(text):
    """`text` as a number if it is one; YAML 1.1 takes 1e-4 for a string, the release's reader for a number."""
    try:
        return float(text)
    except ValueError:
        return text


def vae_config(model, path, thresholds_path):
    """`DQVAEConfig` of a section of the class DualGrainVQModel or TripleGrainVQModel."""
    word = model.target.removesuffix("GrainVQModel")
    encoder = model.section("encoderconfig", [f"{word}GrainEncoder"])
    decoder = model.section("decoderconfig", ["Decoder"])
    codebook = model.section("vqconfig", ["VectorQuantize2"])
    resolution, z_channels = encoder.get("resolution", int), encoder.get("z_channels", int)
    multipliers, decoder_multipliers = encoder.get("ch_mult", list), decoder.get("ch_mult", list)
    num_granularities = len(GRAINS[word])
    if not num_granularities <= len(multipliers) <= MOST_LEVELS:
        must = f"must have a level for each of {num_granularities} granularities, and at most {MOST_LEVELS}"
        raise encoder.refusal("ch_mult", must, multipliers)
    num_decoder_levels = len(multipliers) + 1 - num_granularities
    if len(decoder_multipliers) != num_decoder_levels:
        must = f"must have {num_decoder_levels} levels, the encoder's down to the finest granularity"
        raise decoder.refusal("ch_mult", must, decoder_multipliers)
    width, decoder_width = encoder.get("ch", int), decoder.get("ch", int)
    granularities = [2 ** (len(multipliers) - 1 - granularity) for granularity in range(num_granularities)]
    fields = dict(
        image_size=resolution,
        granularities=granularities,
        block_out_channels=[width * multiplier for multiplier in multipliers],
        decoder_block_out_channels=[decoder_width * multiplier for multiplier in decoder_multipliers],
        layers_per_block=encoder.get("num_res_blocks", int),
        decoder_layers_per_block=decoder.get("num_res_blocks", int),
        encoder_attention_factors=attention_factors(encoder, resolution, len(multipliers)),
        decoder_attention_factors=attention_factors(decoder, resolution, len(decoder_multipliers)),
        dropout=encoder.get("dropout", float, 0.0),
        z_channels=z_channels,
        codebook_size=codebook.get("codebook_size", int),
        codebook_dim=codebook.get("codebook_dim", int),
        codebook_decay=codebook.get("decay", float, 0.99),
        restart_dead_codes=codebook.get("restart_unused_codes", bool, True),
        commitment_beta=codebook.get("commitment_beta", float, 0.25),
        position_type=decoder.get("position_type", str),
        **(
            loss_fields(model, word, [resolution // factor for factor in granularities])
            | router_fields(model, encoder, granularities[0], path, thresholds_path)
        ),
    )

    encoder.require("in_channels", 3, "RGB")
    encoder.require("resamp_with_conv", True, "the only way of downsampling", default=True)
    encoder.finish("update_router")
    decoder.require("in_ch", z_channels, "the encoder's z_channels")
    decoder.require("out_ch", 3, "RGB")
    decoder.require("resolution", resolution, "the encoder's resolution")
    decoder.require("latent_size", resolution // granularities[-1], f"resolution / {granularities[-1]}")
    decoder.require("dropout", fields["dropout"], "the encoder's dropout", default=fields["dropout"])
    decoder.require("resamp_with_conv", True, "the only way of upsampling", default=True)
    decoder.require("give_pre_end", False, "or there is no image", default=False)
    decoder.finish("window_size")
    codebook.require("channel_last", False, "the layout of the features", default=False)
    codebook.require("accept_image_fmap", True, "the layout of the features", default=True)
    codebook.finish()
    model.require("quant_before_dim", z_channels, "the encoder's z_channels")
    model.require("quant_after_dim", fields["codebook_dim"], "the quantiser's codebook_dim")
    model.finish("quant_sample_temperature", "image_key", *SCHEDULE)
    return DQVAEConfig(**fields)


def attention_factors(section, resolution, num_levels):
    """Downsampling factors of the levels whose resolution is in `attn_resolutions`; others there have no effect."""
    with_attention = section.get("attn_resolutions", list)
    return [2**level for level in range(num_levels) if resolution // 2**level in with_attention]


def router_fields(model, encoder, coarsest_factor, path, thresholds_path):
    """Fields of `DQVAEConfig` that describe the router."""
    word = model.target.removesuffix("GrainVQModel")
    targets = [f"{word}GrainFeatureRouter", *(["DualGrainFixedEntropyRouter"] if word == "Dual" else [])]
    router = encoder.section("router_config", targets)
    if router.target == "DualGrainFixedEntropyRouter":
        model.require("entropy_patch_size", coarsest_factor, "the coarsest downsampling factor", default=16)
        model.require("image_size", encoder.get("resolution", int), "the encoder's resolution", default=256)
        threshold = entropy_threshold(router, coarsest_factor, path, thresholds_path)
        budget = [router.get("fine_grain_ratito", float)]
        router.finish()
        return {"router": "entropy", "entropy_thresholds": [threshold], "budget_targets": budget}
    if thresholds_path is not None:
        raise ValueError(f"entropy thresholds were given for {router.path}, a {router.target}; leave them out")

    router.require("num_channels", encoder.get("z_channels", int), "the encoder's z_channels")
    gate, normalization = router.get("gate_type", str), router.get("normalization_type", str)
    gates = {"1layer-fc": None, "2layer-fc-SiLu": "silu", "2layer-fc-ReLu": "relu"}
    activations = {name.lower(): activation for name, activation in gates.items()}
    if gate.lower() not in activations:
        raise router.refusal("gate_type", f"must be one of {', '.join(gates)}", gate)
    groups = re.fullmatch(r"none|group-(\d+)", normalization)
    if not groups:
        must = 'must be "none" or "group-" with a number of groups'
        raise router.refusal("normalization_type", must, normalization)
    router.finish()
    return {
        "router": "feature",
        "router_gradient": "selected",
        "router_activation": activations[gate.lower()],
        "router_norm_num_groups": groups[1] and int(groups[1]),
    }


def loss_fields(model, word, sides):
    """Fields of `DQVAEConfig` from the training loss; `sides` are the grids' sides, coarsest first."""
    if "lossconfig" not in model.params:
        return {}
    loss = model.section("lossconfig", ["VQLPIPSWithDiscriminator", "DummyLoss"])
    fields = {"codebook_weight": loss.get("codebook_weight", float, 1.0)}
    if "budget_loss_config" in loss.params:
        # The finest term is doubled by calculate_all: the release adds the same squared error of the coarse share.
        target = {"Dual": "RatioMSE_DualGrain", "Triple": "NormedSeperateRatioMSE_TripleGrain"}[word]
        budget = loss.section("budget_loss_config", [f"BudgetConstraint_{target}"])
        fields["budget_gamma"] = budget.get("gamma", float)
        if word == "Dual":
            fields["budget_targets"] = [budget.get("target_ratio", float)]
            fields["budget_gamma"] *= 2 if budget.get("calculate_all", bool) else 1
        else:
            fields["budget_targets"] = [budget.get(f"target_{grain}_ratio", float) for grain in ("median", "fine")]
        for name, side in zip({"Dual": ("min", "max"), "Triple": ("min", "median", "max")}[word], sides):
            budget.require(f"{name}_grain_size", side, "the side of that granularity's grid")
        budget.finish()
    loss.finish(*LOSS, *(key for key in loss.params if str(key).startswith("disc_")))
    return fields


def generation_config(model, path, thresholds_path):
    """`DQConfig` of a section of the class Dualformer."""
    first_stage = model.section("first_stage_config", ["DualGrainVQModel"])
    vae = vae_config(first_stage, path, thresholds_path)
    stack = model.section("transformer_config", ["StackGPT"])
    permuter = model.section("permuter_config", ["DualGrainSeperatePermuter"])
    by_class = "class_cond_stage_config" in model.params
    if by_class == ("uncond_stage_config" in model.params):
        raise ValueError(f"{model.path}.params must have either class_cond_stage_config or uncond_stage_config")
    if by_class:
        start = model.section("class_cond_stage_config", ["ClassAwareSOSProvider"])
    else:
        start = model.section("uncond_stage_config", ["PositionAwareSOSProvider"])
    transformer = DQTransformerConfig(
        grid_sizes=vae.grid_sizes,
        codebook_size=vae.codebook_size,
        num_classes=start.get("n_classes", int) if by_class else 0,
        hidden_size=stack.get("n_embd", int),
        num_attention_heads=stack.get("n_head", int),
        num_position_layers=stack.get("position_layer", int),
        num_content_layers=stack.get("content_layer", int),
        max_stream_length=stack.get("block_size", int),
        fine_order=permuter.choose("fine_position_order", ("row-first", "region-first")),
        embedding_dropout=stack.get("embd_pdrop", float, 0.0),
        residual_dropout=stack.get("resid_pdrop", float, 0.0),
        attention_dropout=stack.get("attn_pdrop", float, 0.0),
        content_loss_weight=model.get("content_loss_weight", float, 1.0),
        position_loss_weight=model.get("position_loss_weight", float, 1.0),
    )
    stack.require("segment_size", 2, "the number of granularities")
    stack.require("activate_pad_ignore", True, "padding never counts in the loss", default=True)
    model.require("activate_sos_for_fine_sequence", True, "a start token opens every granularity", default=True)
    require_tokens(transformer, stack, permuter, start, by_class)
    for section in (stack, permuter, start):
        section.finish()
    model.finish("first_stage_key", "cond_stage_key", *SCHEDULE)
    return DQConfig(vae_config=vae, transformer_config=transformer)


def require_tokens(transformer, stack, permuter, start, by_class):
    """Check sizes and special tokens of a `DQTransformerConfig`: behind the codes, or cells, come pad, end, start or classes."""
    pad = transformer.codebook_size
    stack.require("vocab_size", transformer.content_vocab_size, "the codes and their special tokens")
    stack.require("content_pad_code", pad, "the number of codes")
    permuter.require("content_pad_code", pad, "the number of codes")
    permuter.require("content_eos_code", pad + 1, "the number of codes + 1")
    if by_class:
        start.require("threshold_content", pad + 2, "the number of codes + 2")
    for granularity, (grain, (rows, columns)) in enumerate(zip(GRAINS["Dual"], transformer.grid_sizes)):
        cells, why = rows * columns, f"the number of {grain} cells"
        size = transformer.position_vocab_sizes[granularity]
        stack.require(f"{grain}_position_size", size, f"{why} and their special tokens")
        stack.require(f"{grain}_position_pad_code", cells, why)
        permuter.require(f"{grain}_hw", rows, f"the side of the {grain} grid")
        permuter.require(f"{grain}_position_pad_code", cells, why)
        permuter.require(f"{grain}_position_eos_code", cells + 1, f"{why} + 1")
        start.require(f"{grain}_seg_sos", granularity, "the granularity's index")
        if by_class:
            start.require(f"threshold_{grain}_position", cells + 2, f"{why} + 2")
        else:
            start.require(f"{grain}_sos", pad + 2, "the number of codes + 2")
            start.require(f"{grain}_pos_sos", cells + 2, f"{why} + 2")
