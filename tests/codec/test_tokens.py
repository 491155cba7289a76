"""Images as flat sequences of integers for other models: exact, padded, of any size, and never anything but images."""

import pytest
import torch
from conftest import make_transformer, make_vae, seeded
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_hf import DQForImageGeneration
from dq_hf.codec import DQTokens
from dq_hf.modeling.grain_map_dq import expand_grain_map, top_left_cells
from dq_hf.modeling.modeling_dqvae import DQVAEEncoderOutput

CONFIGS = {
    1: make_vae(granularities=[4], block_out_channels=[8, 8, 16]).config,
    2: make_vae().config,
    3: make_vae(granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16]).config,
}


def random_image(num_granularities, rows, columns, seed):
    """Codes and grain map as a tokenizer gives them."""
    grain_map = torch.randint(num_granularities, (1, rows, columns), generator=seeded(seed))
    top_left = top_left_cells(expand_grain_map(grain_map, num_granularities), num_granularities)
    codes = torch.randint(16, (top_left.numel(),), generator=seeded(seed))
    return DQVAEEncoderOutput(codes=codes[top_left], grain_map=grain_map)


IMAGES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999)), min_size=1, max_size=3)


@pytest.mark.parametrize("folded", [True, False])
@settings(max_examples=15)
@given(st.integers(1, 3), IMAGES)
def test_images_of_any_sizes_come_back(folded, num_granularities, images):
    tokens = DQTokens(CONFIGS[num_granularities], folded)
    images = [random_image(num_granularities, *image) for image in images]
    batch = tokens.to_tokens(images)
    lengths = batch["attention_mask"].sum(1)
    for image, row, length in zip(images, batch["input_ids"], lengths.tolist()):
        num_codes = int((4**image.grain_map).sum())
        assert length == num_codes + image.grain_map.numel() + image.grain_map.shape[1] + 2
        assert row[0] == tokens.bos_token_id and row[length - 1] == tokens.eos_token_id
        assert (row[length:] == tokens.pad_token_id).all() and row.max() < tokens.vocab_size
    for image, back in zip(images, tokens.from_tokens(batch), strict=True):
        assert torch.equal(image.codes, back.codes) and torch.equal(image.grain_map, back.grain_map)


def test_a_sequence_is_the_map_then_the_codes_coarse_to_fine():
    codes = torch.tensor([[5, 5, 0, 1], [5, 5, 2, 3]])[None]
    encoded = DQVAEEncoderOutput(codes=codes, grain_map=torch.tensor([[[0, 1]]]))
    ids = DQTokens(CONFIGS[2]).to_tokens(encoded)["input_ids"]
    assert ids.tolist() == [[1, 4, 5, 2, 6 + 5, 22, 23, 24, 25, 3]]
    apart = DQTokens(CONFIGS[2], folded=False).to_tokens({"codes": codes[0].tolist(), "grain_map": [[0, 1]]})
    assert apart["input_ids"].tolist() == [[1, 4, 5, 2, 11, 6, 7, 8, 9, 3]]
    assert apart["granularities"].tolist() == [[0, 0, 1, 0, 0, 1, 1, 1, 1, 0]]
    places = [[0, 0], [0, 0], [0, 2], [0, 0], [0, 0], [0, 2], [0, 3], [1, 2], [1, 3], [0, 0]]
    assert apart["positions"].tolist() == [places]
    assert DQTokens(CONFIGS[2]).vocab_size == 4 + 2 + 32 and DQTokens(CONFIGS[2], folded=False).vocab_size == 22


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(0, 999), st.sampled_from([None, (2, 3)]))
def test_whatever_is_drawn_from_what_is_allowed_is_an_image(num_granularities, seed, shape):
    tokens, draw = DQTokens(CONFIGS[num_granularities]), seeded(seed)
    ids = [tokens.bos_token_id]
    while ids[-1] != tokens.eos_token_id:
        allowed = tokens.allowed(torch.tensor(ids), shape)
        ids.append(allowed[torch.randint(len(allowed), (), generator=draw)])
    (image,) = tokens.from_tokens(torch.tensor(ids))
    assert shape is None or image.grain_map.shape[1:] == shape
    assert tokens.to_tokens(image)["input_ids"].tolist() == [ids]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([4, 4], "place 0"),
        ([1, 4, 2, 11], "ends before"),
        ([1, 4, 2, 11, 11, 3], "token 11 at place 4"),
        ([1, 5, 2, 11, 3], "token 11 at place 3"),
        ([1, 4, 4, 2, 4, 2], "token 2 at place 5"),
        ([1, 4, 2, 38], "token 38"),
    ],
)
def test_what_is_no_image_is_named(ids, message):
    with pytest.raises(ValueError, match=f"sequence 0 is no image.*{message}"):
        DQTokens(CONFIGS[2]).from_tokens(torch.tensor([ids]))


