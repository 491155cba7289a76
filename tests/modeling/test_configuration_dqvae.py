"""The tokenizer's configuration: round trip, defaults, and a clear error for every impossible combination."""

import json
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


def test_defaults_follow_from_three_granularities():
    config = DQVAEConfig(granularities=[32, 16, 8], block_out_channels=[128, 128, 256, 256, 512, 512])
    assert config.grid_sizes == [[8, 8], [16, 16], [32, 32]]
    assert config.decoder_block_out_channels == [128, 128, 256, 256]
    assert config.initial_thresholds == pytest.approx([math.log(32) / 3, 2 * math.log(32) / 3])
    assert config.budget_targets == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize("changes", [{}, OTHERS, {"granularities": [4], "block_out_channels": [8, 8, 8]}])
def test_round_trip_through_json_changes_nothing(changes, tmp_path):
    config = DQVAEConfig(**(SMALL | changes))
    config.save_pretrained(tmp_path)
    for loaded in (DQVAEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, DQVAEConfig)
        for name in config.own_field_names():
            assert getattr(loaded, name) == getattr(config, name), name
    assert DQVAEConfig(**config.to_dict()).to_dict() == config.to_dict()
    first = (tmp_path / "config.json").read_text()
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(first)


def test_tuples_become_lists_as_in_json():
    config = DQVAEConfig(**SMALL, entropy_thresholds=(1.0,), decoder_attention_factors=(2,))
    assert config.granularities == [4, 2] and config.block_out_channels == [8, 8, 16]
    assert config.entropy_thresholds == [1.0] and config.decoder_attention_factors == [2]


IMPOSSIBLE = [
    (dict(granularities=[]), "granularities must be successive powers of two"),
    (dict(granularities=[2, 4]), "granularities must be successive powers of two"),
    (dict(granularities=[4, 1]), "granularities must be successive powers of two"),
    (dict(granularities=[4, 4]), "granularities must be successive powers of two"),
    (dict(granularities=[6, 3]), "granularities must be successive powers of two"),
    (dict(granularities=[2, 1, 0]), "granularities must be successive powers of two"),
    (dict(granularities=[-4]), "granularities must be successive powers of two"),
    (dict(image_size=18), "image_size must be one or two multiples of the coarsest granularity 4, got 18"),
    (dict(image_size=0), "image_size must be one or two multiples"),
    (dict(image_size=[16]), "image_size must be one or two multiples"),
    (dict(image_size=[16, 16, 16]), "image_size must be one or two multiples"),
    (dict(image_size=[16, 18]), "image_size must be one or two multiples"),
    (dict(block_out_channels=[8, 8]), "block_out_channels must have 3 widths"),
    (dict(block_out_channels=[]), "block_out_channels must have 3 widths"),
    (
        dict(block_out_channels=[8, 6, 16]),
        "block_out_channels: each width must be a multiple of norm_num_groups 4, got 6",
    ),
    (dict(block_out_channels=[8, 0, 16]), "block_out_channels: each width must be a multiple"),
    (dict(decoder_block_out_channels=[8, 8, 8]), "decoder_block_out_channels must have 2 widths"),
    (dict(decoder_block_out_channels=[8, 9]), "decoder_block_out_channels: each width must be a multiple"),
    (dict(encoder_attention_factors=[8]), r"encoder_attention_factors must be among \[1, 2, 4\], got \[8\]"),
    (dict(decoder_attention_factors=[4]), r"decoder_attention_factors must be among \[1, 2\], got \[4\]"),
    (dict(layers_per_block=0), "layers_per_block must be positive"),
    (dict(decoder_layers_per_block=0), "decoder_layers_per_block must be positive"),
    (dict(norm_num_groups=0), "norm_num_groups must be positive"),
    (dict(z_channels=0), "z_channels must be positive"),
    (dict(codebook_size=0), "codebook_size must be positive"),
    (dict(codebook_dim=-1), "codebook_dim must be positive"),
    (dict(codebook_eps=0), "codebook_eps must be positive"),
    (dict(codebook_eps=math.nan), "codebook_eps must be positive"),
    (dict(codebook_decay=1), r"codebook_decay must lie in \[0, 1\)"),
    (dict(dropout=1.5), r"dropout must lie in \[0, 1\)"),
    (dict(dropout=math.nan), r"dropout must lie in \[0, 1\)"),
    (dict(commitment_beta=-1), "commitment_beta must be a finite number"),
    (dict(codebook_weight=math.inf), "codebook_weight must be a finite number"),
    (dict(budget_gamma=math.nan), "budget_gamma must be a finite number"),
    (dict(router="both"), 'router must be one of "entropy", "feature", "random", got \'both\''),
    (dict(router_gradient="all"), 'router_gradient must be one of "compared", "selected", got \'all\''),
    (dict(router_activation="gelu"), 'router_activation must be one of "silu", "relu", None'),
    (dict(router="feature", router_norm_num_groups=3), "z_channels 8 must be a multiple of router_norm_num_groups 3"),
    (dict(router="feature", router_norm_num_groups=0), "z_channels 8 must be a multiple of router_norm_num_groups 0"),
    (dict(entropy_thresholds=[]), r"entropy_thresholds must be 1 finite ascending"),
    (dict(entropy_thresholds=[1.0, 2.0]), r"entropy_thresholds must be 1 finite ascending"),
    (dict(entropy_thresholds=[math.nan]), r"entropy_thresholds must be 1 finite ascending"),
    (dict(granularities=[4, 2, 1], entropy_thresholds=[2.0, 1.0]), r"entropy_thresholds must be 2 finite ascending"),
    (dict(budget_targets=[]), r"budget_targets needs 1 share\(s\)"),
    (dict(budget_targets=[1.5]), r"budget_targets must lie in \[0, 1\]"),
    (dict(granularities=[4, 2, 1], budget_targets=[0.6, 0.6]), "budget_targets .* a sum of at most 1"),
    (dict(position_type="sine"), 'position_type must be "learned", "fourier" or "fourier'),
]
WRONG_TYPES = [
    dict(granularities=4),
    dict(granularities="16"),
    dict(granularities=[4.0, 2.0]),
    dict(granularities=None),
    dict(block_out_channels=8),
    dict(block_out_channels=[8, "8", 16]),
    dict(image_size="16"),
    dict(image_size=16.0),
    dict(image_size=True),
    dict(codebook_size="16"),
    dict(codebook_size=16.5),
    dict(codebook_size=True),
    dict(dropout="0"),
    dict(codebook_decay=True),
    dict(restart_dead_codes=1),
    dict(router=1),
    dict(entropy_thresholds=1.0),
    dict(entropy_thresholds=["1"]),
    dict(decoder_attention_factors=2),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DQVAEConfig(**(SMALL | changes))


@pytest.mark.parametrize("changes", WRONG_TYPES)
def test_wrong_types_are_refused(changes):
    (name,) = changes
    with pytest.raises(TypeError, match=f"DQVAEConfig: .*{name}"):
        DQVAEConfig(**(SMALL | changes))


def test_typos_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="DQVAEConfig has no field 'codebook_sise'; did you mean 'codebook_size'?"):
        DQVAEConfig(**SMALL, codebook_sise=16)
    with pytest.raises(ValueError, match="DQVAEConfig has no field 'xyz'; it has .*budget_gamma"):
        DQVAEConfig(**SMALL, xyz=1)


