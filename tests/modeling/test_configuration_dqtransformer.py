import math

import pytest

from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration


def test_vocabularies_are_those_of_the_paper():
    config = DQTransformerConfig(grid_sizes=[[16, 16], [32, 32]], codebook_size=1024)
    assert (config.content_vocab_size, config.position_vocab_sizes) == (1027, [259, 1027])
    config = DQTransformerConfig(grid_sizes=[[16, 16], [32, 32]], codebook_size=1024, num_classes=1000)
    assert (config.content_vocab_size, config.position_vocab_sizes) == (2026, [1258, 2026])


def test_class_dropout_adds_one_start_token():
    config = DQTransformerConfig(grid_sizes=[[2, 2], [4, 4]], codebook_size=8, num_classes=3, class_dropout=0.1)
    assert (config.content_vocab_size, config.position_vocab_sizes) == (8 + 2 + 4, [4 + 2 + 4, 16 + 2 + 4])


def test_the_table_of_positions_fits_the_longest_stream():
    assert DQTransformerConfig(grid_sizes=[[2, 3], [4, 6], [8, 12]]).max_stream_length == 96 + 6
    assert DQTransformerConfig(grid_sizes=[[2, 3]]).max_stream_length == 6 + 2


def test_class_names_may_be_given_either_way():
    by_id = DQTransformerConfig(num_classes=2, id2label={0: "sun", 1: "moon"})
    by_name = DQTransformerConfig(num_classes=2, label2id={"sun": 0, "moon": 1})
    assert by_id.label2id == by_name.label2id == {"sun": 0, "moon": 1}
    assert by_id.id2label == by_name.id2label == {0: "sun", 1: "moon"}
    assert DQTransformerConfig().id2label == {}
    assert DQTransformerConfig(num_classes=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_saved_and_loaded_again_it_is_the_same(tmp_path):
    config = DQTransformerConfig(
        grid_sizes=((2, 3), (4, 6)),
        codebook_size=8,
        num_classes=2,
        id2label={0: "sun", 1: "moon"},
        class_dropout=0.1,
        fine_order="region-first",
        max_stream_length=40,
    )
    config.save_pretrained(tmp_path)
    loaded = DQTransformerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_sizes == [[2, 3], [4, 6]]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(hidden_sizes=8), ValueError, "no field 'hidden_sizes'; did you mean 'hidden_size'"),
        (dict(codebok_size=8), ValueError, "did you mean 'codebook_size'"),
        (dict(class_droput=0.1), ValueError, "did you mean 'class_dropout'"),
        (dict(hidden_size=30, num_attention_heads=4), ValueError, "hidden_size 30 must be a multiple of .* 4"),
        (dict(hidden_size=0), ValueError, "hidden_size must be positive"),
        (dict(num_attention_heads=0), ValueError, "num_attention_heads must be positive"),
        (dict(num_position_layers=0), ValueError, "num_position_layers must be positive"),
        (dict(num_content_layers=-1), ValueError, "num_content_layers must be positive"),
        (dict(codebook_size=0), ValueError, "codebook_size must be positive"),
        (dict(codebook_size=8.0), TypeError, "codebook_size"),
        (dict(codebook_size="8"), TypeError, "codebook_size"),
        (dict(num_classes=True), TypeError, "num_classes"),
        (dict(num_classes=-1), ValueError, "num_classes must be 0 .* or positive"),
        (dict(class_dropout=0.1), ValueError, "num_classes .* positive where class_dropout is"),
        (dict(num_classes=3, class_dropout=1.0), ValueError, r"class_dropout must lie in \[0, 1\)"),
        (dict(embedding_dropout=-0.1), ValueError, r"embedding_dropout must lie in \[0, 1\)"),
        (dict(residual_dropout=math.nan), ValueError, "residual_dropout must lie in"),
        (dict(attention_dropout="0.1"), TypeError, "attention_dropout"),
        (dict(content_loss_weight=-1), ValueError, "content_loss_weight must be 0 or more"),
        (dict(position_loss_weight=math.inf), ValueError, "position_loss_weight must be 0 or more and finite"),
        (dict(fine_order="column-first"), ValueError, '"row-first" or "region-first", got \'column-first\''),
        (dict(max_stream_length=1027), ValueError, "max_stream_length must be at least 1028"),
        (dict(grid_sizes=[]), ValueError, "coarsest first"),
        (dict(grid_sizes=[[16]]), ValueError, "coarsest first"),
        (dict(grid_sizes=[[4, 4, 4]]), ValueError, "coarsest first"),
        (dict(grid_sizes=[[0, 0], [0, 0]]), ValueError, "coarsest first"),
        (dict(grid_sizes=[[32, 32], [16, 16]]), ValueError, "coarsest first"),
        (dict(grid_sizes=[[16, 16], [16, 16]]), ValueError, "each twice the one before"),
        (dict(grid_sizes=[[16, 16], [32, 48]]), ValueError, "each twice the one before"),
        (dict(grid_sizes=[[8, 8], [16, 16], [48, 48]]), ValueError, "each twice the one before"),
        (dict(grid_sizes=[16, 32]), TypeError, "grid_sizes"),
        (dict(grid_sizes=[[16.0, 16.0]]), TypeError, "grid_sizes"),
        (dict(grid_sizes=16), TypeError, "grid_sizes"),
        (dict(grid_sizes=None), TypeError, "grid_sizes"),
        (dict(num_classes=2, id2label={0: "sun"}), ValueError, "id2label must name the classes 0 ... 1"),
        (dict(num_classes=2, id2label={0: "sun", 1: "sun"}), ValueError, "each differently"),
        (dict(num_classes=2, id2label={1: "sun", 2: "moon"}), ValueError, "id2label must name the classes 0 ... 1"),
        # Exception: some releases of transformers check this field themselves, with an error class of their own
        (dict(num_classes=2, id2label=["sun", "moon"]), Exception, "id2label"),
        (dict(num_classes=2, label2id={"sun": 0, "moon": 0}), ValueError, "id2label must name the classes"),
        (
            dict(num_classes=2, id2label={0: "sun", 1: "moon"}, label2id={"sun": 1, "moon": 0}),
            ValueError,
            "label2id must be the inverse of id2label",
        ),
        (dict(id2label={0: "sun"}), ValueError, "id2label must be empty for an unconditional model"),
    ],
)
def test_refused(fields, error, message):
    with pytest.raises(error, match=message):
        DQTransformerConfig(**fields)


