"""Configurations of the release that are refused: contradictions, gaps, unknown parts, and files that cost too much."""

import copy
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slow_release import (
    REFERENCE,
    changed,
    load_config,
    params,
    transformer_size,
    write,
)

from dq_hf.release import convert_checkpoint
from dq_hf.release.config import read_config

ROUTER = "encoderconfig.router_config"
BUDGET = "lossconfig.budget_loss_config"
GATE, NORMALIZATION, RATIO = (f"{ROUTER}.{key}" for key in ("gate_type", "normalization_type", "fine_grain_ratito"))


def refuse(tmp_path, config, message, error=ValueError):
    path, _ = write(tmp_path / "release", config)
    with pytest.raises(error, match=rf"(?s)config\.yml: .*{message}"):
        read_config(path)


@pytest.mark.parametrize(
    ("name", "path", "target"),  # reference configuration, section, its new target
    [
        ("dual_entropy", "", "models.other.QuadGrainVQModel"),
        ("dual_entropy", "encoderconfig", "modules.EncoderTriple.TripleGrainEncoder"),
        ("dual_entropy", "decoderconfig", "modules.Decoder2"),
        ("dual_entropy", "vqconfig", "modules.VectorQuantize3"),
        ("dual_entropy", "lossconfig", "modules.OtherLoss"),
        ("dual_feature", ROUTER, "modules.RouterTriple.TripleGrainFeatureRouter"),
        ("triple_feature", ROUTER, "modules.RouterTriple.TripleGrainFixedEntropyRouter"),
        ("dual_feature", BUDGET, "modules.BudgetConstraint_NormedSeperateRatioMSE_TripleGrain"),
        ("transformer_class", "transformer_config", "modules.GPT"),
        ("transformer_class", "permuter_config", "modules.TripleGrainPermuter"),
        ("transformer_class", "class_cond_stage_config", "modules.PositionAwareSOSProvider"),
        ("transformer_uncond", "uncond_stage_config", "modules.ClassAwareSOSProvider"),
        ("transformer_uncond", "first_stage_config", "models.VQModel"),
    ],
)
def test_unknown_targets_are_refused(name, path, target, tmp_path):
    config = load_config(name)
    section = config["model"]
    for key in path.split(".") if path else []:
        section = section["params"][key]
    section["target"] = target
    refuse(tmp_path, config, f"target must be one of .*{re.escape(target)}")


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("dual_feature", GATE, "3layer-fc", "gate_type must be one of 1layer-fc, 2layer-fc-SiLu"),
        ("dual_feature", NORMALIZATION, "batch", "normalization_type must be"),
        ("dual_feature", NORMALIZATION, "group-7", "router_norm_num_groups"),
        ("dual_feature", f"{ROUTER}.num_channels", 64, "num_channels must be 32"),
        ("dual_feature", f"{BUDGET}.min_grain_size", 8, "min_grain_size must be 4"),
        ("triple_feature", f"{BUDGET}.median_grain_size", 4, "median_grain_size must be 8"),
        ("dual_feature", f"{BUDGET}.target_ratio", 1.5, "budget_targets"),
        ("dual_feature", f"{BUDGET}.gamma", "much", "gamma must be a finite number; got 'much'"),
        ("dual_feature", f"{BUDGET}.gamma", float("nan"), "gamma must be a finite number"),
        ("dual_feature", f"{BUDGET}.calculate_all", 1, "calculate_all must be true or false"),
        ("dual_entropy", "decoderconfig.position_type", "rope", "position_type must be"),
        ("dual_entropy", "decoderconfig.latent_size", 4, "latent_size must be 8"),
        ("dual_entropy", "decoderconfig.in_ch", 64, "in_ch must be 32"),
        ("dual_entropy", "decoderconfig.resolution", 32, "resolution must be 16"),
        ("dual_entropy", "decoderconfig.ch_mult", [1, 1, 1], "ch_mult must have 2 levels"),
        ("dual_entropy", "decoderconfig.dropout", 0.5, "dropout must be 0.0"),
        ("dual_entropy", "encoderconfig.ch_mult", [], "ch_mult must have a level for each of 2 granularities"),
        ("dual_entropy", "encoderconfig.ch_mult", [1] * 2000, "at most 20; got .1, 1,"),
        ("dual_entropy", "encoderconfig.ch_mult", 2, "ch_mult must be a list of integers"),
        ("dual_entropy", "encoderconfig.ch", 16, "multiple of norm_num_groups"),
        ("dual_entropy", "encoderconfig.ch", "32", "ch must be an integer; got '32'"),
        ("dual_entropy", "encoderconfig.num_res_blocks", True, "num_res_blocks must be an integer"),
        ("dual_entropy", "encoderconfig.num_res_blocks", 0, "layers_per_block must be positive"),
        ("dual_entropy", "encoderconfig.resamp_with_conv", False, "resamp_with_conv must be True"),
        ("dual_entropy", "encoderconfig.dropout", 1.0, "dropout must lie in"),
        ("dual_entropy", "vqconfig.channel_last", True, "channel_last must be False"),
        ("dual_entropy", "vqconfig.codebook_dim", 16, "quant_after_dim must be 16"),
        ("dual_entropy", "entropy_patch_size", 8, "entropy_patch_size must be 4"),
        ("dual_entropy", "image_size", 32, "image_size must be 16"),
        ("dual_entropy", "entropy_patch_size", ..., "must be 4, .*; got 16, the release's default; write it into"),
        ("dual_entropy", "image_size", ..., "must be 16, .*; got 256, the release's default; write it into"),
        ("dual_entropy", RATIO, 0.125, "fine_grain_ratito must be a whole percentage"),
        ("dual_entropy", RATIO, 10**400, "fine_grain_ratito must be"),
        ("dual_entropy", RATIO, 1.0, "a number for percentile 0, got None"),
        ("transformer_uncond", "permuter_config.fine_position_order", "random", "fine_position_order must be"),
        ("transformer_uncond", "transformer_config.block_size", 67, "max_stream_length must be at least 68"),
        ("transformer_uncond", "transformer_config.n_head", 5, "num_attention_heads"),
        ("transformer_uncond", "transformer_config.activate_pad_ignore", False, "activate_pad_ignore must be True"),
        ("transformer_uncond", "activate_sos_for_fine_sequence", False, "activate_sos_for_fine_sequence must be True"),
        ("transformer_uncond", "uncond_stage_config.fine_seg_sos", 0, "fine_seg_sos must be 1"),
        ("transformer_uncond", "first_stage_config.entropy_patch_size", 2, "entropy_patch_size must be 4"),
        *(
            (name, path, value + 1, rf"{path.rpartition('.')[2]} must be {value}|vocab_size must be 45")
            for name, classes in (("transformer_uncond", 0), ("transformer_class", 10))
            for path, value in transformer_size(32, 4, classes).items()
        ),
        *(
            (name, path, ..., f"{path.rpartition('.')[2]} is missing")
            for name, path in (
                ("dual_entropy", "encoderconfig"),
                ("dual_entropy", "encoderconfig.attn_resolutions"),
                ("dual_entropy", ROUTER),
                ("dual_entropy", f"{ROUTER}.json_path"),
                ("dual_entropy", RATIO),
                ("dual_entropy", "decoderconfig.latent_size"),
                ("dual_entropy", "vqconfig.codebook_size"),
                ("dual_feature", NORMALIZATION),
                ("dual_feature", f"{BUDGET}.calculate_all"),
                ("transformer_class", "first_stage_config"),
                ("transformer_class", "class_cond_stage_config.n_classes"),
                ("transformer_class", "transformer_config.vocab_size"),
            )
        ),
    ],
)
def test_values_that_are_wrong_missing_or_contradict_others_are_refused(name, path, value, message, tmp_path):
    refuse(tmp_path, changed(name, {path: value}), message)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        *(("dual_feature", path) for path in ("", "encoderconfig", ROUTER, "decoderconfig", "vqconfig", "lossconfig")),
        ("dual_feature", BUDGET),
        ("dual_entropy", ROUTER),
        *(("transformer_class", path) for path in ("", "transformer_config", "permuter_config", "first_stage_config")),
        ("transformer_class", "class_cond_stage_config"),
        ("transformer_uncond", "uncond_stage_config"),
    ],
)
def test_unknown_parameters_are_refused(name, section, tmp_path):
    config = changed(name, {f"{section}.no_such_parameter".lstrip("."): 1})
    refuse(tmp_path, config, rf"{section.rpartition('.')[2]}.*does not know: no_such_parameter")