def test_a_configuration_of_another_model_is_refused():
    with pytest.raises(ValueError, match="DQVAEConfig has model_type 'dqvae', got 'vit'"):
        DQVAEConfig(**SMALL, model_type="vit")


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE[7:40:4])
def test_a_model_refuses_fields_set_after_construction(changes, message):
    config = DQVAEConfig(**SMALL)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        DQVAEModel(config)


def test_defaults_are_filled_in_again_where_a_field_is_set_to_none():
    config = DQVAEConfig(**SMALL)
    config.granularities, config.block_out_channels = (8, 4), (8, 8, 8, 16)
    config.decoder_block_out_channels = config.encoder_attention_factors = config.decoder_attention_factors = None
    model = DQVAEModel(config)
    assert config.decoder_block_out_channels == [8, 8, 8] and config.encoder_attention_factors == [8, 4]
    assert len(model.encoder.levels) == 4 and len(model.decoder.levels) == 3


def test_fields_given_at_loading_are_checked(tmp_path):
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


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(OSError, match="config.json"):
        DQVAEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("position_type", ["learned", "fourier", "fourier+learned"])
@pytest.mark.parametrize("changes", [{}, {"router": "feature"}, {"decoder_layers_per_block": 2}])
def test_every_possible_choice_builds_a_model(position_type, changes):
    names = {
        name.split(".")[2]
        for name, _ in make_vae(position_type=position_type, **changes).named_parameters()
        if "position" in name
    }
    assert names == {"learned": {"rows", "columns"}, "fourier": {"fourier"}}.get(
        position_type, {"rows", "columns", "fourier"}
    )
