"""Text as a condition: a prefix of fixed length that both stacks read before the stream (method.md, section 9)."""

import pytest
import torch
from conftest import make_transformer
from slow_sampling import SlowTransformer
from torch.nn import functional

from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.modeling.generation_dq import Replay
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration

NUM_CODES = 16
LENGTH, SIZE = 5, 6
TEXT = dict(grid_sizes=[[2, 3], [4, 6]], text_hidden_size=SIZE, text_length=LENGTH)


@pytest.fixture(scope="module", params=["text", "text and class"])
def model(request):
    return make_transformer(**TEXT, **(dict(num_classes=3, class_dropout=0.2) if "class" in request.param else {}))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def texts(lengths=(5, 2, 0), seed=0):
    """States (B, LENGTH, SIZE) of texts of these lengths, and their mask."""
    states = torch.randn(len(lengths), LENGTH, SIZE, generator=seeded(seed))
    return states, (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


def labels_of(model, count):
    return [i % 3 for i in range(count)] if model.config.num_classes else None


def slow_prefix(model, states, mask):
    """Of one text, slot by slot."""
    weights = {name.removeprefix("text_prefix."): value for name, value in model.state_dict().items()}
    slots = []
    for slot in range(LENGTH):
        if slot < len(mask) and mask[slot]:
            normed = functional.layer_norm(states[slot], (SIZE,), weights["norm.weight"], weights["norm.bias"], 1e-5)
            slots.append(weights["projection.weight"] @ normed + weights["projection.bias"])
        else:
            slots.append(weights["padding.weight"][slot])
    return torch.stack(slots)


def images(model, count, seed=0):
    """Codes and grain maps of streams that the model itself drew."""
    generated = model.generate(labels_of(model, count), count, generator=seeded(seed))
    return generated.codes, generated.grain_map


@torch.no_grad()
def test_logits_are_those_of_the_slow_version_with_a_prefix(model):
    (states, mask), (codes, grain_map) = texts(), images(model, 3)
    labels = labels_of(model, 3)
    output = model(codes, grain_map, labels, encoder_hidden_states=states, encoder_attention_mask=mask)
    stream = output.stream
    for image, length in enumerate(stream.lengths.tolist()):
        columns = (stream.contents, stream.positions, stream.granularities)
        elements = list(zip(*(column[image, :length].tolist() for column in columns)))
        expected = SlowTransformer(model).logits(elements, slow_prefix(model, states[image], mask[image]))
        for got, slow in zip((output.position_logits, output.content_logits), expected):
            torch.testing.assert_close(got[image, : length - 1], slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("negative", [None, (1, 4, 2)])
@torch.no_grad()
def test_cached_guided_steps_are_those_of_the_slow_version(model, negative):
    """The twin hides the class and has the negative text, which is none unless it is given."""
    (states, mask), (codes, grain_map) = texts(), images(model, 3)
    labels = None if labels_of(model, 3) is None else torch.tensor(labels_of(model, 3))
    other = (None, None) if negative is None else texts(negative, seed=7)
    condition = model.condition(labels, None, states, mask, *other)
    stream = model.pack(codes, grain_map, labels)
    source, seen = Replay(stream.positions, stream.contents), ([], [])
    choose = source.choose
    source.choose = lambda symbol, logits, allowed, inputs: [
        seen[symbol].append(logits),
        choose(symbol, logits, allowed, inputs),
    ][1]
    for _ in model.run_steps(StreamState(model.layout, condition.labels), condition, source, 3.0, None):
        pass
    slow = SlowTransformer(model)
    for image, length in enumerate(stream.lengths.tolist()):
        columns = (stream.contents, stream.positions, stream.granularities)
        elements = list(zip(*(column[image, :length].tolist() for column in columns)))
        label = 0 if labels is None else 3 - int(labels[image])  # from this image's class to the hidden one
        twin = [
            (content + label, position + label, granularity)
            if content >= NUM_CODES + 2
            else (content, position, granularity)
            for content, position, granularity in elements
        ]
        bare_prefix = slow_prefix(model, states[image], [0] * LENGTH)
        if negative is not None:
            bare_prefix = slow_prefix(model, other[0][image], other[1][image])
        given = slow.logits(elements, slow_prefix(model, states[image], mask[image]))
        bare = slow.logits(twin, bare_prefix)
        for i in range(length - 1):
            for symbol in (0, 1):
                expected = bare[symbol][i] + 3.0 * (given[symbol][i] - bare[symbol][i])
                for got in seen[symbol][i : i + 1]:  # none where nothing is free to choose
                    torch.testing.assert_close(got[image], expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_depends_on_its_own_text_alone(model, scale):
    states, mask = texts()
    whole = model.generate(
        labels_of(model, 3),
        generator=seeded(3),
        guidance_scale=scale,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
    )
    sources = seeded(3)
    for image in range(3):
        label = None if labels_of(model, 3) is None else [image]
        own = seeded(0)
        own.set_state(sources.get_state())
        torch.randint(2**63 - 1, (), generator=sources)
        short = slice(None, max(1, int(mask[image].sum())))  # as long as the text is
        alone = model.generate(
            label,
            generator=own,
            guidance_scale=scale,
            encoder_hidden_states=states[image : image + 1, short],
            encoder_attention_mask=mask[image : image + 1, short],
        )
        assert torch.equal(alone.codes[0], whole.codes[image])
        assert torch.equal(alone.contents[0], whole.contents[image, : alone.contents.shape[1]])


def test_no_text_is_the_empty_text_whatever_stands_in_its_slots(model):
    (codes, grain_map), labels = images(model, 2), labels_of(model, 2)
    empty = model(codes, grain_map, labels, torch.randn(2, 3, SIZE), torch.zeros(2, 3))
    assert torch.equal(model(codes, grain_map, labels).content_logits, empty.content_logits)
    generated = model.generate(labels, 2, generator=seeded(0))
    nothing = dict(encoder_hidden_states=torch.randn(1, 1, SIZE), encoder_attention_mask=torch.zeros(1, 1))
    assert torch.equal(model.generate(labels, 2, generator=seeded(0), **nothing).codes, generated.codes)


def test_log_probabilities_know_the_text(model):
    (states, mask), (codes, grain_map), labels = texts(), images(model, 3), labels_of(model, 3)
    with torch.no_grad():
        right = model.log_prob(codes, grain_map, labels, states, mask)
        alone = model.log_prob(codes[1:2], grain_map[1:2], labels and labels[1:2], states[1:2, :2])
        none = model.log_prob(codes, grain_map, labels)
    torch.testing.assert_close(right.nats[1:2], alone.nats)
    assert (right.nats[:2] - none.nats[:2]).abs().min() > 1e-3 and right.nats[2] == none.nats[2]


def test_training_hides_texts_and_all_of_the_prefix_learns():
    options = dict(embedding_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0, text_dropout=0.5)
    model = make_transformer(**TEXT, **options)
    codes, grain_map = images(model, 1)
    codes, grain_map = codes.expand(64, -1, -1), grain_map.expand(64, -1, -1)
    states = texts((3,))[0].expand(64, -1, -1)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(64, -1)
    given = model(codes[:1], grain_map[:1], None, states[:1], mask[:1]).content_logits
    none = model(codes[:1], grain_map[:1]).content_logits
    torch.manual_seed(0)
    output = model.train()(codes, grain_map, None, states, mask)
    hidden = [torch.allclose(row, none[0], atol=1e-4) for row in output.content_logits]
    shown = [torch.allclose(row, given[0], atol=1e-4) for row in output.content_logits]
    assert all(one != other for one, other in zip(hidden, shown)) and 16 < sum(hidden) < 48
    output.loss.backward()
    for name, parameter in model.text_prefix.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_what_stands_in_a_slot_without_a_token_reaches_no_gradient():
    model = make_transformer(**TEXT)
    codes, grain_map = images(model, 1)
    states, mask = torch.ones(1, 3, SIZE), torch.tensor([[1, 1, 0]])
    states[0, 2] = torch.nan
    model(codes, grain_map, None, states, mask).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.text_prefix.parameters())


def test_saved_and_loaded_again_it_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DQTransformerForImageGeneration.from_pretrained(tmp_path)
    (states, mask), labels = texts(), labels_of(model, 3)
    options = dict(encoder_hidden_states=states, encoder_attention_mask=mask)
    first, second = (each.generate(labels, generator=seeded(0), **options) for each in (model, loaded))
    assert torch.equal(first.codes, second.codes)


@pytest.mark.parametrize(
    ("states", "mask", "error", "message"),
    [
        ([[1.0]], None, TypeError, "must be a float tensor .* got list"),
        (torch.ones(1, 2, SIZE).long(), None, TypeError, "must be a float tensor .* got torch.int64"),
        (torch.ones(1, 2, SIZE + 1), None, ValueError, r"must have shape \(B, T, 6\)"),
        (torch.ones(1, LENGTH + 1, SIZE), None, ValueError, "T at most text_length 5"),
        (torch.ones(1, 2, SIZE), torch.ones(1, 3), ValueError, "encoder_attention_mask must have shape"),
        (torch.ones(2, 2, SIZE), None, ValueError, "one text or of one for each of 3 images"),
        (None, torch.ones(3, 2), ValueError, "encoder_attention_mask is of encoder_hidden_states: give both"),
    ],
)
def test_states_that_do_not_fit_are_refused(states, mask, error, message):
    model = make_transformer(**TEXT)
    with pytest.raises(error, match=message):
        model.generate(num_images=3, encoder_hidden_states=states, encoder_attention_mask=mask)


def test_text_for_a_model_without_it_is_refused(tiny_transformer):
    with pytest.raises(ValueError, match="trained without text"):
        tiny_transformer.generate(encoder_hidden_states=torch.ones(1, 2, SIZE))
    with pytest.raises(ValueError, match="text_hidden_size and text_length must be given together"):
        make_transformer(text_length=4)
