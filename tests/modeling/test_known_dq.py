"""Sampling where something is known: it comes back bit for bit, and with many candidates the rest follows the exact conditional."""

import itertools
import math

import pytest
import torch
from conftest import make_transformer, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_hf.modeling.generation_dq import Draw, own_generators, uniform_numbers
from dq_hf.modeling.grain_map_dq import expand_grain_map, share_counts, top_left_cells
from dq_hf.modeling.known_dq import KnownState, known_elements
from dq_hf.modeling.sampling_options_dq import SamplingOptions

NUM_CODES = 16
KINDS = {
    "row-first": dict(grid_sizes=[[2, 3], [4, 6]]),
    "region-first": dict(grid_sizes=[[2, 3], [4, 6]], fine_order="region-first"),
    "three granularities": dict(grid_sizes=[[2, 2], [4, 4], [8, 8]]),
    "three granularities, region-first": dict(grid_sizes=[[2, 2], [4, 4], [8, 8]], fine_order="region-first"),
    "one granularity": dict(grid_sizes=[[3, 4]]),
}
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def models():
    return {name: make_transformer(**kind) for name, kind in KINDS.items()}


def random_images(config, batch, seed):
    """Codes and grain maps of images as a tokenizer could give them."""
    generator, num_granularities = seeded(seed), len(config.grid_sizes)
    grain_map = torch.randint(num_granularities, (batch, *config.grid_sizes[0]), generator=generator)
    codes = torch.randint(config.codebook_size, (batch, *config.grid_sizes[-1]), generator=generator)
    cells = top_left_cells(expand_grain_map(grain_map, num_granularities), num_granularities)
    return codes.flatten(1).gather(1, cells.flatten(1)).view_as(codes), grain_map


def hide(config, codes, grain_map, unknown):
    """The same with -1 in the regions (B, h, w) that are not known."""
    cells = expand_grain_map(unknown, len(config.grid_sizes))
    return codes.masked_fill(cells, -1), grain_map.masked_fill(unknown, -1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(seed=SEEDS, share=st.floats(0, 1), greedy=st.booleans(), fine_positions=st.sampled_from(["fixed", "free"]))
def test_known_regions_come_back_bit_for_bit(models, kind, seed, share, greedy, fine_positions):
    model = models[kind]
    codes, grain_map = random_images(model.config, 3, seed)
    unknown = torch.rand(grain_map.shape, generator=seeded(seed)) < share
    known = hide(model.config, codes, grain_map, unknown)
    options = dict(do_sample=False) if greedy else dict(generator=seeded(seed))
    drawn = model.generate(codes=known[0], grain_map=known[1], fine_positions=fine_positions, **options)
    assert torch.equal(drawn.grain_map[~unknown], grain_map[~unknown])
    same = expand_grain_map(~unknown, len(model.config.grid_sizes))
    assert torch.equal(drawn.codes[same], codes[same])
    unpacked = model.unpack(drawn.contents, drawn.positions, drawn.lengths)
    assert torch.equal(unpacked[0], drawn.codes) and torch.equal(unpacked[1], drawn.grain_map)
    if fine_positions == "fixed" and not unknown.flatten(1).all(1).any():  # in the training order
        assert torch.equal(model.pack(*unpacked).positions, drawn.positions)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(seed=SEEDS)
def test_a_prescribed_grain_map_is_that_of_the_image(models, kind, seed):
    model = models[kind]
    _, grain_map = random_images(model.config, 3, seed)
    drawn = model.generate(grain_map=grain_map, generator=seeded(seed))
    assert torch.equal(drawn.grain_map, grain_map)
    one_for_all = model.generate(grain_map=grain_map[0], num_images=2, generator=seeded(seed))
    assert torch.equal(one_for_all.grain_map, grain_map[:1].expand(2, -1, -1))
    assert torch.equal(one_for_all.codes[0], drawn.codes[0])


@pytest.mark.parametrize("kind", KINDS)
def test_states_on_the_way_are_whole_also_with_candidates(models, kind):
    model = models[kind]
    _, grain_map = random_images(model.config, 2, 0)
    for state in model.generate_steps(grain_map=grain_map, num_candidates=3, generator=seeded(0)):
        assert len(state.allowed_positions()) == len(state.known) == len(state.codes) == 2
    assert torch.equal(state.grids()[1], state.known.grain_map.view_as(grain_map))


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "one granularity"])
@settings(max_examples=6)
@given(seed=SEEDS, share=st.floats(0, 1), known_share=st.floats(0, 1), greedy=st.booleans())
def test_the_share_of_fine_regions_is_exact_also_where_regions_are_known(
    models, kind, seed, share, known_share, greedy
):
    model = models[kind]
    num_granularities, num_regions = len(model.config.grid_sizes), math.prod(model.config.grid_sizes[0])
    shares = [share] if num_granularities == 2 else [share * (seed % 7) / 7, share * (7 - seed % 7) / 7]
    counts = share_counts(shares, num_regions)
    assert sum(counts) == num_regions
    maps = [granularity for granularity, count in enumerate(counts) for _ in range(count)]
    orders = [torch.randperm(num_regions, generator=seeded(seed + i)) for i in range(3)]
    grain_map = torch.stack([torch.tensor(maps)[order] for order in orders]).view(3, *model.config.grid_sizes[0])
    unknown = torch.rand(grain_map.shape, generator=seeded(seed)) >= known_share
    options = dict(do_sample=False) if greedy else dict(generator=seeded(seed))
    drawn = model.generate(grain_map=grain_map.masked_fill(unknown, -1), fine_ratio=shares, **options)
    assert torch.equal(drawn.grain_map[~unknown], grain_map[~unknown])
    found = torch.stack(
        [(drawn.grain_map == granularity).flatten(1).sum(1) for granularity in range(num_granularities)]
    )
    assert found.T.tolist() == [counts] * 3


