"""Routers and the budget loss, against slow versions written from the method's description."""

import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.grain_map_dq import one_hot_gates, rank_routing
from dq_hf.modeling.routing_dq import ROUTERS, budget_loss, fineness, image_entropy, mix_features

BINS = np.linspace(-1, 1, 32)


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


def make_router(kind, num_granularities=2, **changes):
    """A router in evaluation mode; of regions of 2^(K-1) pixels a side, so that features may lie on the same grids."""
    factors = [2**g for g in range(num_granularities)][::-1]
    sizes = dict(image_size=32, granularities=factors, block_out_channels=[32] * num_granularities, z_channels=6)
    torch.manual_seed(0)
    config = DQVAEConfig(**(sizes | {"router": kind, "router_norm_num_groups": None} | changes))
    return ROUTERS[kind](config).eval()


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.3, 2.0], [0.3, 0.3, 2.0]])
def test_entropy_router_goes_one_step_finer_for_each_threshold_exceeded(thresholds):
    images = make_images(32, 16)
    num_granularities = len(thresholds) + 1
    routed = make_router("entropy", num_granularities, entropy_thresholds=thresholds)(images, None)
    slow = np.stack([slow_entropy(image, 2 ** len(thresholds)) for image in images])
    assert min([1, *(np.abs(slow - threshold).min() for threshold in thresholds)]) > 1e-4  # no close call
    expected = sum(((slow > threshold).astype(int) for threshold in thresholds), np.zeros(slow.shape, int))
    assert np.array_equal(routed.grain_map.numpy(), expected)
    assert torch.equal(routed.gates, one_hot_gates(routed.grain_map, num_granularities))
    assert routed.score is routed.entropy and routed.loss is None and routed.router_logits is None
    np.testing.assert_allclose(routed.entropy.numpy(), slow, atol=1e-4)


def test_a_score_equal_to_the_threshold_stays_coarse():
    router, images = make_router("entropy"), make_images(2, 2)[:1]
    for threshold, granularity in ((router(images, None).entropy.item(), 0), (0.0, 1)):
        router.set_thresholds([threshold])
        assert router(images, None).grain_map.item() == granularity


@pytest.mark.parametrize("thresholds", [[], [0.1, 0.2], [math.nan], [math.inf]])
def test_thresholds_that_cannot_be_are_refused(thresholds):
    router = make_router("entropy", entropy_thresholds=[0.5])
    with pytest.raises(ValueError, match=r"thresholds must be 1 finite ascending number\(s\)"):
        router.set_thresholds(thresholds)
    assert router.thresholds.tolist() == [0.5]


@pytest.mark.parametrize("kind", ROUTERS)
def test_thresholds_stay_exact_when_a_router_is_cast(kind):
    router = make_router(kind)
    router.set_thresholds([0.123456789])
    for cast in (router.bfloat16(), router.half(), router.to(torch.float64)):
        assert cast.thresholds.dtype == torch.float32 and cast.thresholds.item() == np.float32(0.123456789)
    assert all(parameter.dtype == torch.float64 for parameter in router.parameters())


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_choice_that_is_prescribed_is_taken_by_every_router(kind):
    router, images, features = make_router(kind, 3).train(), make_images(8, 12)[:2], make_features(3)
    grain_map = torch.tensor([[[0, 1, 2], [2, 2, 0]]] * 2)
    routed = router(images, features, grain_map=grain_map)
    assert torch.equal(routed.grain_map, grain_map) and torch.equal(routed.gates, one_hot_gates(grain_map, 3))
    ranked = router(images, features, shares=[1 / 3, 1 / 2])
    assert torch.equal(ranked.grain_map, rank_routing(ranked.score, [1 / 3, 1 / 2]))
    assert routed.loss is ranked.loss is None and not ranked.gates.requires_grad


