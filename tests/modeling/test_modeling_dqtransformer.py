import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_transformer, seeded
from slow_sampling import SlowTransformer
from transformers import CompileConfig

from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.modeling.generation_dq import Replay
from dq_hf.modeling.modeling_utils_dq import evaluation_mode
from dq_hf.modeling.step_loop_dq import CONTENT, POSITION

NUM_CODES = 16
KINDS = {
    "unconditional": {},
    "class": dict(num_classes=3),
    "guidance": dict(num_classes=3, class_dropout=0.2),
    "region-first": dict(fine_order="region-first", num_classes=3),
    "one granularity": dict(grid_sizes=[[3, 4]]),
    "three granularities": dict(grid_sizes=[[1, 2], [2, 4], [4, 8]], num_classes=3),
    "three granularities, region-first": dict(grid_sizes=[[1, 2], [2, 4], [4, 8]], fine_order="region-first"),
}


@pytest.fixture(scope="module")
def models():
    """One model of each kind, for grids of 2x3 and 4x6 cells unless the kind says otherwise."""
    return {name: make_transformer(**({"grid_sizes": [[2, 3], [4, 6]]} | kind)) for name, kind in KINDS.items()}


def own_seeds(seed, count):
    """Seeds of the random streams of `count` images that come from one generator."""
    source = seeded(seed)
    return [int(torch.randint(2**63 - 1, (), generator=source)) for _ in range(count)]


def labels_for(model, count):
    return [i % model.config.num_classes for i in range(count)] if model.config.num_classes else None


def rows(generated, image):
    """Everything about one image of a batch, as lists; its stream without padding."""
    length = int(generated.lengths[image])
    return (
        generated.contents[image, :length].tolist(),
        generated.positions[image, :length].tolist(),
        generated.codes[image].tolist(),
        generated.grain_map[image].tolist(),
    )


def assert_same_images(first, second):
    assert len(first.codes) == len(second.codes)
    for image in range(len(first.codes)):
        assert rows(first, image) == rows(second, image)


def assert_same_as_slow(model, generated, seeds, fixed, **options):
    slow = SlowTransformer(model)
    labels = labels_for(model, len(seeds)) or [0] * len(seeds)
    for image, (label, seed) in enumerate(zip(labels, seeds)):
        sample = slow.sample(label, seed, fixed, **options)
        assert rows(generated, image) == (sample.contents, sample.positions, sample.codes, sample.grain_map)
        assert (generated.contents[image, len(sample.contents) :] == NUM_CODES).all()
        assert (generated.positions[image, len(sample.contents) :] == generated.codes[0].numel()).all()


def toy_batch(model, seed=0):
    """Codes, grain map and labels of four images, one with all regions coarse and one with all finest."""
    rows, columns = model.config.grid_sizes[0]
    num_granularities = len(model.config.grid_sizes)
    side = 2 ** (num_granularities - 1)
    generator = seeded(seed)
    grain_map = torch.randint(num_granularities, (4, rows, columns), generator=generator)
    grain_map[0], grain_map[1] = 0, num_granularities - 1
    codes = torch.randint(NUM_CODES, (4, rows * side, columns * side), generator=generator)
    for granularity in range(num_granularities):
        size = side // 2**granularity
        coarser = codes[:, ::size, ::size].repeat_interleave(size, 1).repeat_interleave(size, 2)
        here = (grain_map == granularity).repeat_interleave(side, 1).repeat_interleave(side, 2)
        codes = torch.where(here, coarser, codes)
    labels = torch.tensor([0, 1, 2, 1]) if model.config.num_classes else None
    return codes, grain_map, labels


def elements_of(stream, image):
    length = int(stream.lengths[image])
    columns = (stream.contents, stream.positions, stream.granularities)
    return list(zip(*(column[image, :length].tolist() for column in columns)))


# Sampling: with the cache as without it