@pytest.mark.parametrize("num_candidates", [1, 3])
@pytest.mark.parametrize("kind", ["row-first", "three granularities, region-first"])
def test_a_seed_is_an_image_whatever_is_known_of_its_neighbours(models, kind, num_candidates):
    model = models[kind]
    codes, grain_map = random_images(model.config, 4, 5)
    unknown = torch.rand(grain_map.shape, generator=seeded(6)) < 0.5
    unknown[1] = True
    codes, grain_map = hide(model.config, codes, grain_map, unknown)
    codes[2] = -1  # the map alone

    def generate(rows):
        return model.generate(
            codes=codes[rows],
            grain_map=grain_map[rows],
            generator=[seeded(row) for row in rows],
            num_candidates=num_candidates,
        )

    batch = generate([0, 1, 2, 3, 3])
    for i, row in enumerate([0, 1, 2, 3, 3]):
        alone = generate([row])
        assert torch.equal(alone.codes[0], batch.codes[i]) and torch.equal(alone.grain_map[0], batch.grain_map[i])
        assert int(alone.lengths) == int(batch.lengths[i]) == alone.contents.shape[1]
    assert torch.equal(batch.codes[1], model.generate(generator=seeded(1)).codes[0])  # of which nothing is known


def test_one_candidate_is_the_first_of_several_and_states_on_the_way_show_it(models):
    model = models["row-first"]
    codes, grain_map = random_images(model.config, 2, 1)
    unknown = torch.tensor([[True, True, False], [False, True, True]]).expand(2, -1, -1)
    options = dict(zip(("codes", "grain_map"), hide(model.config, codes, grain_map, unknown)))
    first = model.generate(generator=seeded(3), **options)
    *_, before, kept = model.generate_steps(generator=seeded(3), num_candidates=5, **options)
    assert torch.equal(before.grids()[0], first.codes) and kept.grids()[0].shape == first.codes.shape
    drawn = {str(model.generate(generator=seeded(seed), num_candidates=5, **options).codes) for seed in range(3)}
    assert len(drawn) == 3


def distance(exact, outcomes, weights):
    """Total variation between a distribution {outcome: probability} and weighted samples."""
    found = dict.fromkeys(exact, 0.0)
    for outcome, weight in zip(outcomes, weights):
        found[outcome] += weight
    return sum(abs(share - found[outcome]) for outcome, share in exact.items()) / 2