def test_a_model_is_conditional_or_not(tmp_path):
    both = load_config("transformer_class")
    neither = copy.deepcopy(both)
    params(both)["uncond_stage_config"] = params(load_config("transformer_uncond"))["uncond_stage_config"]
    del params(neither)["class_cond_stage_config"]
    for config in (both, neither):
        refuse(tmp_path, config, "either class_cond_stage_config or uncond_stage_config")


def test_parameters_without_effect_may_be_there_or_not(tmp_path):
    changes = {"lossconfig": ..., "scheduler_type": ..., "encoderconfig.update_router": True, "ckpt_path": "last.ckpt"}
    config = changed("dual_feature", changes | {"ignore_keys": [], "monitor": "val/loss"})
    config["data"] = {"target": "main.DataModule"}
    ours, _ = read_config(write(tmp_path / "release", config)[0])
    assert (ours.budget_targets, ours.budget_gamma) == ([0.5], 10.0)


def test_every_default_is_told(tmp_path):
    """A parameter that is there is not named, one that is taken from the release's code is."""
    complete = {
        "decoderconfig.dropout": 0.0,
        "decoderconfig.resamp_with_conv": True,
        "decoderconfig.give_pre_end": False,
        "lossconfig.codebook_weight": 1.0,
    }
    path, _ = write(tmp_path / "release", changed("dual_entropy", complete))
    assert read_config(path)[1] == []
    without = dict.fromkeys(["encoderconfig.dropout", "vqconfig.decay", "vqconfig.channel_last"], ...)
    path, _ = write(tmp_path / "release", changed("dual_entropy", complete | without))
    assert [line.partition(" ")[0] for line in read_config(path)[1]] == [
        "model.params.encoderconfig.params.dropout",
        "model.params.vqconfig.params.decay",
        "model.params.vqconfig.params.channel_last",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "thresholds.json is damaged and no JSON file"),
        ("[" * 99_000, "thresholds.json is damaged and no JSON file"),
        ("[1, 2]", "thresholds.json must hold a JSON object, got list"),
        ('{"25": 1.0}', "must give a number for percentile 50"),
        ('{"50": "1.0"}', "must give a number for percentile 50"),
        ('{"50": NaN}', "must give a number for percentile 50"),
    ],
)
def test_a_damaged_entropy_table_is_refused(content, message, tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "thresholds.json").write_text(content)
    path, _ = write(tmp_path / "release", changed("dual_entropy", {f"{ROUTER}.json_path": "thresholds.json"}))
    with pytest.raises((OSError, ValueError), match=message):
        read_config(path)