@pytest.mark.parametrize("fine_positions", ["fixed", "free"])
@pytest.mark.parametrize("kind", KINDS)
def test_drawing_and_greedy_with_cache_equal_the_slow_version(models, kind, fine_positions):
    model = models[kind]
    labels, fixed = labels_for(model, 4), fine_positions == "fixed"
    drawn = model.generate(labels, num_images=4, generator=seeded(3), fine_positions=fine_positions)
    assert_same_as_slow(model, drawn, own_seeds(3, 4), fixed)
    greedy = model.generate(labels, num_images=4, do_sample=False, fine_positions=fine_positions)
    assert_same_as_slow(model, greedy, [None] * 4, fixed)


@pytest.mark.parametrize("scale", [0, 0.5, 3.0])
def test_guided_sampling_equals_the_slow_version(models, scale):
    model = models["guidance"]
    drawn = model.generate([0, 1, 2], guidance_scale=scale, generator=seeded(4))
    assert_same_as_slow(model, drawn, own_seeds(4, 3), True, guidance_scale=scale)
    greedy = model.generate([0, 1, 2], guidance_scale=scale, do_sample=False, fine_positions="free")
    assert_same_as_slow(model, greedy, [None] * 3, False, guidance_scale=scale)


def test_a_guidance_scale_that_weakens_the_class_is_told(models):
    with pytest.warns(UserWarning, match="guidance_scale 0 weakens class and text, .* 1 means no guidance"):
        models["guidance"].generate([0], guidance_scale=0, generator=seeded(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models["guidance"].generate([0], guidance_scale=1, generator=seeded(0))


class Watched(Replay):
    """Remembers the logits that it is asked about, of positions and of contents."""

    def __init__(self, *stream):
        super().__init__(*stream)
        self.logits = [], []

    def choose(self, symbol, logits, allowed, inputs):
        self.logits[symbol].append(logits)
        return super().choose(symbol, logits, allowed, inputs)


def test_guided_logits_are_those_of_the_slow_version_at_every_element(models):
    """Draws alone would hardly tell: an element attends little to the start tokens, in which the twin differs."""
    model = models["guidance"]
    codes, grain_map, labels = toy_batch(model)
    stream, condition = model.pack(codes[2:3], grain_map[2:3], labels[2:3]), model.condition(labels[2:3])
    source = Watched(stream.positions, stream.contents)
    for _ in model.run_steps(StreamState(model.layout, condition.labels), condition, source, 2.5, None):
        pass
    elements, slow = elements_of(stream, 0), SlowTransformer(model)
    num_coarse = sum(granularity == 0 for _, _, granularity in elements)
    assert len(source.logits[POSITION]) == num_coarse  # behind the fine start token positions are fixed
    assert len(source.logits[CONTENT]) == len(elements) - 2  # and the end is certain
    for i in range(1, len(elements)):
        for column, expected in zip(source.logits, slow.guided_logits(elements[: i + 1], 2.5)):
            for got in column[i - 1 : i]:
                torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [(0.3, None, 1.0), (2.0, None, 1.0), (1.0, 2, 1.0), (1.0, None, 0.3), (0.7, 5, 0.8)]
)
@pytest.mark.parametrize("of_contents", [True, False])
def test_temperature_top_k_and_top_p_are_separate_for_contents_and_positions(models, of_contents, options):
    model = models["unconditional"]
    prefix, slow_name = ("", "content_options") if of_contents else ("position_", "position_options")
    arguments = {prefix + name: value for name, value in zip(("temperature", "top_k", "top_p"), options)}
    generated = model.generate(num_images=3, generator=seeded(6), fine_positions="free", **arguments)
    assert_same_as_slow(model, generated, own_seeds(6, 3), False, **{slow_name: options})
    plain = model.generate(num_images=3, generator=seeded(6), fine_positions="free")
    assert rows(generated, 0) != rows(plain, 0)


def test_draws_follow_the_softmax_of_what_is_allowed():
    model = make_transformer(grid_sizes=[[2, 2]], codebook_size=4)
    num_images = 4000
    generated = model.generate(num_images=num_images, generator=seeded(0), fine_positions="free")
    elements = [(6, 6, 0), (0, 0, 0)]  # start, and an element to be drawn
    slow = SlowTransformer(model)
    position_shares = slow.logits(elements)[0][0, :4].softmax(0)
    content_shares = slow.logits([elements[0], (0, 2, 0)])[1][0, :4].softmax(0)
    first = generated.positions[:, 1]
    assert torch.allclose(first.bincount(minlength=4) / num_images, position_shares, atol=0.03)
    contents = generated.contents[first == 2, 1]
    assert torch.allclose(contents.bincount(minlength=4) / len(contents), content_shares, atol=0.06)


# Sampling: a seed is an image


@pytest.mark.parametrize("fine_positions", ["fixed", "free"])
@pytest.mark.parametrize("kind", ["unconditional", "guidance", "three granularities"])
def test_a_seed_gives_the_same_image_alone_and_anywhere_in_a_batch(models, kind, fine_positions):
    model = models[kind]
    options = dict(fine_positions=fine_positions)
    if kind == "guidance":
        options["guidance_scale"] = 1.5

    def generate(seeds):
        labels = [seed % 3 for seed in seeds] if model.config.num_classes else None
        generators = [seeded(seed) for seed in seeds]
        return model.generate(labels, num_images=len(seeds), generator=generators, **options)

    alone = {seed: rows(generate([seed]), 0) for seed in range(5)}
    assert len({str(image) for image in alone.values()}) == 5
    for seeds in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 0], [1, 1, 1, 1, 1, 1, 2]):
        batch = generate(seeds)
        assert [rows(batch, i) for i in range(len(seeds))] == [alone[seed] for seed in seeds]


