"""The tokenizer's configuration: round trip, defaults, and a clear error for every impossible combination."""

import math

import pytest
from conftest import make_vae
from transformers import AutoConfig

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.modeling_dqvae import DQVAEModel

SMALL = dict(
    image_size=[16, 24],
    granularities=(4, 2),
    block_out_channels=(8, 8, 16),
    norm_num_groups=4,
    z_channels=8,
    router_norm_num_groups=4,
    codebook_size=16,
    codebook_dim=4,
)
OTHERS = dict(
    router="feature",
    router_activation=None,
    router_norm_num_groups=None,
    position_type="learned",
    budget_targets=[0.25],
    dropout=0.1,
    decoder_layers_per_block=3,
    restart_dead_codes=False,
)


def test_paper_sizes_are_the_default():
    config = DQVAEConfig()
    assert config.granularities == [16, 8] and config.grid_sizes == [[16, 16], [32, 32]]
    assert config.codebook_size == 1024 and config.codebook_dim == 256
    assert config.decoder_block_out_channels == [128, 128, 256, 256]
    assert config.encoder_attention_factors == [16, 8] and config.decoder_attention_factors == [8]
    assert config.initial_thresholds == [math.log(32) / 2] and config.budget_targets == [0.5]
    config = DQVAEConfig(granularities=[32, 16, 8], block_out_channels=[128, 128, 256, 256, 512, 512])
    assert config.grid_sizes == [[8, 8], [16, 16], [32, 32]]
    assert config.decoder_block_out_channels == [128, 128, 256, 256]
    assert config.initial_thresholds == pytest.approx([math.log(32) / 3, 2 * math.log(32) / 3])
    assert config.budget_targets == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize("changes", [{}, OTHERS, {"granularities": [4], "block_out_channels": [8, 8, 8]}])
def test_round_trip_through_json_changes_nothing(changes, tmp_path):
    config = DQVAEConfig(**(SMALL | changes))
    assert type(config.granularities) is type(config.block_out_channels) is list  # as in JSON
    config.save_pretrained(tmp_path)
    for loaded in (DQVAEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, DQVAEConfig)
        for name in config.own_field_names():
            assert getattr(loaded, name) == getattr(config, name), name
    assert DQVAEConfig(**config.to_dict()).to_dict() == config.to_dict()
    first = (tmp_path / "config.json").read_text()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == first


