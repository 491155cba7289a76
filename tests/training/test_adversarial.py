"""The adversarial losses of stage 1, by arithmetic, and alike in one process and in several."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dq_hf.training.adversarial import (
    NORMS,
    GlobalBatchNorm2d,
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    disc_factor,
    generator_loss,
    hinge_loss,
    r1_penalty,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Discriminator


@pytest.mark.parametrize(
    ("num_layers", "size", "expected"),
    [(3, (256, 256), (30, 30)), (3, (64, 71), (6, 6)), (2, (16, 20), (2, 3)), (1, (16, 7), (6, 1))],
)
def test_a_logit_for_each_patch(num_layers, size, expected):
    discriminator = PatchDiscriminator(base_channels=2, num_layers=num_layers)
    assert discriminator(torch.zeros(2, 3, *size)).shape == (2, 1, *expected)


@pytest.mark.parametrize(("num_layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_square_patch(num_layers, side):
    # Convolutions from the last to the first: side <- stride * (side - 1) + 4.
    discriminator = PatchDiscriminator(base_channels=2, num_layers=num_layers).eval().double()
    images = randn(1, 3, 128, 128).double().requires_grad_()
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = images.grad[0].ne(0).any(dim=0)
    rows, columns = seen.any(dim=1).nonzero(), seen.any(dim=0).nonzero()
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == side


def test_the_layout_is_that_of_pix2pix():
    convs = [layer for layer in PatchDiscriminator(8, 5).layers if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [8, 16, 32, 64, 64, 64, 1]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 2, 2, 1, 1]
    assert [conv.bias is not None for conv in convs] == [True, *[False] * 5, True]
    names = [type(layer).__name__ for layer in PatchDiscriminator(8, 1).layers]
    assert names == ["Conv2d", "LeakyReLU", "Conv2d", "GlobalBatchNorm2d", "LeakyReLU", "Conv2d"]


@pytest.mark.parametrize(
    ("norm", "kind", "alone"),
    [("batch", GlobalBatchNorm2d, False), ("group", nn.GroupNorm, True), ("none", nn.Identity, True)],
)
def test_whether_an_image_is_judged_alone_depends_on_the_norm(norm, kind, alone):
    discriminator, images = PatchDiscriminator(4, 2, norm), randn(3, 3, 16, 16)
    assert [type(discriminator.layers[place]) for place in (3, 6)] == [kind] * 2
    convs = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [conv.bias is not None for conv in convs] == [True, kind is nn.Identity, kind is nn.Identity, True]
    assert torch.allclose(discriminator(images)[:1], discriminator(images[:1]), atol=1e-6) == alone


def test_weights_start_small():
    torch.manual_seed(0)
    layers = PatchDiscriminator(64, 2).layers
    conv, norm = layers[5], layers[6]  # 524,288 and 256 weights
    assert conv.weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (norm.bias == 0).all()


def test_images_must_be_large_enough_for_one_logit():
    discriminator = PatchDiscriminator(base_channels=2)
    assert discriminator(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"at least 24 x 24 pixels, got 24 x 23; use fewer layers"):
        discriminator(torch.zeros(1, 3, 24, 23))


def test_alone_the_batch_norm_is_plain():
    norm, plain = GlobalBatchNorm2d(3), nn.BatchNorm2d(3)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    for seed in (0, 1):
        assert torch.equal(norm(randn(2, 3, 4, 5, seed=seed)), plain(randn(2, 3, 4, 5, seed=seed)))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in norm.state_dict().items())
    assert torch.equal(norm.eval()(randn(2, 3, 4, 5)), plain.eval()(randn(2, 3, 4, 5)))


# Losses


def test_hinge_loss():
    real, fake = torch.tensor([3.0, 1.0, 0.5, -1.0]), torch.tensor([-3.0, -1.0, 0.0, 2.0])
    assert hinge_loss(real, fake).item() == 0.5 * ((0 + 0 + 0.5 + 2) / 4 + (0 + 0 + 1 + 3) / 4)
    assert hinge_loss(torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 3, 3), -1.0)).item() == 0


def test_generator_loss():
    assert generator_loss(torch.tensor([[1.0, -4.0, 0.0, 9.0]])).item() == -1.5


def test_losses_are_float32_for_half_precision_logits():
    logits = torch.full((1000, 1000), 0.125, dtype=torch.bfloat16)
    assert hinge_loss(logits, logits).dtype == generator_loss(logits).dtype == torch.float32
    assert hinge_loss(logits, logits).item() == 0.5 * (0.875 + 1.125) and generator_loss(logits).item() == -0.125


def test_the_discriminator_comes_in_slowly_or_at_once():
    steps = (0, 9, 10, 11, 14, 15, 100)
    assert [disc_factor(step, start=10, ramp_steps=5) for step in steps] == [0, 0, 0, 0.2, 0.8, 1, 1]
    assert [disc_factor(step, start=10, ramp_steps=0) for step in steps] == [0, 0, 1, 1, 1, 1, 1]
    assert disc_factor(0, start=0, ramp_steps=0) == 1


# Regularisation


def test_r1_is_the_squared_gradient_at_an_image():
    images = randn(4, 3, 5, 6)
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1))
    linear = r1_penalty(lambda x: (x * weight).sum(1, keepdim=True), images)  # its gradient is the weight, everywhere
    assert linear.item() == pytest.approx(5 * 6 * (1 + 4 + 0.25))
    linear.backward()
    assert weight.grad.flatten().tolist() == pytest.approx([60, -120, 30])  # 2 w for each of 30 pixels
    square = r1_penalty(lambda x: weight * x.square().sum((1, 2, 3), keepdim=True), images).detach()
    assert square.item() == pytest.approx(4 * images.square().sum((1, 2, 3)).mean().item() * 0.25, rel=1e-5)
    assert images.grad is None and not images.requires_grad


def test_r1_of_the_discriminator_agrees_with_finite_differences():
    discriminator = PatchDiscriminator(4, 1, "group").double()
    images, pull, step = randn(2, 3, 8, 8).double(), randn(2, 3, 8, 8, seed=1).double(), 1e-6
    with torch.no_grad():
        slope = (discriminator(images + step * pull) - discriminator(images - step * pull)).sum((1, 2, 3)) / (2 * step)
    penalty = r1_penalty(discriminator, images)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images)
    assert (gradient * pull).sum((1, 2, 3)).tolist() == pytest.approx(slope.tolist(), rel=1e-5)
    assert penalty.item() == pytest.approx(gradient.square().sum().item() / 2)


def test_a_scale_keeps_small_slopes_in_half_precision():
    def slope(images):
        return (images.half() * 2e-8).sum((1, 2, 3), keepdim=True)  # half begins at 6e-8

    images = torch.ones(2, 3, 4, 4)
    assert r1_penalty(slope, images).item() == 0
    assert r1_penalty(slope, images, scale=2.0**10).item() == pytest.approx(48 * 2e-8**2, rel=1e-2)


def test_lecam_draws_logits_to_the_others_moving_average():
    lecam = LeCam(decay=0.75)
    real, fake = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([-2.0, 0.0]).view(2, 1, 1, 1)
    assert lecam(real, fake).item() == (1 + 9) / 2 + (4 + 0) / 2  # both averages are 0
    # Now they are 0.25 * 2 = 0.5 for real and 0.25 * -1 = -0.25 for generated images.
    assert lecam.averages.tolist() == [0.5, -0.25]
    leaf = real.clone().requires_grad_()
    loss = lecam(leaf, fake)
    assert loss.item() == (1.25**2 + 3.25**2) / 2 + (2.5**2 + 0.5**2) / 2
    loss.backward()
    assert leaf.grad.flatten().tolist() == [1.25, 3.25]  # 2 (D - average) / 2 images
    assert lecam.averages.tolist() == [0.75 * 0.5 + 0.25 * 2, 0.75 * -0.25 + 0.25 * -1]
    assert LeCam()(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


# Adaptive weight


def weigh(reconstruction_gradient, generator_gradient, disc_weight, **options):
    """The weight for losses with these gradients."""
    weight = nn.Parameter(torch.ones(2))
    losses = [(weight * torch.tensor(gradient)).sum() for gradient in (reconstruction_gradient, generator_gradient)]
    return adaptive_weight(*losses, weight, disc_weight, **options)


def test_the_weight_is_the_ratio_of_the_gradient_norms():
    assert weigh([3.0, 4.0], [0.0, 10.0], 0.8).item() == pytest.approx(0.8 * 5 / 10.0001, rel=1e-6)
    assert weigh([3e-4, 4e-4], [0.0, 1e-3], 1.0).item() == pytest.approx(5e-4 / 1.1e-3, rel=1e-6)


def test_the_ratio_is_at_most_ten_thousand_and_the_weight_at_most_three_quarters():
    assert weigh([3.0, 4.0], [0.0, 5.0], 0.8).item() == 0.75
    assert weigh([3.0, 4.0], [0.0, 0.0], 1e-5).item() == pytest.approx(0.1)  # the ratio would be 50,000
    assert weigh([0.0, 0.0], [0.0, 0.0], 1.0).item() == 0


def test_both_losses_can_still_be_differentiated():
    decoder, latents = nn.Conv2d(2, 3, 1), randn(1, 2, 4, 4)
    images = decoder(latents)
    losses = images.square().mean(), images.mean()
    weight = adaptive_weight(*losses, decoder.weight, 1.0)
    assert weight.shape == () and weight.dtype == torch.float32 and not weight.requires_grad
    assert decoder.weight.grad is None
    (losses[0] + weight * losses[1]).backward()
    assert decoder.weight.grad.isfinite().all()


def test_a_scale_keeps_small_gradients_in_half_precision():
    weight = nn.Parameter(torch.ones(2))
    small = (weight.half() * torch.tensor([3.0, 4.0]).half()).float().sum() * 1e-9  # half begins at 6e-8
    large = (weight * torch.tensor([0.0, 1e-4])).sum()
    assert adaptive_weight(small, large, weight, 1.0).item() == 0
    assert adaptive_weight(small, large, weight, 1.0, scale=2.0**20).item() == pytest.approx(5e-9 / 2e-4, rel=1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_give_nan(bad):
    assert weigh([bad, 1.0], [1.0, 1.0], 1.0).isnan()
    assert weigh([1.0, 1.0], [bad, 1.0], 1.0).isnan()
    assert weigh([bad, 1.0], [bad, 1.0], 1.0).isnan()


# Several processes


def train(norm, rank=None):
    """Two steps on a joint batch, or on the half of it of one process: what each step computes, by name.

    The discriminator is regularised where that goes together with its norm.
    """
    torch.manual_seed(0)
    decoder, discriminator = nn.Conv2d(4, 3, 3, padding=1), PatchDiscriminator(4, 1, norm)
    lecam = LeCam()
    decoder_call, discriminator_call = decoder, discriminator
    mine = slice(None)
    if rank is not None:
        decoder_call, discriminator_call = DistributedDataParallel(decoder), DistributedDataParallel(discriminator)
        mine = slice(2 * rank, 2 * rank + 2)
    optimizer = torch.optim.SGD([*decoder.parameters(), *discriminator.parameters()], lr=0.1)
    steps = []
    for step in range(2):
        latents, images = randn(4, 4, 16, 16, seed=step)[mine], randn(4, 3, 16, 16, seed=10 + step)[mine]
        reconstructions = decoder_call(latents)
        discriminator.requires_grad_(False)
        reconstruction_loss = (reconstructions - images).abs().mean()
        adversarial_loss = generator_loss(discriminator(reconstructions))
        weight = adaptive_weight(reconstruction_loss, adversarial_loss, decoder.weight, 0.1)
        (reconstruction_loss + weight * adversarial_loss).backward()
        discriminator.requires_grad_(True)
        logits = discriminator_call(images), discriminator_call(reconstructions.detach())
        loss = hinge_loss(*logits) + lecam(*logits)
        if norm != "batch":
            loss = loss + 1e-3 * r1_penalty(discriminator, images)
        loss.backward()
        gradients = {
            name: p.grad.clone() for name, p in [*decoder.named_parameters(), *discriminator.named_parameters()]
        }
        buffers = {name: buffer.clone() for name, buffer in [*discriminator.named_buffers(), *lecam.named_buffers()]}
        steps.append({"logits": torch.cat(logits, dim=1).detach(), "lambda": weight, **gradients, **buffers})
        optimizer.step()
        optimizer.zero_grad()
    return steps


def normalise(norm, rank=None):
    """Output, input gradient and running averages of a batch norm for one of two uneven batches, or for both."""
    features, pull = 1000 + randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    mine = slice(None) if rank is None else (slice(0, 1), slice(1, 5))[rank]
    features, pull = features[mine].to(norm.weight.dtype).requires_grad_(), pull[mine]
    output = norm(features)
    (output * pull).sum().backward()
    return {"output": output.detach(), "gradient": features.grad} | norm.state_dict()


def normalise_half(norm, rank=None):
    """Output and running averages for bfloat16 under autocast, on one half of a batch or on all of it."""
    features = 10 + randn(4, 3, 4, 4)
    features = features if rank is None else features[2 * rank : 2 * rank + 2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = norm(features.bfloat16())
    return {"output": output.detach()} | norm.state_dict()


def run_process(rank, folder):
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    results = {
        **{norm: train(norm, rank) for norm in NORMS},
        "norm": normalise(GlobalBatchNorm2d(3), rank),
        "half": normalise_half(GlobalBatchNorm2d(3), rank),
        "not finite": weigh([float("inf") if rank else 1.0, 1.0], [1.0, 1.0], 1.0),
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes computes."""
    folder = tmp_path_factory.mktemp("ranks")
    # Forked, because new processes would take seconds to import everything.
    mp.start_processes(run_process, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("norm", NORMS)
def test_two_processes_train_like_one_on_the_joint_batch(ranks, norm):
    for first, second, joint in zip(ranks[0][norm], ranks[1][norm], train(norm)):
        assert 1e-4 < joint["lambda"] <= 0.75
        logits = torch.cat([first.pop("logits"), second.pop("logits")])
        torch.testing.assert_close(logits, joint.pop("logits"), atol=1e-5, rtol=1e-5)
        assert first.keys() == second.keys() == joint.keys()
        assert len(first) == {"batch": 14, "group": 11, "none": 10}[norm]
        for name, value in joint.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5)


def test_uneven_batches_far_from_zero_are_normalised_together(ranks):
    first, second = (rank["norm"] for rank in ranks)
    joint = normalise(nn.BatchNorm2d(3).double())  # with a mean of 1000, E[x^2] - E[x]^2 would be off by 0.1
    for name in ("output", "gradient"):
        both = torch.cat([first[name], second[name]]).double()
        torch.testing.assert_close(both, joint[name], atol=1e-3, rtol=0)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], joint[name], atol=1e-3, rtol=0, check_dtype=False)


def test_statistics_are_float32_under_autocast(ranks):
    first, second = (rank["half"] for rank in ranks)
    joint = nn.BatchNorm2d(3).double()
    expected = joint((10 + randn(4, 3, 4, 4)).bfloat16().double()).detach()
    assert first["output"].dtype == torch.bfloat16
    both = torch.cat([first["output"], second["output"]]).double()
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=2**-8)  # bfloat16 has 8 bits
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(first[name], getattr(joint, name).float(), atol=1e-5, rtol=0)


def test_a_gradient_that_is_not_finite_in_one_process_gives_nan_in_all(ranks):
    assert all(rank["not finite"].isnan() for rank in ranks)