def test_image_i_takes_the_ith_draw_of_one_generator_and_without_one_of_torchs_own(models):
    model = models["unconditional"]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole = model.generate(num_images=4, generator=seeded(9))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_images(model.generate(num_images=4), whole)
    source, shared = seeded(9), seeded(9)
    one_by_one = [model.generate(num_images=1, generator=source) for _ in range(4)]
    assert [rows(whole, i) for i in range(4)] == [rows(image, 0) for image in one_by_one]
    assert_same_images(model.generate(num_images=4, generator=[shared] * 4), whole)
    assert rows(model.generate(num_images=2, generator=[seeded(9), seeded(9)]), 1) == rows(whole, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_streams_unpack_to_the_generated_codes_and_pack_again(models, kind):
    model = models[kind]
    labels = labels_for(model, 5)
    generated = model.generate(labels, num_images=5, generator=seeded(8), fine_positions="free")
    codes, grain_map = model.unpack(generated.contents, generated.positions, generated.lengths)
    assert torch.equal(codes, generated.codes)
    assert torch.equal(grain_map, generated.grain_map)
    assert torch.equal(model.pack(codes, grain_map, labels).lengths, generated.lengths)


def test_every_element_is_a_step_and_whoever_watches_may_stop(models):
    model = models["unconditional"].train()
    model.content_head.eval()
    seen = []
    for state in model.generate_steps(num_images=6, generator=seeded(2)):
        seen.append(state.granularity.tolist())
        assert torch.is_grad_enabled()
    assert any(0 in granularities and 1 in granularities for granularities in seen)
    assert len(set(state.lengths.tolist())) > 1 and int(state.lengths.max()) == len(seen) + 1
    steps = model.generate_steps(generator=seeded(0))
    next(steps)
    steps.close()
    assert model.training and model.position_head.training and not model.content_head.training
    model.eval()


def test_one_label_serves_all_images(models):
    model = models["class"]
    spread = model.generate(class_labels=2, num_images=3, generator=seeded(0))
    assert_same_images(spread, model.generate(torch.tensor([2, 2, 2]), generator=seeded(0)))
    assert (spread.contents[:, 0] == NUM_CODES + 2 + 2).all()


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_logits_and_losses_are_those_of_the_slow_version_for_each_image_alone(models, kind):
    model = models[kind]
    codes, grain_map, labels = toy_batch(model)
    with torch.no_grad():
        out = model(codes, grain_map, labels)
    slow = SlowTransformer(model)
    content_losses, position_losses = [], [[] for _ in model.config.grid_sizes]
    for image in range(4):  # each alone, without padding
        label = None if labels is None else labels[[image]]
        elements = elements_of(model.pack(codes[[image]], grain_map[[image]], label), 0)
        assert elements == elements_of(out.stream, image)
        position_logits, content_logits = slow.logits(elements)
        for logits, expected in ((out.position_logits, position_logits), (out.content_logits, content_logits)):
            torch.testing.assert_close(logits[image, : len(elements) - 1], expected, atol=1e-4, rtol=1e-4)
        for i, (content, position, granularity) in enumerate(elements[1:]):
            content_losses.append(-content_logits[i].log_softmax(0)[content])
            position_losses[granularity].append(-position_logits[i].log_softmax(0)[position])
    content_loss = sum(content_losses) / len(content_losses)
    each = torch.stack([sum(losses) / len(losses) for losses in position_losses])
    for got, expected in (
        (out.content_loss, content_loss),
        (out.position_loss, each.mean()),
        (out.coarse_position_loss, each[0]),
        (out.fine_position_loss, each[-1]),
        (out.position_losses, each),
        (out.loss, content_loss + each.mean()),
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_loss_weights_weigh_the_two_terms():
    model = make_transformer(content_loss_weight=0.25, position_loss_weight=3)
    out = model(*toy_batch(model))
    torch.testing.assert_close(out.loss, 0.25 * out.content_loss + 3 * out.position_loss)


def test_every_weight_gets_a_gradient_and_dropout_is_active_in_training_only():
    model = make_transformer(num_classes=3, class_dropout=0.2)
    batch = toy_batch(model)
    out = model(*batch)
    assert torch.equal(model(*batch).content_logits, out.content_logits)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    model.train()
    assert not torch.equal(model(*batch).content_logits, model(*batch).content_logits)


def test_class_dropout_hides_the_class_in_training_only():
    no_dropout = dict(embedding_dropout=0, residual_dropout=0, attention_dropout=0)
    model = make_transformer(num_classes=3, class_dropout=0.25, **no_dropout)
    codes, grain_map, labels = (torch.cat([part] * 100) for part in toy_batch(model))
    shown = model.pack(codes, grain_map, labels)
    assert torch.equal(model(codes, grain_map, labels).stream.contents, shown.contents)

    model.train()
    torch.manual_seed(0)
    out = model(codes, grain_map, labels)
    contents, positions = out.stream.contents, out.stream.positions
    hidden = contents[:, 0] == NUM_CODES + 2 + 3
    assert abs(hidden.float().mean() - 0.25) < 0.06
    is_start = shown.contents >= NUM_CODES + 2
    num_cells = torch.tensor([16, 64])[shown.granularities]
    expected_contents = torch.where(is_start & hidden[:, None], NUM_CODES + 2 + 3, shown.contents)
    expected_positions = torch.where(is_start & hidden[:, None], num_cells + 2 + 3, shown.positions)
    assert torch.equal(contents, expected_contents)
    assert torch.equal(positions, expected_positions)
    image = int(hidden.nonzero()[0])
    elements = elements_of(out.stream, image)
    logits = SlowTransformer(model).logits(elements)[1]
    torch.testing.assert_close(out.content_logits[image, : len(elements) - 1], logits, atol=1e-4, rtol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("codes", lambda codes: codes[:, :-1], ValueError, r"codes must have shape \(B, 8, 8\), got \(4, 7, 8\)"),
        ("codes", lambda codes: codes[:0], ValueError, "at least one image"),
        ("codes", lambda codes: codes + 16, ValueError, "codes must lie in 0 ... 15"),
        ("codes", lambda codes: codes - 1, ValueError, "codes must lie in 0 ... 15, got values from -1"),
        ("codes", lambda codes: codes.tolist(), TypeError, "codes must be a tensor of integers, got list"),
        ("codes", lambda codes: codes.float(), TypeError, "codes must be a tensor of integers, got torch.float32"),
        ("grain_map", lambda grains: grains[:1], ValueError, r"grain_map must have shape \(4, 4, 4\), got \(1, "),
        ("grain_map", lambda grains: grains + 1, ValueError, "grain_map must lie in 0 ... 1"),
        ("grain_map", lambda grains: grains > 0, TypeError, "grain_map must be a tensor of integers, got torch.bool"),
        ("class_labels", lambda labels: None, ValueError, "class-conditional: give class_labels"),
        ("class_labels", lambda labels: labels + 1, ValueError, "class_labels must lie in 0 ... 2"),
        ("class_labels", lambda labels: labels[:3], ValueError, "one label or one for each of 4 images, got 3"),
    ],
)
def test_training_refuses(tiny_transformer_class, argument, change, error, message):
    arguments = dict(zip(("codes", "grain_map", "class_labels"), toy_batch(tiny_transformer_class)))
    arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=message):
        tiny_transformer_class(**arguments)