def normalised(log_probs):
    """Shares of the probabilities that belong to (N,) logarithms."""
    return (log_probs.double() - log_probs.double().logsumexp(0)).exp().tolist()


def assert_weights_give(exact, model, outcome_of, **known):
    """Candidates of one image, by their weights, follow the distribution {outcome: probability}; without them not."""
    num_candidates, longest = 2000, model.config.longest_stream
    condition = model.condition(batch=num_candidates)
    state = KnownState(
        model.layout, condition.labels, known_elements(model.config, "cpu", **known).rows(1, num_candidates)
    )
    uniforms = uniform_numbers(own_generators(seeded(0), 1), longest, num_candidates)
    *_, state = model.run_steps(state, condition, Draw(uniforms, SamplingOptions()))
    weights = normalised(model.log_weights(state, condition))
    outcomes = outcome_of(*state.grids())
    assert distance(exact, outcomes, weights) < 0.05
    assert distance(exact, outcomes, [1 / num_candidates] * num_candidates) > 0.07
    # The one that is kept lies where a number behind those of all candidates falls among the weights.
    stream = seeded(int(torch.randint(2**63 - 1, (), generator=seeded(0))))
    uniform = torch.rand(num_candidates * 2 * longest + 1, dtype=torch.float64, generator=stream)[-1]
    number = next(i for i, total in enumerate(itertools.accumulate(weights)) if total > uniform)
    kept = model.generate(generator=seeded(0), num_candidates=num_candidates, **known)
    assert outcome_of(kept.codes, kept.grain_map) == [outcomes[number]]


@torch.no_grad()
@pytest.mark.parametrize(("region", "code"), [(0, [[1, 1], [0, 0]]), (1, [[1, 0], [0, 1]])])
def test_weighted_candidates_follow_the_exact_conditional(region, code):
    """Two regions, one known: all 2 + 16 possibilities of the other, by the probability of the whole stream."""
    model = make_transformer(grid_sizes=[[1, 2], [2, 4]], codebook_size=2)
    images = [(0, (code,) * 4) for code in range(2)] + [(1, code) for code in itertools.product(range(2), repeat=4)]
    codes = torch.zeros(len(images), 2, 4, dtype=torch.long)
    grain_map = torch.ones(len(images), 1, 2, dtype=torch.long)
    here, there = (slice(2 * each, 2 * each + 2) for each in (region, 1 - region))
    codes[..., there] = torch.tensor(code)
    for i, (granularity, each) in enumerate(images):
        grain_map[i, 0, region] = granularity
        codes[i, :, here] = torch.tensor(each).view(2, 2)
    exact = dict(zip(images, normalised(-model.log_prob(codes, grain_map).nats)))

    def outcome_of(codes, grain_map):
        return list(zip(grain_map[:, 0, region].tolist(), map(tuple, codes[:, :, here].flatten(1).tolist())))

    known = hide(model.config, codes[:1], grain_map[:1], torch.arange(2).view(1, 1, 2) == region)
    assert_weights_give(exact, model, outcome_of, codes=known[0], grain_map=known[1])


@torch.no_grad()
@pytest.mark.parametrize(("grids", "shares"), [([[2, 2], [4, 4]], [0.5]), ([[1, 3], [2, 6], [4, 12]], [1 / 3, 1 / 3])])
def test_weighted_candidates_of_a_share_follow_the_exact_conditional(grids, shares):
    """One code, so that a stream is its grain map: all maps of the share, by the probability of the stream."""
    model = make_transformer(grid_sizes=grids, codebook_size=1)
    counts = share_counts(shares, math.prod(grids[0]))
    regions = [granularity for granularity, count in enumerate(counts) for _ in range(count)]
    maps = sorted(set(itertools.permutations(regions)))
    grain_maps = torch.tensor(maps).view(-1, *grids[0])
    nats = model.log_prob(torch.zeros(len(maps), *grids[-1], dtype=torch.long), grain_maps).nats
    exact = dict(zip(maps, normalised(-nats)))

    def outcome_of(codes, grain_map):
        return list(map(tuple, grain_map.flatten(1).tolist()))

    assert_weights_give(exact, model, outcome_of, fine_ratio=shares)