ALIASES = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 9))
DUAL = "model: {target: a.DualGrainVQModel"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not a YAML file"),
        (b"\xff\xfe\x00", "is not a YAML file"),
        ("model: !!int ''", "is not a YAML file"),
        ("model: 2001-99-99", "is not a YAML file"),
        ("model: !!python/object/apply:os.system ['true']", "is not a YAML file"),
        ("", "section `model`"),
        ("- model", "section `model`"),
        ("model: 3", "model must have a target and params"),
        (DUAL + ", params: 3}", "params must be a mapping"),
        (DUAL + ", extra: 3}", "unknown entries: extra"),
        (DUAL + "}", "encoderconfig is missing"),
        (f"x0: &x0 [a, a]\n{ALIASES}\nmodel: *x8", "line 2 has an alias; write the values out"),
        (DUAL + ", params: &p {encoderconfig: *p}}", "line 1 has an alias"),
        ("model: " + "[" * 5000, "line 1 has more than 50 levels of nesting"),
        ("model: " + "{a: " * 5000, "line 1 has more than 50 levels of nesting"),
        ("\n".join(" " * n + "a:" for n in range(400)), "line 50 has more than 50 levels of nesting"),
        ("model: 1" + " " * 100_000, "more than 100,000 bytes"),
        (f"model: [{', '.join(['abc'] * 19_000)}]", "model must have a target and params"),
        (f"model: {{target: {'a' * 90_000}}}", "target must be one of"),
        (f"model: {{target: a, params: {{}}, ? {'b' * 90_000} : 1}}", "unknown entries"),
        (f"model: 0x{'f' * 90_000}", "model must have a target and params, got a long int"),
    ],
)
def test_a_damaged_or_costly_configuration_gets_a_short_message(content, message, tmp_path):
    path = tmp_path / "config.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"config\.yml.*{message}") as error:
        convert_checkpoint(path, REFERENCE / "dual_entropy" / "model.ckpt", tmp_path / "ours")
    assert len(str(error.value)) < 1000


def test_no_configuration_is_refused(tmp_path):
    for path in (tmp_path / "none.yml", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no configuration"):
            read_config(path)


def leaves(section, path=""):
    """The paths of all parameters of a section, in the form that `changed` takes."""
    for key, value in section.items():
        if isinstance(value, dict) and "params" in value:
            yield from leaves(value["params"], f"{path}{key}.")
        yield f"{path}{key}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("transformer_class", "x" * 5000), ("dual_feature", ["x" * 1000] * 5), ("dual_feature", 10**4000)],
    ids=["text", "list", "number"],
)
def test_long_values_are_cut_wherever_they_stand(name, value, tmp_path):
    refused = 0
    for place in leaves(params(load_config(name))):
        path, _ = write(tmp_path / "release", changed(name, {place: value}))
        try:
            read_config(path)
        except (OSError, ValueError) as error:
            refused += 1
            assert len(str(error)) < 1500, place
    assert refused > 20


PIECES = [
    "model: ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "\n",
    "  ",
    "- ",
    ": ",
    "? ",
    "| ",
    "> ",
    "&a ",
    "*a",
    "<<: *a",
    "!!int ",
    "!!map ",
    "''",
]
PIECES += [
    "target: a.DualGrainVQModel",
    "params: ",
    "embed_dim: ",
    "1e999",
    "-1",
    "0x",
    "~",
    "2001-99-99",
    "!!python/name:os.system ",
    "é",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join))
def test_any_text_is_refused_as_a_configuration_in_few_words(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yml")
        path.write_text(text, encoding="utf-8", errors="replace")
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            read_config(path)
        assert len(str(error.value)) < 1500
