"""Grain maps: ranking, expanding, counting, gates, and which shares can be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dq_hf.modeling.grain_map_dq import (
    check_shares,
    count_codes,
    expand_grain_map,
    one_hot_gates,
    rank_routing,
    refinement_shares,
    top_left_cells,
)

SHARES = st.floats(0, 1)
scores = arrays(np.float32, (2, 3, 5), elements=st.floats(-100, 100, width=32))


@given(scores, SHARES)
def test_ranking_makes_exactly_the_wanted_share_fine_where_the_score_is_highest(score, share):
    grain_map = rank_routing(torch.from_numpy(score), [share]).numpy()
    for image, chosen in zip(score, grain_map):
        assert abs(chosen.sum() - share * 15) <= 0.5 + 1e-9  # no other whole number is nearer
        if 0 < chosen.sum() < 15:
            assert image[chosen == 1].min() >= image[chosen == 0].max()


@given(scores, SHARES, SHARES)
def test_ranking_keeps_fine_regions_fine_when_the_share_grows(score, one, other):
    less, more = (rank_routing(torch.from_numpy(score), [share]) for share in sorted([one, other]))
    assert (more >= less).all()


@given(scores, st.lists(SHARES, min_size=2, max_size=3))
def test_ranking_gives_the_finest_granularity_the_highest_scores(score, parts):
    shares = [part / max(1, sum(parts)) for part in parts]
    grain_map = rank_routing(torch.from_numpy(score), shares).numpy()
    for image, chosen in zip(score, grain_map):
        for granularity in range(1, len(shares) + 1):
            wanted = sum(shares[granularity - 1 :]) * 15
            assert abs((chosen >= granularity).sum() - wanted) <= 0.5 + 1e-6
        order = np.argsort(-image.flatten(), kind="stable")
        assert (np.diff(chosen.flatten()[order]) <= 0).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 8), (1.0, 15)])
def test_ranking_breaks_ties_in_raster_order(share, expected):
    grain_map = rank_routing(torch.zeros(1, 3, 5), [share]).flatten()
    assert grain_map.tolist() == [1] * expected + [0] * (15 - expected)


def test_ranking_of_one_granularity_is_all_coarse():
    assert rank_routing(torch.zeros(1, 3, 5), []).tolist() == [[[0] * 5] * 3]


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ("half", TypeError, "name must be a number .* got 'half'"),
        ([0.1, True], TypeError, "name must be a number"),
        (None, TypeError, "got None"),
        ([0.5], ValueError, r"name needs 2 share\(s\), one for each granularity but the coarsest; got \[0.5\]"),
        ([0.5, float("nan")], ValueError, r"name must lie in \[0, 1\]"),
        ([-0.1, 0.5], ValueError, r"name must lie in \[0, 1\]"),
        ([0.6, 0.5], ValueError, "a sum of at most 1"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares, error, message):
    with pytest.raises(error, match=message):
        check_shares("name", shares, num_granularities=3)


def test_a_chance_of_every_refinement_goes_from_all_coarse_to_all_fine():
    assert refinement_shares(0.3, 2) == [0.3] and refinement_shares(0.5, 1) == []
    assert refinement_shares(0, 3) == [0, 0] and refinement_shares(1, 3) == [0, 1]
    assert refinement_shares(0.25, 3) == pytest.approx([2 * 0.25 * 0.75, 0.0625])


def test_shares_are_a_list_and_one_number_is_a_list_of_one():
    assert check_shares("name", 0.3, 2) == [0.3] and check_shares("name", (0.25, 0.75), 3) == [0.25, 0.75]
    assert check_shares("name", [], 1) == [] and check_shares("name", [1 / 3 + 1e-10] * 3, 4)


@st.composite
def grain_maps(draw):
    """(number of granularities, grain map (2, h, w))."""
    num_granularities, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    elements = st.integers(0, num_granularities - 1)
    return num_granularities, draw(arrays(np.int64, (2, rows, columns), elements=elements))


@given(grain_maps())
def test_grain_maps_on_the_fine_grid(case):
    num_granularities, grain_map = case
    region = 2 ** (num_granularities - 1)  # cells of the fine grid
    _, rows, columns = grain_map.shape
    width = columns * region
    fine = expand_grain_map(torch.from_numpy(grain_map), num_granularities)
    corners = top_left_cells(fine, num_granularities)
    gates = one_hot_gates(torch.from_numpy(grain_map), num_granularities)
    assert gates.sum(1).eq(1).all() and gates.argmax(1).equal(torch.from_numpy(grain_map))
    assert fine.shape == corners.shape == (2, rows * region, width)
    distinct = [set(), set()]
    for image, row, column in np.ndindex(*fine.shape):
        granularity = grain_map[image, row // region, column // region]
        side = region // 2**granularity  # of a code
        corner = row // side * side * width + column // side * side
        assert fine[image, row, column] == granularity
        assert corners[image, row, column] == corner
        distinct[image].add(corner)
    assert count_codes(torch.from_numpy(grain_map)).tolist() == [len(corners) for corners in distinct]
