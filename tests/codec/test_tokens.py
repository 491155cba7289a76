"""Images as flat sequences of integers for other models: exact, padded, of any size, and never anything but images."""

import pickle

import numpy as np
import pytest
import torch
from conftest import make_transformer, make_vae, seeded
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from dq_hf import DQForImageGeneration
from dq_hf.codec import DQTokens
from dq_hf.codec.tokens import Sequence
from dq_hf.modeling.grain_map_dq import expand_grain_map, top_left_cells
from dq_hf.modeling.modeling_dqvae import DQVAEEncoderOutput
from dq_hf.pipelines.pipeline_dq import DQPipelineOutput

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
        ([4, 4], "no token of the start, 1"),
        ([0, 0, 1, 9], "token 9 at place 3"),
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


@pytest.mark.parametrize("rest", [[], [0, 0], [3, 3], [4, 11, 99]])
def test_what_follows_the_end_is_not_read(rest):
    (image,) = DQTokens(CONFIGS[2]).from_tokens(torch.tensor([[1, 4, 2, 11, 3, *rest]]))
    assert image.grain_map.tolist() == [[[0]]]


def test_sequences_of_different_lengths_are_taken():
    tokens = DQTokens(CONFIGS[2])
    short, long = [1, 4, 2, 11, 3], [1, 5, 2, 22, 23, 24, 25, 3]
    assert [image.grain_map.item() for image in tokens.from_tokens([short, torch.tensor(long)])] == [0, 1]
    assert [image.grain_map.item() for image in tokens.from_tokens(short)] == [0]


def test_sequences_of_a_table_or_a_generator_are_taken():
    tokens, rows = DQTokens(CONFIGS[2]), [[1, 4, 2, 11, 3], [1, 5, 2, 22, 23, 24, 25, 3]]
    ragged = np.empty(2, dtype=object)
    ragged[:] = rows
    for sequences in (Dataset.from_dict({"input_ids": rows})["input_ids"], (row for row in rows), ragged, tuple(rows)):
        assert [image.grain_map.item() for image in tokens.from_tokens(sequences)] == [0, 1]
    assert len(tokens.from_tokens([torch.tensor(token) for token in rows[0]])) == 1
    batch = tokens.to_tokens(tokens.from_tokens(rows))["input_ids"]
    for batches in (
        [batch, batch],
        [batch.numpy(), batch.numpy()],
        [batch.tolist(), batch.tolist()],
        torch.stack([batch] * 2),
    ):
        assert [image.grain_map.item() for image in tokens.from_tokens(batches)] == [0, 1, 0, 1]
    assert len(tokens.from_tokens({"sequences": batch})) == 2


def test_what_stands_before_the_start_is_not_read():
    tokens = DQTokens(CONFIGS[2], offset=100)
    image = random_image(2, 2, 3, 0)
    ids = tokens.to_tokens(image)["input_ids"][0].tolist()
    assert min(ids) == tokens.bos_token_id == 101 and max(ids) < tokens.vocab_size == 100 + 38
    (back,) = tokens.from_tokens([0, 0, 7, 50, *ids, 0, 0])
    assert torch.equal(back.codes, image.codes)
    assert tokens.allowed([0, 7, 50]) == [101] and tokens.allowed([]) == [101]
    assert tokens.allowed([0, 7, *ids[:-1]]) == tokens.allowed(ids[:-1]) == [103]
    assert tokens.allowed([0, 7, *ids]) == tokens.allowed([*ids, 0, 50]) == [tokens.pad_token_id] == [100]
    prompt = [7, *tokens.to_tokens(random_image(2, 1, 1, 1))["input_ids"][0].tolist(), 8]  # one that has an image, too
    (back,) = tokens.from_tokens([*prompt, *ids])
    assert torch.equal(back.codes, image.codes) and tokens.allowed([*prompt, *ids[:-1]]) == [103]
    for number, sequence in ((8, [0, 0, 0, 0, 0, 0, 0, 101, 99]), (1, [101, 99])):
        assert tokens.allowed(sequence) == [tokens.pad_token_id]  # beam search has such sequences
        with pytest.raises(ValueError, match=f"token 99 at place {number} cannot stand there"):
            tokens.from_tokens(sequence)


@pytest.mark.parametrize("arguments", [dict(offset=-1), dict(offset=1.5), dict(offset=True), dict(offset="3")])
def test_an_offset_is_a_number_of_tokens(arguments):
    with pytest.raises(ValueError, match="offset must be a whole number of at least 0"):
        DQTokens(CONFIGS[2], **arguments)
    with pytest.raises(TypeError, match="must be a DQVAEConfig.*, got object; of a model, give its config"):
        DQTokens(object())


def test_beams_are_images():
    tokens = DQTokens(CONFIGS[2], offset=10)
    special = dict(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=tokens.vocab_size, n_positions=128, n_embd=8, n_layer=1, n_head=1, **special)
    ).eval()
    seen, options = [], dict(num_beams=4, do_sample=True, max_new_tokens=40, num_return_sequences=2)

    def watched(batch_id, sequence):
        seen.append(tokens.allowed(sequence, shape=(2, 2)))
        return seen[-1]

    out = model.generate(torch.tensor([[tokens.bos_token_id]] * 3), prefix_allowed_tokens_fn=watched, **options)
    assert len(tokens.from_tokens(out)) == 6 and [tokens.pad_token_id] in seen


