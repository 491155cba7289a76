"""Routers, grain maps and the budget loss, against slow versions written from the method's description."""

import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.grain_map_dq import count_codes, expand_grain_map, rank_routing, top_left_cells
from dq_hf.modeling.routing_dq import (
    EntropyRouter,
    FeatureRouter,
    budget_loss,
    fineness,
    gate_values,
    image_entropy,
    one_hot_gate,
)

BINS = np.linspace(-1, 1, 32)
SHARES = st.floats(0, 1)


def slow_entropy(image, patch_size):
    """Entropies of one image (3, H, W), patch by patch, in float64."""
    image = np.asarray(image, dtype=np.float64)
    grey = 0.2989 * image[0] + 0.5870 * image[1] + 0.1140 * image[2]
    rows, columns = grey.shape[0] // patch_size, grey.shape[1] // patch_size
    entropies = np.zeros((rows, columns))
    for row, column in np.ndindex(rows, columns):
        patch = grey[row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
        density = np.array([np.mean(np.exp(-(((patch - value) / 0.01) ** 2) / 2)) for value in BINS])
        density = density / (density.sum() + 1e-40) + 1e-40
        entropies[row, column] = -(density * np.log(density)).sum()
    return entropies


def grey_image(values):
    """An image (1, 3, H, W) whose grey value, with weights of sum 0.9999, is `values` (H, W)."""
    return torch.as_tensor(np.asarray(values, dtype=np.float32) / 0.9999).expand(1, 3, -1, -1)


def make_images(height, width, seed=0):
    """One image of colour noise, one smooth, one half plain."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    smooth = torch.linspace(-1, 1, width).expand(3, height, width)
    plain = noise.clone()
    plain[:, : height // 2] = 0.3
    return torch.stack([noise, smooth, plain])


@pytest.mark.parametrize(("patch_size", "height", "width"), [(4, 8, 8), (8, 16, 32), (16, 48, 16)])
def test_entropy_agrees_with_a_slow_version(patch_size, height, width):
    images = make_images(height, width)
    expected = np.stack([slow_entropy(image, patch_size) for image in images])
    np.testing.assert_allclose(image_entropy(images, patch_size).numpy(), expected, atol=1e-4)


def test_entropy_of_plain_patches_is_between_0_on_a_bin_and_ln_2_halfway():
    on_bin = image_entropy(grey_image(np.full((8, 8), BINS[20])), 8)
    halfway = image_entropy(grey_image(np.full((8, 8), (BINS[20] + BINS[21]) / 2)), 8)
    assert on_bin.item() == pytest.approx(0, abs=1e-5)
    assert halfway.item() == pytest.approx(math.log(2), abs=1e-4)


def test_entropy_of_uniform_noise_is_near_ln_32():
    noise = np.random.default_rng(0).uniform(-1, 1, size=(128, 128))
    assert math.log(32) - 0.05 < image_entropy(grey_image(noise), 128).item() <= math.log(32)


def test_entropy_is_the_same_however_little_is_computed_at_once():
    images = make_images(16, 16)
    assert torch.equal(image_entropy(images, 4, pixels_at_once=1), image_entropy(images, 4))


def test_entropy_is_finite_where_the_processor_has_no_denormal_numbers():
    torch.set_flush_denormal(True)
    try:
        assert torch.isfinite(image_entropy(make_images(16, 16), 4)).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.3, 2.0], [0.3, 0.3, 2.0]])
def test_entropy_router_goes_one_step_finer_for_each_threshold_exceeded(thresholds):
    num_granularities = len(thresholds) + 1
    factors = [2**g for g in range(num_granularities)][::-1]
    config = DQVAEConfig(
        image_size=32,
        granularities=factors,
        block_out_channels=[32] * num_granularities,
        router="entropy",
        entropy_thresholds=thresholds,
    )
    images = make_images(32, 16)
    entropy, grain_map = EntropyRouter(config)(images)
    slow = np.stack([slow_entropy(image, factors[0]) for image in images])
    assert min([1, *(np.abs(slow - threshold).min() for threshold in thresholds)]) > 1e-4  # no close call
    expected = sum(((slow > threshold).astype(int) for threshold in thresholds), np.zeros(slow.shape, int))
    assert np.array_equal(grain_map.numpy(), expected)
    np.testing.assert_allclose(entropy.numpy(), slow, atol=1e-4)


def test_entropy_equal_to_the_threshold_stays_coarse_and_thresholds_may_change():
    config = DQVAEConfig(granularities=[16, 8])
    router, images = EntropyRouter(config), make_images(16, 16)[:1]
    config.entropy_thresholds = [router(images)[0].item()]
    assert router(images)[1].item() == 0
    config.entropy_thresholds = [0.0]
    assert router(images)[1].item() == 1


def feature_router(num_granularities, **changes):
    factors = [2**g for g in range(num_granularities)][::-1]
    widths = [32] * num_granularities
    sizes = dict(image_size=32, granularities=factors, block_out_channels=widths, router="feature", z_channels=6)
    torch.manual_seed(0)
    return FeatureRouter(DQVAEConfig(**(sizes | {"router_norm_num_groups": None} | changes)))


def make_features(num_granularities, rows=2, columns=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, rows * 2**g, columns * 2**g, generator=generator) for g in range(num_granularities)]


@pytest.mark.parametrize("num_granularities", [1, 2, 3])
def test_feature_router_is_a_linear_gate_on_pooled_features_coarsest_first(num_granularities):
    router = feature_router(num_granularities, router_activation=None)
    features = make_features(num_granularities)
    logits = router(features).detach().numpy()
    weight, bias = router.gate.weight.detach().double().numpy(), router.gate.bias.detach().double().numpy()
    assert logits.shape == (2, num_granularities, 2, 3)
    for image, row, column in np.ndindex(2, 2, 3):
        pooled = []
        for granularity, feature in enumerate(features):
            side = 2**granularity
            cells = feature[image, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            pooled.append(cells.double().numpy().mean(axis=(1, 2)))
        expected = weight @ np.concatenate(pooled) + bias
        np.testing.assert_allclose(logits[image, :, row, column], expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_feature_router_with_norm_and_two_layers(activation):
    router = feature_router(2, router_norm_num_groups=3, router_activation=activation)
    features = make_features(2)
    pooled = []
    for granularity, feature in enumerate(features):
        groups = feature.double().view(2, 3, -1)  # three groups of two channels
        normal = (groups - groups.mean(-1, keepdim=True)) / (
            groups.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        side = 2**granularity
        pooled.append(normal.view(2, 6, 2, side, 3, side).mean(dim=(3, 5)))
    hidden = torch.cat(pooled, dim=1).permute(0, 2, 3, 1)  # (B, h, w, 2C)
    first, _, second = router.gate.double()
    hidden = hidden @ first.weight.T + first.bias
    hidden = hidden * torch.sigmoid(hidden) if activation == "silu" else hidden.clamp(min=0)
    expected = (hidden @ second.weight.T + second.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(router.float()(features), expected.float(), atol=1e-5, rtol=0)


def test_gates_are_the_argmax_in_evaluation():
    logits = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.0, 3.0]]).view(2, 3, 1, 1)
    assert gate_values(logits, training=False).flatten(1).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_gates_are_one_hot_with_gradient_in_training():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    gates = gate_values(logits, training=True)
    torch.testing.assert_close(gates.sort(1).values[:, :2], torch.zeros(2, 2, 4, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(gates.amax(1), torch.ones(2, 4, 4), atol=1e-6, rtol=0)
    (gates * torch.randn(2, 3, 4, 4)).sum().backward()
    assert (logits.grad != 0).all()


def test_gates_are_drawn_in_training_as_often_as_the_softmax_says():
    torch.manual_seed(0)
    logits, draws = np.array([0.0, 1.0, -0.5]), 40_000
    gates = gate_values(torch.tensor(logits).view(1, 3, 1, 1).expand(1, 3, 200, 200), training=True)
    frequencies = gates.mean(dim=(0, 2, 3)).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum()
    deviations = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) < 4 * deviations).all()


def test_budget_loss_of_two_granularities_is_the_written_formula():
    gates = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    p = gates.double().numpy()
    regions, cells = 4 * 5, 8 * 10
    ratio = ((p[:, 0] + 4 * p[:, 1]).sum() / 3 - regions) / (cells - regions)
    expected = 10 * (ratio - 0.3) ** 2
    assert budget_loss(gates, [0.3], 10.0).item() == pytest.approx(expected, rel=1e-4)


def test_budget_loss_of_three_granularities_is_the_written_formula():
    gates = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    p = gates.double().numpy()
    regions = 4 * 5
    median = ((p[:, 0] + 4 * p[:, 1] + p[:, 2]).sum() / 3 - regions) / (4 * regions - regions)
    fine = ((p[:, 0] + p[:, 1] + 16 * p[:, 2]).sum() / 3 - regions) / (16 * regions - regions)
    expected = 7 * (fine - 0.2) ** 2 + (median - 0.5) ** 2
    assert budget_loss(gates, [0.5, 0.2], 7.0).item() == pytest.approx(expected, rel=1e-4)


def test_budget_loss_is_0_at_the_wanted_shares_and_for_one_granularity():
    grain_map = torch.tensor([[[0, 1], [2, 2]]])
    assert budget_loss(one_hot_gate(grain_map, 3), [0.25, 0.5], 10.0).item() == pytest.approx(0, abs=1e-12)
    assert budget_loss(torch.ones(2, 1, 3, 3), [], 10.0).item() == 0


def joint_gates():
    """Of two images: the first has no fine region, the second only such."""
    return one_hot_gate(torch.tensor([[[0, 0]], [[1, 1]]]), 2).requires_grad_()


def run_process(rank, folder):
    """Budget loss and its gradient where each of two processes has one of the images."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    gates = joint_gates()
    losses = [budget_loss(gates[rank : rank + 1], [target], 10.0, all_processes=True) for target in (0.5, 0.3)]
    losses[1].backward()
    torch.save((torch.stack(losses).detach(), gates.grad), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_the_budget_is_that_of_the_images_of_all_processes(tmp_path):
    # Forked, because new processes would take seconds to import everything.
    mp.start_processes(run_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    losses, gradients = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)))
    gates = joint_gates()
    budget_loss(gates, [0.3], 10.0).backward()
    assert gates.grad.abs().max() > 0.1
    torch.testing.assert_close(torch.stack(gradients).mean(0), gates.grad)  # as data-parallel training averages them
    for both in losses:
        torch.testing.assert_close(both, torch.tensor([0.0, 10 * (0.5 - 0.3) ** 2]))


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


@pytest.mark.parametrize("num_granularities", [2, 3, 4])
def test_fineness_is_the_sum_of_the_log_odds_of_finer_granularities(num_granularities):
    logits = torch.randn(2, num_granularities, 3, 3, generator=torch.Generator().manual_seed(0))
    odds = np.exp(logits.double().numpy())
    expected = sum(np.log(odds[:, g:].sum(1) / odds[:, :g].sum(1)) for g in range(1, num_granularities))
    np.testing.assert_allclose(fineness(logits).numpy(), expected, atol=1e-5)


def test_fineness_still_ranks_where_probabilities_round_to_one():
    logits = torch.tensor([[0.0, 0.0, 0.0], [30.0, 60.0, 45.0]]).view(1, 2, 1, 3)
    assert fineness(logits).flatten().tolist() == [30, 60, 45]


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