def test_unconditional_models_refuse_labels(tiny_transformer):
    codes, grain_map, _ = toy_batch(tiny_transformer)
    with pytest.raises(ValueError, match="unconditional"):
        tiny_transformer(codes, grain_map, torch.tensor([0, 0, 0, 0]))
    with pytest.raises(ValueError, match="unconditional"):
        tiny_transformer.generate(class_labels=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(class_labels=None), ValueError, "class-conditional: give class_labels"),
        (dict(class_labels=3), ValueError, "class_labels must lie in 0 ... 2"),
        (dict(class_labels=-1), ValueError, "class_labels must lie in 0 ... 2"),
        (dict(class_labels="moon"), TypeError, "class_labels must be integers, got 'moon'"),
        (dict(class_labels=[0, None]), TypeError, "class_labels must be integers"),
        (dict(class_labels=1.0), TypeError, "class_labels must be a tensor of integers"),
        (dict(class_labels=True), TypeError, "class_labels must be a tensor of integers"),
        (dict(class_labels=[]), ValueError, "at least one label"),
        (dict(class_labels=[[0, 1]]), ValueError, "class_labels must have shape"),
        (dict(class_labels=[0, 1], num_images=3), ValueError, "one label or one for each of 3 images, got 2"),
        (dict(num_images=0), ValueError, "num_images must be at least 1, got 0"),
        (dict(num_images=2.0), TypeError, "num_images must be a whole number"),
        (dict(num_images=True), TypeError, "num_images must be a whole number"),
        (dict(temperature=0), ValueError, "^temperature must be 1e-06 or more.*do_sample=False"),
        (dict(temperature=1e-40), ValueError, "^temperature must be 1e-06 or more and finite, got 1e-40"),
        (dict(temperature=math.nan), ValueError, "^temperature must be 1e-06 or more"),
        (dict(temperature=math.inf), ValueError, "^temperature must be 1e-06 or more and finite"),
        (dict(temperature="hot"), TypeError, "^temperature must be a number"),
        (dict(position_temperature=-1.0), ValueError, "position_temperature must be 1e-06 or more"),
        (dict(top_k=0), ValueError, "^top_k must be at least 1, or None"),
        (dict(top_k=2.5), TypeError, "^top_k must be a whole number"),
        (dict(position_top_k=-1), ValueError, "position_top_k must be at least 1"),
        (dict(top_p=0), ValueError, r"^top_p must lie in \(0, 1\], got 0"),
        (dict(top_p=1.1), ValueError, r"^top_p must lie in \(0, 1\], got 1.1"),
        (dict(position_top_p=-0.1), ValueError, r"position_top_p must lie in \(0, 1\]"),
        (dict(do_sample=False, top_k=5), ValueError, "no effect with do_sample=False"),
        (dict(do_sample=False, position_temperature=0.5), ValueError, "no effect with do_sample=False"),
        (dict(guidance_scale=-1), ValueError, r"guidance_scale must lie in \[0, 1e\+06\], got -1"),
        (dict(guidance_scale=1e300), ValueError, r"guidance_scale must lie in \[0, 1e\+06\]"),
        (dict(guidance_scale=math.inf), ValueError, "guidance_scale must lie in"),
        (dict(guidance_scale="2"), TypeError, "guidance_scale must be a number"),
        (dict(fine_positions="loose"), ValueError, '"fixed" or "free", got \'loose\''),
        (dict(generator=7), TypeError, "generator must be a torch.Generator or a list of them"),
        (dict(generator=[seeded(), seeded()]), ValueError, "one or a list of 1, one for each image; got 2"),
        (dict(seed=7), TypeError, "seed"),
        (dict(lookahead=0), ValueError, "lookahead must be at least 1, got 0"),
        (dict(lookahead=2.0), TypeError, "lookahead must be a whole number"),
        (dict(lookahead=True), TypeError, "lookahead must be a whole number"),
        (dict(lookahead=2, compile_config=CompileConfig()), ValueError, "give one of the two"),
    ],
)
def test_generate_refuses(tiny_transformer_class, arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_transformer_class.generate(**({"class_labels": 0} | arguments))


def test_guidance_needs_a_model_that_knows_the_hidden_class(models):
    with pytest.raises(ValueError, match="class_dropout"):
        models["class"].generate(0, guidance_scale=2)
    with pytest.raises(ValueError, match="class_dropout"):
        models["unconditional"].generate(guidance_scale=2)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("contents", lambda contents: contents.float(), TypeError, "contents must be a tensor of integers"),
        ("contents", lambda contents: contents + 100, ValueError, "contents must lie in 0 ... 21"),
        ("positions", lambda positions: positions[:, 1:], ValueError, "positions must have shape"),
        ("positions", lambda positions: positions - 100, ValueError, "positions must lie in 0 ... 69"),
        ("lengths", lambda lengths: lengths[:1], ValueError, "lengths must have shape"),
        ("lengths", lambda lengths: lengths + 1000, ValueError, "lengths must lie in"),
        ("lengths", lambda lengths: lengths - 1, ValueError, "in turn"),
    ],
)
def test_unpack_refuses(tiny_transformer_class, argument, change, error, message):
    stream = tiny_transformer_class.pack(*toy_batch(tiny_transformer_class))
    arguments = {name: stream[name] for name in ("contents", "positions", "lengths")}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=message):
        tiny_transformer_class.unpack(**arguments)