def test_the_control_is_uniform_and_the_same_for_an_image_whatever_the_batch():
    images = make_images(64, 64)
    router = make_router("random", budget_targets=[0.3])
    score = router(images, None).score
    assert torch.equal(router(images.flip(0), None).score.flip(0), score)
    assert torch.equal(torch.cat([router(image[None], None).score for image in images]), score)
    assert router(images, None).grain_map.float().mean().item() == pytest.approx(0.3, abs=0.03)  # of 3,072 regions
    values = np.sort(score.numpy(), axis=None)
    assert 0 <= values[0] and values[-1] < 1
    assert np.abs(values - np.linspace(0, 1, len(values))).max() < 1.63 / math.sqrt(len(values))  # Kolmogorov, 1 %
    changed = images.clone()
    changed[0, 2, 63, 63] += 1e-3
    first, second = score[0].flatten(), router(changed, None).score[0].flatten()
    for one, other in ((first, second), (first, score[2].flatten()), (first[:-1], first[1:])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.13  # four deviations, of 1,024 regions


def test_the_control_is_drawn_anew_in_training_by_the_seed():
    router, images = make_router("random", 3, budget_targets=[0.5, 0.2]).train(), make_images(128, 128)
    torch.manual_seed(1)
    first, second = router(images, None), router(images, None)
    torch.manual_seed(1)
    assert torch.equal(router(images, None).score, first.score) and not torch.equal(first.score, second.score)
    shares = one_hot_gates(first.grain_map, 3).mean((0, 2, 3)).tolist()
    assert shares == pytest.approx([0.3, 0.5, 0.2], abs=0.04)  # of 3,072 regions


def make_features(num_granularities, rows=2, columns=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, rows * 2**g, columns * 2**g, generator=generator) for g in range(num_granularities)]


@pytest.mark.parametrize("num_granularities", [1, 2, 3])
def test_feature_router_is_a_linear_gate_on_pooled_features_coarsest_first(num_granularities):
    router = make_router("feature", num_granularities, router_activation=None)
    features = make_features(num_granularities)
    logits = router(None, features).router_logits.detach().numpy()
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
    router = make_router("feature", router_norm_num_groups=3, router_activation=activation)
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
    torch.testing.assert_close(router.float()(None, features).router_logits, expected.float(), atol=1e-5, rtol=0)


def constant_router(logits, height, width):
    """A feature router whose every region has these logits, and features for it."""
    router = make_router("feature", len(logits), router_activation=None)
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.bias.copy_(torch.tensor(logits))
    return router, [torch.zeros(1, 6, height * 2**g, width * 2**g) for g in range(len(logits))]


@pytest.mark.parametrize(("logits", "choice"), [([0.5, 2.0, -1.0], 1), ([1.0, 0.0, 3.0], 2), ([1.0, 1.0], 0)])
def test_a_feature_router_takes_the_argmax_until_it_has_thresholds(logits, choice):
    router, features = constant_router(logits, 1, 1)
    routed = router(None, features)
    assert routed.grain_map.item() == choice and routed.gates.argmax(1).item() == choice
    for below in range(len(logits)):
        score = routed.score.item()
        router.set_thresholds(sorted([score - 1] * below + [score] * (len(logits) - 1 - below)))
        assert router(None, features).grain_map.item() == below


def test_gates_are_drawn_in_training_as_often_as_the_softmax_says():
    logits, draws = np.array([0.0, 1.0, -0.5]), 40_000
    router, features = constant_router(logits.tolist(), 200, 200)
    router.set_thresholds([0.0, 0.0])  # of no effect in training
    gates = router.train()(None, features).gates.detach()
    torch.testing.assert_close(gates.sort(1).values.mean((0, 2, 3)), torch.tensor([0.0, 0.0, 1.0]))
    frequencies = gates.mean(dim=(0, 2, 3)).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum()
    deviations = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) < 4 * deviations).all()


def test_a_frozen_feature_router_routes_in_training_as_in_evaluation_and_passes_no_gradient_on():
    router, features = make_router("feature", 3).train(), make_features(3)
    scores = router(None, features).score
    router.set_thresholds([scores.quantile(0.3).item(), scores.quantile(0.7).item()])
    drawn = [router(None, features).grain_map for _ in range(2)]
    assert not torch.equal(*drawn)
    router.requires_grad_(False)
    routed = router(None, [feature.requires_grad_() for feature in features])
    assert torch.equal(routed.grain_map, router.eval()(None, features).grain_map)
    assert set(routed.grain_map.unique().tolist()) == {0, 1, 2}
    assert not routed.gates.requires_grad and not routed.loss.requires_grad