def test_rows_of_several_sizes_are_given_one_by_one():
    tokens = DQTokens(CONFIGS[2])
    images = [random_image(2, side, 1, 0) for side in (1, 2)]
    rows = [{name: image[name][0].tolist() for name in ("codes", "grain_map")} for image in images]
    assert len(tokens.to_tokens(rows)["input_ids"]) == 2
    columns = {name: [row[name] for row in rows] for name in ("codes", "grain_map")}
    with pytest.raises(TypeError, match="rows of several sizes are given one by one"):
        tokens.to_tokens(columns)


def test_a_sequence_that_is_no_image_may_be_none():
    tokens = DQTokens(CONFIGS[2])
    first, second, third = tokens.from_tokens(
        [[1, 4, 2, 11, 3], [1, 4, 2], [1, 5, 2, 22, 23, 24, 25, 3]], strict=False
    )
    assert second is None and (first.grain_map.item(), third.grain_map.item()) == (0, 1)
    assert (
        tokens.from_tokens([[]], strict=False) == [None] and tokens.from_tokens([[], []], strict=False) == [None] * 2
    )
    behind_an_empty_batch = [torch.zeros(0, 5, dtype=torch.long), [1, 4, 2, 11, 3]]
    assert len(tokens.from_tokens(behind_an_empty_batch)) == 1


@pytest.mark.parametrize("padding", [None, 0])
def test_a_language_model_samples_images_in_a_batch(padding):
    tokens = DQTokens(CONFIGS[2], offset=10)
    special = dict(bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=padding)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=tokens.vocab_size, n_positions=64, n_embd=8, n_layer=1, n_head=1, **special)
    )
    start = torch.tensor([[0, 5], [5, 6], [5, 7], [5, 8]])
    torch.manual_seed(1)
    said = model.generate(
        start,
        attention_mask=start > 0,
        do_sample=True,
        max_length=64,
        prefix_allowed_tokens_fn=lambda _, ids: tokens.allowed(ids, shape=(2, 2)),
    )
    lengths = {(row[2:] == tokens.eos_token_id).nonzero()[0].item() for row in said}
    assert len(lengths) > 1  # so that some rows are padded while others go on
    assert all(image.grain_map.shape == (1, 2, 2) for image in tokens.from_tokens(said))


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_places_of_a_sequence_so_far_are_those_of_the_whole(num_granularities, rows, columns, seed):
    tokens = DQTokens(CONFIGS[num_granularities], folded=False, offset=seed)
    batch = tokens.to_tokens(random_image(num_granularities, rows, columns, seed))
    for length in range(1, batch["input_ids"].shape[1] + 1):
        so_far = tokens.places(batch["input_ids"][0, :length])
        behind = tokens.places([seed + 9] * 3 + batch["input_ids"][0, :length].tolist())
        for name in ("granularities", "positions"):
            assert torch.equal(so_far[name], batch[name][0, :length])
            assert torch.equal(behind[name][3:], so_far[name]) and not behind[name][:3].any()


def test_a_sequence_is_read_once(monkeypatch):
    read, places = Sequence.read, []
    monkeypatch.setattr(
        Sequence, "read", lambda self, token, first: (places.append(self.length), read(self, token, first))[1]
    )
    tokens = DQTokens(CONFIGS[2])
    ids = tokens.to_tokens(random_image(2, 3, 3, 0))["input_ids"][0].tolist()
    for length in range(1, len(ids)):
        assert ids[length] in tokens.allowed(ids[:length], (3, 3))
    assert places == list(range(len(ids) - 1))
    fresh = pickle.dumps(DQTokens(CONFIGS[2]))
    assert pickle.dumps(tokens) == fresh  # or a function of `datasets.map` that uses it would seem to be another one
    tokens.allowed(ids, (3, 3))
    assert not tokens._open


def test_codes_of_a_pipeline_are_taken():
    image = random_image(2, 2, 2, 0)
    output = DQPipelineOutput(images=None, codes=image.codes, grain_maps=image.grain_map)
    assert torch.equal(
        DQTokens(CONFIGS[2]).to_tokens(output)["input_ids"], DQTokens(CONFIGS[2]).to_tokens(image)["input_ids"]
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, "a sequence of whole numbers or several such, got NoneType"),
        ("1 4", TypeError, "got str"),
        ([1.0, 4.0], TypeError, "whole numbers, got torch.float32"),
        ([["a"]], TypeError, "a sequence of whole numbers, got list"),
        ([], ValueError, "at least one sequence, got none"),
        ({"ids": [1]}, TypeError, "must have input_ids, or sequences as generate gives them, got .'ids'."),
        (torch.zeros(0, 5, dtype=torch.long), ValueError, "at least one sequence, got none"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, "at least one sequence, got none"),
    ],
)
def test_what_is_no_sequence_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        DQTokens(CONFIGS[2]).from_tokens(given)


def test_a_batch_is_no_sequence():
    for method in (DQTokens(CONFIGS[2]).allowed, DQTokens(CONFIGS[2]).places):
        with pytest.raises(ValueError, match=r"one sequence, got shape \(2, 2\)"):
            method(torch.ones(2, 2, dtype=torch.long))


@pytest.mark.parametrize("shape", [8, (8,), (0, 2), (2.0, 2), "88"])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(TypeError, match="shape must be rows and columns of regions, two whole numbers"):
        DQTokens(CONFIGS[2]).allowed([1], shape)


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