def test_sampling_defaults_stand_for_arguments_that_are_not_given(tiny_transformer_class):
    def draw(**arguments):
        return tiny_transformer_class.generate([0, 1, 2], generator=seeded(), **arguments)

    neutral, explicit = draw(), draw(temperature=0.3, position_top_k=2)
    tiny_transformer_class.config.sampling_defaults = {"temperature": 0.3, "position_top_k": 2}
    try:
        assert torch.equal(draw().contents, explicit.contents)
        no_restriction = draw(temperature=1.0, top_k=10_000, top_p=1, position_top_k=10_000)
        greedy = draw(do_sample=False)  # nothing is drawn, so nothing is warped
    finally:
        tiny_transformer_class.config.sampling_defaults = {}
    assert not torch.equal(neutral.codes, explicit.codes)
    assert torch.equal(no_restriction.contents, neutral.contents)
    assert torch.equal(greedy.contents, draw(do_sample=False).contents)


# Log-probabilities


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_slow_version_and_of_no_choice_is_0(models, kind):
    model = models[kind]
    codes, grain_map, labels = toy_batch(model)
    with torch.no_grad():
        output = model.log_prob(codes, grain_map, labels)
    slow = SlowTransformer(model)
    for image, length in enumerate(output.stream.lengths.tolist()):
        positions, contents = slow.log_probs(elements_of(output.stream, image))
        torch.testing.assert_close(output.position_log_probs[image, :length].tolist(), positions, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.content_log_probs[image, :length].tolist(), contents, atol=1e-4, rtol=1e-4)
        assert not output.position_log_probs[image, length:].any()
        assert not output.content_log_probs[image, length:].any()