@pytest.mark.parametrize("rest", [[], [0, 0], [3, 3], [1, 4, 11, 99]])
def test_what_follows_the_end_is_not_read(rest):
    (image,) = DQTokens(CONFIGS[2]).from_tokens(torch.tensor([[1, 4, 2, 11, 3, *rest]]))
    assert image.grain_map.tolist() == [[[0]]]


def test_sequences_of_different_lengths_are_taken():
    tokens = DQTokens(CONFIGS[2])
    short, long = [1, 4, 2, 11, 3], [1, 5, 2, 22, 23, 24, 25, 3]
    assert [image.grain_map.item() for image in tokens.from_tokens([short, torch.tensor(long)])] == [0, 1]
    assert [image.grain_map.item() for image in tokens.from_tokens(short)] == [0]


def test_the_configuration_of_a_whole_model_has_the_tokenizers():
    whole = DQForImageGeneration.from_models(make_vae(), make_transformer())
    assert DQTokens(whole.config).vocab_size == DQTokens(CONFIGS[2]).vocab_size


def test_a_table_of_images_of_several_sizes_is_taken_as_its_rows_are():
    tokens = DQTokens(CONFIGS[2])
    rows = [
        {"codes": torch.zeros(2 * h, 2 * w).long().tolist(), "grain_map": torch.zeros(h, w).long().tolist()}
        for h, w in ((2, 3), (1, 2))
    ]
    for table in (Dataset.from_list(rows), tuple(rows), iter(rows)):
        assert torch.equal(tokens.to_tokens(table)["input_ids"], tokens.to_tokens(rows)["input_ids"])


def test_other_inputs_are_refused():
    for other in (5, [5], torch.zeros(2, 2), Dataset.from_list([{"codes": [[0]]}])[:1]):
        with pytest.raises(TypeError, match="codes and grain_map"):
            DQTokens(CONFIGS[2]).to_tokens(other)
    with pytest.raises(TypeError, match="codes and grain_map"):
        DQTokens(CONFIGS[2]).to_tokens({"codes": torch.zeros(1, 8, 8)})
    with pytest.raises(ValueError, match="at least one"):
        DQTokens(CONFIGS[2]).to_tokens([])
    codes, grain_map = torch.zeros(1, 2, 2).long(), torch.zeros(1, 1, 1).long()
    for change, error, message in (
        ({"codes": torch.zeros(1, 4, 4).long()}, ValueError, r"codes must have shape \(1, 2, 2\)"),
        ({"codes": torch.zeros(2, 2, 2).long()}, ValueError, r"codes must have shape \(1, 2, 2\)"),
        ({"codes": codes + 16}, ValueError, "codes must lie in 0 ... 15"),
        ({"codes": codes + 0.5}, TypeError, "codes must be a tensor of integers"),
        ({"grain_map": grain_map + 2}, ValueError, "grain_map must lie in 0 ... 1"),
        ({"codes": torch.arange(4).view(1, 2, 2)}, ValueError, "codes differ within a cell"),
    ):
        with pytest.raises(error, match=message):
            DQTokens(CONFIGS[2]).to_tokens({"codes": codes, "grain_map": grain_map} | change)