def first(change):
    """Options with the codes and the grain map of one image changed."""
    codes, grain_map = torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long)
    return change(codes, grain_map)


def differing(codes, grain_map):
    codes[0, 1, 1] = 3
    return dict(codes=codes, grain_map=grain_map)


def test_grain_maps_are_arrays_of_any_strides_lists_or_tensors(models):
    grain_map = torch.randint(2, (2, 3), generator=seeded(0)).numpy()
    kinds = [
        grain_map[::-1, ::-1].copy()[::-1, ::-1],
        grain_map.T.copy().T,
        grain_map.tolist(),
        torch.tensor(grain_map),
    ]
    for kind in kinds:
        assert models["row-first"].generate(grain_map=kind).grain_map[0].tolist() == grain_map.tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (lambda codes, grain_map: dict(codes=codes), ValueError, "give grain_map, too"),
        (lambda codes, grain_map: dict(grain_map=grain_map[:, 1:]), ValueError, "grain_map must have shape"),
        (lambda codes, grain_map: dict(grain_map=grain_map[:0]), ValueError, "at least one map"),
        (
            lambda codes, grain_map: dict(grain_map=grain_map.float()),
            TypeError,
            "grain_map must be a tensor of integers",
        ),
        (lambda codes, grain_map: dict(grain_map=[[0]]), ValueError, "grain_map must have shape"),
        (lambda codes, grain_map: dict(grain_map=[[0], []]), TypeError, "grain_map must be integers"),
        (lambda codes, grain_map: dict(grain_map="fine"), TypeError, "grain_map must be integers"),
        (lambda codes, grain_map: dict(grain_map=grain_map + 2), ValueError, r"grain_map must lie in -1 ... 1"),
        (lambda codes, grain_map: dict(grain_map=grain_map - 2), ValueError, r"grain_map must lie in -1 ... 1"),
        (
            lambda codes, grain_map: dict(codes=codes + 16, grain_map=grain_map),
            ValueError,
            "codes must lie in -1 ... 15",
        ),
        (lambda codes, grain_map: dict(codes=codes, grain_map=grain_map - 1), ValueError, "grain_map is -1 where"),
        (differing, ValueError, "codes differ within a cell"),
        (
            lambda codes, grain_map: dict(codes=codes.repeat(2, 1, 1), grain_map=grain_map),
            ValueError,
            "of each of 1 grain maps, got 2",
        ),
        (
            lambda codes, grain_map: dict(grain_map=grain_map.repeat(3, 1, 1), num_images=2),
            ValueError,
            "one for each of 2 images, got 3",
        ),
        (
            lambda codes, grain_map: dict(grain_map=grain_map + 1, fine_ratio=0.5),
            ValueError,
            "means 8 of 16 regions of granularity 1, but grain_map, or what stays of the image, has 16",
        ),
        (lambda codes, grain_map: dict(fine_ratio=1.5), ValueError, r"fine_ratio must lie in \[0, 1\]"),
        (lambda codes, grain_map: dict(fine_ratio=[0.5, 0.1]), ValueError, "needs 1 share"),
        (lambda codes, grain_map: dict(fine_ratio="half"), TypeError, "fine_ratio must be a number"),
        (lambda codes, grain_map: dict(num_candidates=2), ValueError, "something that is known"),
        (
            lambda codes, grain_map: dict(fine_ratio=0.5, num_candidates=0),
            ValueError,
            "num_candidates must be at least 1",
        ),
        (lambda codes, grain_map: dict(fine_ratio=0.5, num_candidates=2.0), TypeError, "must be a whole number"),
        (
            lambda codes, grain_map: dict(fine_ratio=0.5, num_candidates=2, do_sample=False),
            ValueError,
            "needs do_sample",
        ),
    ],
)
def test_generate_refuses(tiny_transformer, options, error, message):
    with pytest.raises(error, match=message):
        tiny_transformer.generate(**first(options))