@pytest.mark.parametrize("kind", ["unconditional", "three granularities", "three granularities, region-first"])
def test_the_probabilities_of_all_grain_maps_add_up_to_1(kind):
    """Every stream in the training order has a probability, and nothing else has any."""
    kinds = KINDS[kind] | dict(codebook_size=1, num_classes=0)
    model = make_transformer(**({"grid_sizes": [[2, 2], [4, 4]]} | kinds)).double()
    rows, columns = model.config.grid_sizes[0]
    maps = torch.cartesian_prod(*[torch.arange(len(model.config.grid_sizes))] * (rows * columns))
    codes = torch.zeros(len(maps), *model.config.grid_sizes[-1], dtype=torch.long)
    with torch.no_grad():
        output = model.log_prob(codes, maps.view(-1, rows, columns))
    total = (output.position_log_probs + output.content_log_probs).sum(1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_log_probabilities_have_gradients_and_do_not_depend_on_the_batch(models):
    model = models["class"]
    codes, grain_map, labels = toy_batch(model)
    output = model.log_prob(codes, grain_map, labels)
    alone = model.log_prob(codes[2:3], grain_map[2:3], labels[2:3])
    length = int(alone.stream.lengths)
    torch.testing.assert_close(output.content_log_probs[2:3, :length], alone.content_log_probs)
    model.zero_grad()
    output.content_log_probs.sum().backward()
    assert model.content_head.projection.weight.grad.abs().sum() > 0
    model.zero_grad()


# Conditions


@torch.no_grad()
def test_replaying_a_stream_gives_it_back_whatever_the_model_would_say(models):
    model = models["class"]
    codes, grain_map, labels = toy_batch(model)
    stream, condition = model.pack(codes, grain_map, labels), model.condition(labels)
    state = StreamState(model.layout, condition.labels)
    *_, state = model.run_steps(state, condition, Replay(stream.positions, stream.contents))
    output = model.generation_output(state)
    assert torch.equal(output.codes, codes) and torch.equal(output.grain_map, grain_map)
    assert torch.equal(output.contents, stream.contents) and torch.equal(output.positions, stream.positions)


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"lookahead": 4}, {"guidance_scale": 2.0}])
@pytest.mark.parametrize("head", ["position_head", "content_head"])
def test_nothing_is_drawn_from_logits_that_are_not_finite(head, options):
    model = make_transformer(grid_sizes=[[2, 2], [4, 4]], num_classes=3, class_dropout=0.1)
    for parameter in getattr(model, head).parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(ValueError, match="logits are not finite.* load it with dtype=torch.bfloat16 or torch.float32"):
        model.generate([0, 2], generator=seeded(0), **options)