def test_fields_set_later_are_checked_by_the_model():
    config = DQTransformerConfig(grid_sizes=[[2, 2]], codebook_size=4, hidden_size=8, num_attention_heads=2)
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="multiple of num_attention_heads 3"):
        DQTransformerForImageGeneration(config)


def test_fields_changed_while_loading_are_checked(tmp_path):
    DQTransformerConfig(grid_sizes=[[2, 2]], codebook_size=4).save_pretrained(tmp_path)
    assert DQTransformerConfig.from_pretrained(tmp_path, codebook_size=5).codebook_size == 5
    with pytest.raises(ValueError, match="did you mean 'codebook_size'"):
        DQTransformerConfig.from_pretrained(tmp_path, codebook_sizes=5)
    with pytest.raises(ValueError, match="max_stream_length must be at least 18"):
        DQTransformerConfig.from_pretrained(tmp_path, grid_sizes=[[4, 4]])


def test_sampling_defaults_are_checked_and_saved(tmp_path):
    with pytest.raises(ValueError, match="sampling_defaults may hold temperature.*got temprature"):
        DQTransformerConfig(sampling_defaults={"temprature": 0.9})
    DQTransformerConfig(sampling_defaults={"top_p": 0.9}).save_pretrained(tmp_path)
    assert DQTransformerConfig.from_pretrained(tmp_path).sampling_defaults == {"top_p": 0.9}
