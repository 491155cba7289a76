"""Several elements a pass give the streams of one element a pass, whatever the model, the options and the batch."""

import pytest
import torch
from conftest import make_transformer, seeded

from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.modeling.generation_dq import Replay

KINDS = {
    "unconditional": {},
    "guidance": dict(num_classes=3, class_dropout=0.2),
    "region-first": dict(fine_order="region-first"),
    "one granularity": dict(grid_sizes=[[3, 4]]),
    "three granularities": dict(grid_sizes=[[1, 2], [2, 4], [4, 8]], num_classes=3),
    "text": dict(text_hidden_size=6, text_length=3),
    "text and class": dict(text_hidden_size=6, text_length=3, num_classes=3, class_dropout=0.2),
}


@pytest.fixture(scope="module")
def models():
    return {name: make_transformer(**({"grid_sizes": [[2, 3], [4, 6]]} | kind)) for name, kind in KINDS.items()}


def passes(model, num_images=4, attention="sdpa", **options):
    """The output, and after each pass which codes have come and how long the streams are, clones."""
    config = model.config
    model.set_attn_implementation(attention)
    if config.num_classes:
        options["class_labels"] = [i % config.num_classes for i in range(num_images)]
    if config.text_length:
        options["encoder_hidden_states"] = torch.randn(num_images, 3, 6, generator=seeded())
    if config.class_dropout or config.text_length:
        options["guidance_scale"] = 2.0
    seen = []
    for state in model.generate_steps(num_images=num_images, generator=seeded(1), **options):
        seen.append((state.stream(), state.codes.clone(), state.taken.clone()))
    return model.generation_output(state), seen


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("unconditional", dict(num_images=1)),
        ("guidance", dict(temperature=0.7, top_p=0.8, position_top_p=0.9)),
        ("region-first", dict(top_k=4, attention="eager")),
        ("one granularity", dict(do_sample=False)),
        ("three granularities", dict(temperature=0.5)),
        ("text", dict(top_p=0.9)),
        ("text and class", dict()),
        ("guidance", dict(fine_positions="free")),
    ],
)
def test_several_elements_a_pass_give_the_same_streams(models, kind, options):
    expected, seen = passes(models[kind], **options)
    assert len(seen) == expected.contents.shape[1] - 1
    for lookahead in (2, 5, 100):
        got, fewer = passes(models[kind], lookahead=lookahead, **options)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        if options.get("fine_positions") == "free":
            assert len(fewer) == len(seen)


def test_each_image_advances_at_its_own_pace_and_what_has_come_stays(models):
    model = models["guidance"]
    output, seen = passes(model, num_images=6, temperature=0.3, lookahead=6)
    assert len(seen) < output.contents.shape[1] - 1
    assert any(stream.lengths.unique().numel() > 3 for stream, _, _ in seen)
    for stream, codes, taken in seen:
        length = stream.contents.shape[1]
        assert length == stream.lengths.max()
        inside = torch.arange(length) < stream.lengths[:, None]
        assert torch.equal(stream.contents[inside], output.contents[:, :length][inside])
        assert torch.equal(stream.positions[inside], output.positions[:, :length][inside])
        assert (stream.contents[~inside] == 16).all() and (stream.positions[~inside] == 24).all()
        assert torch.equal(codes[taken], output.codes.flatten(1)[taken])
    assert taken.all()


@torch.no_grad()
def test_what_is_certain_takes_a_pass_to_be_said_and_one_to_be_kept():
    model = make_transformer(grid_sizes=[[4, 4]])
    codes = torch.arange(1, 17).view(1, 4, 4) % 15 + 1  # never 0, the first guess
    condition = model.condition()
    stream = model.pack(codes, torch.zeros_like(codes))
    state = StreamState(model.layout, condition.labels)
    lengths = []
    source = Replay(stream.positions, stream.contents)
    for _ in model.run_steps(state, condition, source, 1.0, None, 4):
        lengths.append(int(state.lengths) - 1)
    assert lengths == [1, 5, 6, 10, 11, 15, 16, 17]
    assert torch.equal(model.generation_output(state).codes, codes)


def test_more_than_one_element_a_pass_needs_attention_with_a_mask_for_each_image():
    model = make_transformer()
    model.config._attn_implementation_internal = "flash_attention_2"  # loading with it needs the package
    with pytest.raises(ValueError, match="lookahead above 1 .* 'flash_attention_2'; load .* \"sdpa\""):
        model.generate(lookahead=2)