def test_threads_that_sample_from_a_model_in_training_mode_do_not_disturb_each_other():
    model = make_transformer(grid_sizes=[[2, 2], [4, 4]], residual_dropout=0.5)
    expected = model.generate(num_images=2, generator=seeded(0))
    model.train()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: model.generate(num_images=2, generator=seeded(0)), range(12)))
    for result in results:
        assert_same_images(result, expected)
    assert model.training and all(module.training for module in model.modules())


def test_whoever_stops_asking_for_steps_leaves_the_model_in_its_mode():
    model = make_transformer(grid_sizes=[[2, 2], [4, 4]], residual_dropout=0.5)
    expected = model.generate(generator=seeded(0))
    model.train()
    steps = model.generate_steps(generator=seeded(0))
    next(steps)
    assert model.training and all(module.training for module in model.modules())
    assert_same_images(model.generate(generator=seeded(0)), expected)
    model.eval()
    steps.close()
    assert not any(module.training for module in model.modules())


def test_a_mode_that_is_changed_while_another_samples_does_not_reach_its_images():
    model = make_transformer(residual_dropout=0.5).eval()
    with evaluation_mode(model):
        model.train()
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_codes_that_do_not_belong_to_the_grain_map_are_refused(models):
    model = models["unconditional"]
    codes, grain_map, _ = toy_batch(model)
    codes = codes.roll(1, 2)
    for door in (model, model.log_prob, model.pack):
        with pytest.raises(ValueError, match="codes differ within a cell of grain_map's granularity"):
            door(codes, grain_map)


def test_a_model_without_a_hidden_condition_has_no_twin(models):
    with pytest.raises(ValueError, match="class_dropout"):
        models["class"].condition([0, 1]).hidden()
    hidden = models["guidance"].condition([0, 1]).hide(torch.tensor([True, False]))
    assert hidden.labels.tolist() == [3, 1]