def slow_gradient(features, direction, soft, chosen, compared):
    """Gradient of sum(routed features x direction) for one region's logits, by the chain rule.

    Args:
        features: the region's part of each granularity's, (C, n, n) repeated to the fine grid.
        direction: (C, n, n).
        soft: (K,), the softmax of logits and noise, whose gradient stands for that of the hard gates.
        chosen: granularity of the largest.
        compared: whether the gates of those that were not chosen count.
    """
    gradient = np.zeros(len(soft))
    for gate in range(len(soft)) if compared else [chosen]:
        value = (features[gate] * direction).sum()
        for logit in range(len(soft)):
            gradient[logit] += value * soft[gate] * ((gate == logit) - soft[logit])
    return gradient


@pytest.mark.parametrize("num_granularities", [2, 3])
@pytest.mark.parametrize("router_gradient", ["compared", "selected"])
def test_the_logits_gradient_compares_all_granularities_or_sees_the_selected_one(num_granularities, router_gradient):
    router = make_router("feature", num_granularities, router_gradient=router_gradient).train()
    features = make_features(num_granularities)
    torch.manual_seed(7)
    routed = router(None, features)
    mixed = mix_features(features, routed.gates)
    direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((mixed * direction).sum(), routed.router_logits)

    torch.manual_seed(7)
    noise = -torch.empty(routed.router_logits.shape).exponential_().log()
    soft = (routed.router_logits.detach() + noise).double().softmax(1).numpy()
    assert len(set(soft.argmax(1).flatten())) == num_granularities
    side = 2 ** (num_granularities - 1)
    for image, row, column in np.ndindex(*routed.grain_map.shape):
        chosen = soft[image, :, row, column].argmax()
        assert routed.grain_map[image, row, column] == chosen
        place = (image, slice(None), slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        parts = []
        for granularity, feature in enumerate(features):
            repeats = side // 2**granularity
            parts.append(np.kron(feature.numpy(), np.ones((repeats, repeats)))[place])
        np.testing.assert_allclose(mixed[place].detach(), parts[chosen], atol=1e-5)  # the same whatever the gradient
        arguments = direction[place].numpy(), soft[image, :, row, column], chosen, router_gradient == "compared"
        np.testing.assert_allclose(gradient[image, :, row, column], slow_gradient(parts, *arguments), atol=1e-4)


def test_the_way_of_the_gradient_changes_no_value():
    outputs = []
    for router_gradient in ("compared", "selected"):
        router, features = make_router("feature", 3, router_gradient=router_gradient).train(), make_features(3)
        torch.manual_seed(3)
        routed = router(None, features)
        outputs.append((mix_features(features, routed.gates), routed.loss, routed.grain_map))
    assert all(map(torch.equal, *outputs))


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
    assert budget_loss(one_hot_gates(grain_map, 3), [0.25, 0.5], 10.0).item() == pytest.approx(0, abs=1e-12)
    assert budget_loss(torch.ones(2, 1, 3, 3), [], 10.0).item() == 0


def joint_gates():
    """Of two images: the first has no fine region, the second only such."""
    return one_hot_gates(torch.tensor([[[0, 0]], [[1, 1]]]), 2).requires_grad_()


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


@pytest.mark.parametrize("num_granularities", [2, 3, 4])
def test_fineness_is_the_sum_of_the_log_odds_of_finer_granularities(num_granularities):
    logits = torch.randn(2, num_granularities, 3, 3, generator=torch.Generator().manual_seed(0))
    odds = np.exp(logits.double().numpy())
    expected = sum(np.log(odds[:, g:].sum(1) / odds[:, :g].sum(1)) for g in range(1, num_granularities))
    np.testing.assert_allclose(fineness(logits).numpy(), expected, atol=1e-5)


def test_fineness_still_ranks_where_probabilities_round_to_one():
    logits = torch.tensor([[0.0, 0.0, 0.0], [30.0, 60.0, 45.0]]).view(1, 2, 1, 3)
    assert fineness(logits).flatten().tolist() == [30, 60, 45]
