import math

import pytest

from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration


def test_vocabularies_are_those_of_the_paper():
    config = DQTransformerConfig(grid_sizes=[[16, 16], [32, 32]], codebook_size=1024)
    assert (config.content_vocab_size, config.position_vocab_sizes) == (1027, [259, 1027])
    config = DQTransformerConfig(grid_sizes=[[16, 16], [32, 32]], codebook_size=1024, num_classes=1000)
    assert (config.content_vocab_size, config.position_vocab_sizes) == (2026, [1258, 2026])
    config = DQTransformerConfig(grid_sizes=[[2, 2], [4, 4]], codebook_size=8, num_classes=3, class_dropout=0.1)
    assert (config.content_vocab_size, config.position_vocab_sizes) == (8 + 2 + 4, [4 + 2 + 4, 16 + 2 + 4])
    assert DQTransformerConfig(grid_sizes=[[2, 3], [4, 6], [8, 12]]).max_stream_length == 96 + 6


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
        sampling_defaults={"top_p": 0.9},
    )
    config.save_pretrained(tmp_path)
    loaded = DQTransformerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_sizes == [[2, 3], [4, 6]] and loaded.sampling_defaults == {"top_p": 0.9}


BAD_GRIDS = [
    *([], [[16]], [[4, 4, 4]], [[0, 0], [0, 0]], [[32, 32], [16, 16]], [[16, 16], [16, 16]], [[16, 16], [32, 48]]),
    [[8, 8], [16, 16], [48, 48]],
]
BAD_NAMES = [dict(id2label=names) for names in ({0: "sun"}, {0: "sun", 1: "sun"}, {1: "sun", 2: "moon"})]
NAMED_TWICE = dict(id2label={0: "sun", 1: "moon"}, label2id={"sun": 1, "moon": 0})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(hidden_sizes=8), ValueError, "no field 'hidden_sizes'; did you mean 'hidden_size'"),
        (dict(hidden_size=30, num_attention_heads=4), ValueError, "hidden_size 30 must be a multiple of .* 4"),
        (dict(hidden_size=0), ValueError, "hidden_size must be positive"),
        (dict(num_attention_heads=0), ValueError, "num_attention_heads must be positive"),
        (dict(num_position_layers=0), ValueError, "num_position_layers must be positive"),
        (dict(num_content_layers=-1), ValueError, "num_content_layers must be positive"),
        (dict(codebook_size=0), ValueError, "codebook_size must be positive"),
        (dict(codebook_size=8.0), TypeError, "codebook_size"),
        (dict(num_classes=True), TypeError, "num_classes"),
        (dict(num_classes=-1), ValueError, "num_classes must be 0 .* or positive"),
        (dict(class_dropout=0.1), ValueError, "num_classes .* positive where class_dropout is"),
        (dict(num_classes=3, class_dropout=1.0), ValueError, r"class_dropout must lie in \[0, 1\)"),
        (dict(embedding_dropout=-0.1), ValueError, r"embedding_dropout must lie in \[0, 1\)"),
        (dict(residual_dropout=math.nan), ValueError, "residual_dropout must lie in"),
        (dict(attention_dropout="0.1"), TypeError, "attention_dropout"),
        (dict(content_loss_weight=-1), ValueError, "content_loss_weight must be 0 or more"),
        (dict(position_loss_weight=math.inf), ValueError, "position_loss_weight must be 0 or more and finite"),
        (dict(fine_order="column-first"), ValueError, '"row-first", "region-first"; got \'column-first\''),
        (dict(max_stream_length=1027), ValueError, "max_stream_length must be at least 1028"),
        (dict(sampling_defaults={"temprature": 1}), ValueError, "may hold temperature.*got temprature"),
        *((dict(grid_sizes=grids), ValueError, "coarsest first, each twice the one before") for grids in BAD_GRIDS),
        *((dict(grid_sizes=grids), TypeError, "grid_sizes") for grids in ([16, 32], [[16.0, 16.0]], 16, None)),
        *((dict(num_classes=2, **names), ValueError, "id2label must name the classes 0 ... 1") for names in BAD_NAMES),
        (dict(num_classes=2, label2id={"sun": 0, "moon": 0}), ValueError, "id2label must name the classes"),
        (dict(num_classes=2, **NAMED_TWICE), ValueError, "label2id must be the inverse of id2label"),
        (dict(id2label={0: "sun"}), ValueError, "id2label must be empty for an unconditional model"),
        # Exception: some releases of transformers check this field themselves, with an error class of their own
        (dict(num_classes=2, id2label=["sun", "moon"]), Exception, "id2label"),
    ],
)
def test_refused(fields, error, message):
    with pytest.raises(error, match=message):
        DQTransformerConfig(**fields)


def test_fields_changed_later_or_while_loading_are_checked(tmp_path):
    config = DQTransformerConfig(grid_sizes=[[2, 2]], codebook_size=4, hidden_size=8, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="multiple of num_attention_heads 3"):
        DQTransformerForImageGeneration(config)
    assert DQTransformerConfig.from_pretrained(tmp_path, codebook_size=5).codebook_size == 5
    with pytest.raises(ValueError, match="did you mean 'codebook_size'"):
        DQTransformerConfig.from_pretrained(tmp_path, codebook_sizes=5)
    with pytest.raises(ValueError, match="max_stream_length must be at least 18"):
        DQTransformerConfig.from_pretrained(tmp_path, grid_sizes=[[4, 4]])
