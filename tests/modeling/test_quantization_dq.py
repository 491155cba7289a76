"""The quantiser: look-up, losses, gradients, and a codebook that learns alike in one process and in several."""

import numpy as np
import pytest
import torch
from conftest import in_two_processes, seeded

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.quantization_dq import DQQuantizer

NUM_CODES, DIM, SIDE = 32, 4, 4
STATE = ("codebook", "cluster_size", "embed_sum")


def make_quantizer(**changes):
    """A quantiser in training mode whose codebook is the same every time."""
    torch.manual_seed(0)
    return DQQuantizer(DQVAEConfig(codebook_size=NUM_CODES, codebook_dim=DIM, **changes)).train()


def make_features(seed, batch_size=2):
    return torch.randn(batch_size, DIM, SIDE, SIDE, generator=seeded(seed))


def quantize(quantizer, features, cell_weights=None):
    """Quantise with a code of its own in every cell, all of weight 1 unless given."""
    batch_size, _, height, width = features.shape
    top_left = torch.arange(height * width).view(1, height, width).expand(batch_size, -1, -1)
    cell_weights = torch.ones(batch_size, 1, height, width) if cell_weights is None else cell_weights
    return quantizer(features, cell_weights, top_left)


def state_of(quantizer):
    return {name: getattr(quantizer, name).clone() for name in STATE}


def slow_codes(features, codebook):
    """Index of the nearest code by squared distance, cell by cell, in float64."""
    features, codebook = features.double().numpy(), codebook.double().numpy()
    codes = np.zeros((features.shape[0], *features.shape[2:]), dtype=np.int64)
    for image, row, column in np.ndindex(codes.shape):
        distances = [sum((features[image, :, row, column] - code) ** 2) for code in codebook]
        codes[image, row, column] = int(np.argmin(distances))
    return codes


