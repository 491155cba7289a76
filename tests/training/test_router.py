"""A router that learns, from a trained tokenizer, where finer codes help."""

import pytest
import torch
from conftest import make_vae

from dq_hf.modeling.modeling_dqvae import DQVAEModel
from dq_hf.training.calibration import calibrate
from dq_hf.training.router import learn_router, region_gains


def images(count, seed=0):
    """Noise in some regions of 4x4 pixels, the others plain."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    noisy = torch.rand(count, 1, 4, 4, generator=generator) < 0.4
    return torch.where(noisy.repeat_interleave(4, 2).repeat_interleave(4, 3), noise, noise.mean((2, 3), keepdim=True))


def batches(count, size=8):
    return (images(size, seed) for seed in range(count))


def gains_by_hand(vae, batch):
    """Of each region, what fine codes everywhere take off the mean squared error, (B, 4, 4)."""
    errors = []
    for granularity in (0, len(vae.config.granularities) - 1):
        grain_map = torch.full((len(batch), 4, 4), granularity)
        error = (vae(batch, grain_map=grain_map).sample.clamp(-1, 1) - batch).square()
        errors.append(error.reshape(-1, 3, 4, 4, 4, 4).mean((1, 3, 5)))
    return errors[0] - errors[1]


@torch.no_grad()
def correlation(vae, batch):
    """Of the router's scores with the true gains, as their square roots with their signs."""
    gains = gains_by_hand(vae, batch)
    return torch.corrcoef(
        torch.stack([vae.region_scores(batch).flatten(), (gains.sign() * gains.abs().sqrt()).flatten()])
    )[0, 1].item()


@pytest.mark.parametrize("granularities", [[4, 2], [4, 2, 1]])
def test_gains_are_those_of_all_regions_finest_over_all_coarsest(granularities):
    vae, batch = make_vae(granularities=granularities).train(), images(3)
    gains = region_gains(vae, batch)
    assert vae.training and not gains.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(gains, gains_by_hand(vae.eval(), batch))


@pytest.mark.parametrize("start", ["entropy", "feature", "random", "gain"])
def test_nothing_but_the_router_changes(start):
    vae = make_vae(router=start).train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    learned = learn_router(vae, batches(2), steps=2)
    assert learned.config.router == "gain" and vae.config.router == start and vae.training and not learned.training
    after = learned.state_dict()
    for name, value in before.items():
        assert torch.equal(vae.state_dict()[name], value)
        assert name.startswith("router.") or torch.equal(after[name], value)
    trained = {name for name, parameter in learned.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in vae.named_parameters() if not name.startswith("router.")}


def test_what_is_frozen_and_the_dtype_stay():
    vae = make_vae().to(torch.bfloat16)
    vae.encoder.requires_grad_(False)
    learned = learn_router(vae, [batch.double() for batch in batches(2)], steps=2)
    assert learned.dtype == torch.bfloat16 and learned.router.thresholds.dtype == torch.float32
    trained = {name for name, parameter in learned.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in vae.named_parameters() if parameter.requires_grad}


def test_a_router_stays_frozen_when_all_else_is_released():
    learned = learn_router(make_vae(), batches(2), 2).requires_grad_(False).requires_grad_(True)
    learned.train()(images(2)).loss.backward()
    trained = {name for name, parameter in learned.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in learned.named_parameters() if parameter.grad is not None}
    assert trained and not any(name.startswith("router") for name in trained)


def test_widths_that_the_norms_groups_do_not_fit_are_no_obstacle():
    vae = make_vae(z_channels=6, router_norm_num_groups=4)  # which an entropy router does not use
    assert learn_router(vae, batches(1), steps=1).config.router_norm_num_groups == 2


def test_a_router_learns_the_gains():
    """Of few images, by heart: a random tokenizer's gains have no rule."""
    vae, batch = make_vae(z_channels=16), images(8)
    assert abs(correlation(learn_router(vae, [batch], steps=1), batch)) < 0.3
    assert correlation(learn_router(vae, [batch] * 100, steps=100, learning_rate=0.01), batch) > 0.6


def test_a_learned_router_keeps_a_budget_and_is_saved_with_it(tmp_path):
    learned = learn_router(make_vae(granularities=[4, 2, 1]), batches(10), steps=10)
    batch = images(40)
    assert calibrate(learned, batch.split(16), [0.3, 0.2]) == pytest.approx([0.3, 0.2], abs=0.01)
    learned.save_pretrained(tmp_path)
    loaded = DQVAEModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode(batch).codes, learned.encode(batch).codes)
        shares = [(loaded.encode(batch).grain_map == granularity).float().mean().item() for granularity in (1, 2)]
    assert shares == pytest.approx([0.3, 0.2], abs=0.01)


def test_a_router_is_the_same_for_the_same_seed():
    learned = []
    for _ in range(2):
        torch.manual_seed(3)
        learned.append(learn_router(make_vae(), batches(5), steps=5).state_dict())
    assert all(torch.equal(learned[0][name], value) for name, value in learned[1].items())


@pytest.mark.parametrize(
    ("sizes", "steps", "message"),
    [
        (dict(granularities=[4]), 1, "one granularity has nothing to route"),
        ({}, 0, "steps must be at least 1, got 0"),
        ({}, 4, "4 steps need as many batches, got 3"),
    ],
)
def test_a_router_that_cannot_be_learned(sizes, steps, message):
    with pytest.raises(ValueError, match=message):
        learn_router(make_vae(**sizes), batches(3), steps)


def test_a_router_that_diverges_is_an_error():
    with pytest.raises(ValueError, match="not finite after 30 steps; use a learning_rate below 1e[+]30"):
        learn_router(make_vae(), batches(30), steps=30, learning_rate=1e30)