POSITIVE = (
    "layers_per_block",
    "decoder_layers_per_block",
    "norm_num_groups",
    "z_channels",
    "codebook_size",
    "codebook_eps",
)
TWO_POWERS = "granularities must be successive powers of two"
BAD_GRANULARITIES = ([], [2, 4], [4, 1], [4, 4], [6, 3], [2, 1, 0], [-4])
MULTIPLES = "image_size must be one or two multiples of the coarsest granularity 4, got "
DIVISIBLE = "each width must be a multiple of norm_num_groups 4, got"
ASCENDING = "entropy_thresholds must be {} finite ascending"
IMPOSSIBLE = [
    *((dict(granularities=values), TWO_POWERS) for values in BAD_GRANULARITIES),
    *((dict(image_size=size), MULTIPLES) for size in (18, 0, [16], [16, 16, 16], [16, 18])),
    (dict(block_out_channels=[8, 8]), "block_out_channels must have 3 widths"),
    (dict(block_out_channels=[8, 6, 16]), f"block_out_channels: {DIVISIBLE} 6"),
    (dict(block_out_channels=[8, 0, 16]), f"block_out_channels: {DIVISIBLE} 0"),
    (dict(decoder_block_out_channels=[8, 8, 8]), "decoder_block_out_channels must have 2 widths"),
    (dict(decoder_block_out_channels=[8, 9]), f"decoder_block_out_channels: {DIVISIBLE} 9"),
    (dict(encoder_attention_factors=[8]), r"encoder_attention_factors must be among \[1, 2, 4\], got \[8\]"),
    (dict(decoder_attention_factors=[4]), r"decoder_attention_factors must be among \[1, 2\], got \[4\]"),
    *((dict.fromkeys([name], 0), f"{name} must be positive") for name in POSITIVE),
    (dict(codebook_dim=-1), "codebook_dim must be positive"),
    (dict(codebook_eps=math.nan), "codebook_eps must be positive"),
    (dict(codebook_decay=1), r"codebook_decay must lie in \[0, 1\)"),
    (dict(dropout=math.nan), r"dropout must lie in \[0, 1\)"),
    (dict(commitment_beta=-1), "commitment_beta must be 0 or more and finite"),
    (dict(codebook_weight=math.inf), "codebook_weight must be 0 or more and finite"),
    (dict(budget_gamma=math.nan), "budget_gamma must be 0 or more and finite"),
    (dict(router="both"), 'router must be one of "entropy", "feature", "gain", "random"; got \'both\''),
    (dict(router_gradient="all"), 'router_gradient must be one of "compared", "selected"; got \'all\''),
    (dict(router_activation="gelu"), 'router_activation must be one of "silu", "relu", None'),
    *((dict(router="feature", router_norm_num_groups=n), f"router_norm_num_groups {n}") for n in (0, 3)),
    *((dict(entropy_thresholds=values), ASCENDING.format(1)) for values in ([], [1.0, 2.0], [math.nan])),
    (dict(granularities=[4, 2, 1], entropy_thresholds=[2.0, 1.0]), ASCENDING.format(2)),
    (dict(budget_targets=[]), r"budget_targets needs 1 share\(s\)"),
    (dict(budget_targets=[1.5]), r"budget_targets must lie in \[0, 1\]"),
    (dict(granularities=[4, 2, 1], budget_targets=[0.6, 0.6]), "budget_targets .* a sum of at most 1"),
    (dict(position_type="sine"), 'position_type must be one of "learned", "fourier", "fourier'),
    (dict(model_type="vit"), "DQVAEConfig has model_type 'dqvae', got 'vit'"),
    (dict(codebook_sise=16), "DQVAEConfig has no field 'codebook_sise'; did you mean 'codebook_size'?"),
    (dict(xyz=1), "DQVAEConfig has no field 'xyz'; it has .*budget_gamma"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DQVAEConfig(**(SMALL | changes))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("granularities", [4, "16", [4.0, 2.0], None]),
        ("block_out_channels", [8, [8, "8", 16]]),
        ("image_size", ["16", 16.0, True]),
        ("codebook_size", ["16", 16.5, True]),
        ("dropout", ["0"]),
        ("codebook_decay", [True]),
        ("restart_dead_codes", [1]),
        ("router", [1]),
        ("entropy_thresholds", [1.0, ["1"]]),
        ("decoder_attention_factors", [2]),
    ],
)
def test_wrong_types_are_refused(name, values):
    for value in values:
        with pytest.raises(TypeError, match=f"DQVAEConfig: .*{name}"):
            DQVAEConfig(**(SMALL | {name: value}))


def test_a_model_refuses_fields_set_after_construction():
    config = DQVAEConfig(**SMALL)
    config.codebook_decay = 1
    with pytest.raises(ValueError, match="codebook_decay must lie in"):
        DQVAEModel(config)


def test_defaults_are_filled_in_again_where_a_field_is_set_to_none():
    config = DQVAEConfig(**SMALL)
    config.granularities, config.block_out_channels = (8, 4), (8, 8, 8, 16)
    config.decoder_block_out_channels = config.encoder_attention_factors = config.decoder_attention_factors = None
    model = DQVAEModel(config)
    assert config.decoder_block_out_channels == [8, 8, 8] and config.encoder_attention_factors == [8, 4]
    assert len(model.encoder.levels) == 4 and len(model.decoder.levels) == 3


def test_fields_given_at_loading_are_checked(tmp_path):
    with pytest.raises(OSError, match="config.json"):
        DQVAEConfig.from_pretrained(tmp_path)
    DQVAEConfig(**SMALL).save_pretrained(tmp_path)
    assert DQVAEConfig.from_pretrained(tmp_path, codebook_size=20).codebook_size == 20
    with pytest.raises(ValueError, match="codebook_size must be positive"):
        DQVAEConfig.from_pretrained(tmp_path, codebook_size=0)
    with pytest.raises(TypeError, match="codebook_size"):
        DQVAEConfig.from_pretrained(tmp_path, codebook_size="20")
    with pytest.raises(ValueError, match="no field 'codebook_sise'; did you mean 'codebook_size'?"):
        DQVAEConfig.from_pretrained(tmp_path, codebook_sise=20)
    _, unused = DQVAEConfig.from_pretrained(tmp_path, codebook_sise=20, return_unused_kwargs=True)
    assert unused == {"codebook_sise": 20}


@pytest.mark.parametrize(
    ("position_type", "expected"),
    [("learned", {"rows", "columns"}), ("fourier", {"fourier"}), ("fourier+learned", {"rows", "columns", "fourier"})],
)
def test_a_model_has_the_positions_of_its_configuration(position_type, expected):
    parameters = dict(make_vae(position_type=position_type).named_parameters())
    assert {name.split(".")[2] for name in parameters if "position" in name} == expected