def test_each_vector_gets_its_nearest_code():
    quantizer, features = make_quantizer().eval(), make_features(1)
    output = quantize(quantizer, features)
    codes = slow_codes(features, quantizer.codebook)
    assert len(np.unique(codes)) > 3
    assert np.array_equal(output.codes.numpy(), codes)
    expected = quantizer.codebook.numpy()[codes].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(output.quantized.numpy(), expected, atol=1e-6)
    assert torch.equal(quantizer.lookup(output.codes), torch.from_numpy(expected))
    top_left = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 2], [8, 8, 10, 10], [8, 8, 10, 10]]).expand(2, -1, -1)
    coarse = quantizer(features, torch.ones(2, 1, SIDE, SIDE), top_left).codes.numpy()  # looked up in its first cell
    assert np.array_equal(coarse, codes[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_loss_weighs_cells_and_scales_only_the_commitment_term_by_beta(beta):
    quantizer, features = make_quantizer(commitment_beta=beta).eval(), make_features(1)
    weights = torch.rand(2, 1, SIDE, SIDE, generator=seeded(5))
    nearest = quantizer.codebook.double().numpy()[slow_codes(features, quantizer.codebook)].transpose(0, 3, 1, 2)
    error = np.mean((nearest - features.double().numpy()) ** 2 * weights.double().numpy())

    features.requires_grad_()
    output = quantize(quantizer, features, weights)
    assert output.loss.item() == pytest.approx((1 + beta) * error, rel=1e-5)
    output.loss.backward()  # the codebook term has no gradient
    expected = beta * 2 * weights * (features.detach() - torch.from_numpy(nearest).float()) / features.numel()
    torch.testing.assert_close(features.grad, expected, atol=1e-8, rtol=1e-4)


def test_gradient_passes_straight_through_and_not_to_the_codebook():
    quantizer, features = make_quantizer(), make_features(1).requires_grad_()
    direction = make_features(2)
    (quantize(quantizer, features).quantized * direction).sum().backward()
    assert torch.equal(features.grad, direction)
    assert not list(quantizer.parameters()) and not any(buffer.requires_grad for buffer in quantizer.buffers())


def test_codebook_follows_the_written_arithmetic_of_the_moving_averages():
    decay, eps = 0.9, 1e-3
    quantizer = make_quantizer(codebook_decay=decay, codebook_eps=eps, restart_dead_codes=False)
    codebook = quantizer.codebook.double().numpy().copy()
    cluster_size, embed_sum = np.ones(NUM_CODES), codebook.copy()
    for step in range(3):
        features = make_features(step)
        codes = slow_codes(features, torch.from_numpy(codebook))  # before the update
        assert np.array_equal(quantize(quantizer, features).codes.numpy(), codes)

        vectors = features.double().permute(0, 2, 3, 1).reshape(-1, DIM).numpy()
        count, total = np.zeros(NUM_CODES), np.zeros((NUM_CODES, DIM))
        for code, vector in zip(codes.flatten(), vectors):
            count[code] += 1
            total[code] += vector
        cluster_size = decay * cluster_size + (1 - decay) * count
        embed_sum = decay * embed_sum + (1 - decay) * total
        n = cluster_size.sum()
        codebook = embed_sum / ((cluster_size + eps) * n / (n + NUM_CODES * eps))[:, None]
    np.testing.assert_allclose(quantizer.cluster_size.numpy(), cluster_size, rtol=1e-5)
    np.testing.assert_allclose(quantizer.embed_sum.numpy(), embed_sum, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=1e-4, atol=1e-6)


def test_dead_codes_restart_from_vectors_of_the_batch_and_others_stay():
    features = make_features(3)
    vectors = features.permute(0, 2, 3, 1).reshape(-1, DIM)
    plain, restarting = make_quantizer(restart_dead_codes=False), make_quantizer()
    for quantizer in (plain, restarting):
        quantizer.codebook[:3] += 100  # far from everything: these are not used
        quantize(quantizer, features)
    dead = plain.cluster_size < 1
    assert dead[:3].all() and not dead.all()
    assert (restarting.cluster_size[dead] == 1).all()
    for embed_sum in restarting.embed_sum[dead]:
        assert (vectors == embed_sum).all(1).any()
    assert torch.equal(restarting.cluster_size[~dead], plain.cluster_size[~dead])
    assert torch.equal(restarting.embed_sum[~dead], plain.embed_sum[~dead])
    for code in restarting.codebook[dead]:  # with the smoothing of the cluster sizes, about 1e-5
        assert (vectors - code).abs().amax(1).min() < 1e-3


def test_codebook_rests_in_evaluation_and_when_frozen():
    quantizer = make_quantizer()
    before = state_of(quantizer)
    quantize(quantizer.eval(), make_features(1))
    quantizer.train().frozen = True
    quantize(quantizer, make_features(1))
    assert all(torch.equal(before[name], value) for name, value in state_of(quantizer).items())
    quantizer.frozen = False
    quantize(quantizer, make_features(1))
    assert all(not torch.equal(before[name], value) for name, value in state_of(quantizer).items())


def test_arithmetic_is_float32_under_bfloat16_autocast():
    plain, autocast = make_quantizer(restart_dead_codes=False), make_quantizer(restart_dead_codes=False)
    features = make_features(1, batch_size=64).bfloat16()  # many: rounding changes a few codes
    expected = quantize(plain, features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantize(autocast, features)
    assert torch.equal(output.codes, expected.codes)
    assert output.quantized.dtype == output.loss.dtype == torch.float32
    assert torch.equal(output.quantized, expected.quantized) and torch.equal(output.loss, expected.loss)
    assert all(torch.equal(state_of(plain)[name], value) for name, value in state_of(autocast).items())


def test_a_codebook_in_half_precision_looks_up_but_does_not_learn():
    quantizer = make_quantizer()
    quantizer.codebook = quantizer.codebook.bfloat16()  # as FSDP's buffer_dtype does
    with pytest.raises(TypeError, match="float32 only, got torch.bfloat16; keep buffers"):
        quantize(quantizer, make_features(1))
    quantizer.frozen = True
    assert quantize(quantizer, make_features(1)).codes.shape == (2, SIDE, SIDE)


NUM_STEPS = 4


def train_on(quantizer, rank, joint=False):
    """States after each step on the data of one process, or of both joined."""
    states = []
    for step in range(NUM_STEPS):
        ranks = (0, 1) if joint else (rank,)
        quantize(quantizer, torch.cat([make_features(10 * step + r, batch_size=1 + r) for r in ranks]))
        states.append(state_of(quantizer))
    return states


def train_both_ways(rank):
    """The states of a codebook without restarts and of one with them."""
    states = []
    for restart in (False, True):
        quantizer = make_quantizer(restart_dead_codes=restart)
        torch.manual_seed(rank)  # restarts must not depend on each process's own random stream
        states.append(train_on(quantizer, rank))
    return states


def test_two_processes_keep_one_codebook_that_of_the_joint_batch(tmp_path):
    ranks = in_two_processes(tmp_path, train_both_ways)
    for restart in (False, True):
        for step in range(NUM_STEPS):
            for name in STATE:
                assert torch.equal(ranks[0][restart][step][name], ranks[1][restart][step][name])
    assert all((state["cluster_size"] == 1).any() for state in ranks[0][True])  # restarts took place
    joint = train_on(make_quantizer(restart_dead_codes=False), 0, joint=True)
    for step in range(NUM_STEPS):
        for name in STATE:
            torch.testing.assert_close(ranks[0][False][step][name], joint[step][name], atol=1e-5, rtol=0)
