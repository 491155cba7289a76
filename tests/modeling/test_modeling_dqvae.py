"""DQ-VAE: what encode, decode and forward give, rate control, other sizes, gradients, and refused inputs."""

import math

import numpy as np
import pytest
import torch
from conftest import make_vae
from safetensors.torch import load_file, save_file
from transformers.testing_utils import CaptureLogger, LoggingLevel
from transformers.utils import logging

from dq_hf.modeling.modeling_dqvae import DQVAEModel
from dq_hf.modeling.routing_dq import ROUTERS

# Granularities by their number K, with widths of the encoder's levels.
GRANULARITIES = {
    1: dict(granularities=[4], block_out_channels=[8, 8, 16]),
    2: dict(granularities=[4, 2], block_out_channels=[8, 8, 16]),
    3: dict(granularities=[4, 2, 1], block_out_channels=[8, 8, 16]),
    4: dict(granularities=[8, 4, 2, 1], block_out_channels=[8, 8, 8, 16]),
}


def make_images(batch_size=2, height=16, width=16, seed=0):
    """Noise, more of it to the right, so that regions differ."""
    noise = torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return noise * torch.linspace(0, 1, width)


def spread_router(model):
    """The gate made so sensitive that regions differ in their choice."""
    with torch.no_grad():
        for layer in (model.router.gate[0], model.router.gate[2]):
            layer.weight.mul_(6)
    return model


@pytest.fixture(scope="module", params=ROUTERS)
def vae(request):
    """A model in evaluation mode whose router chooses both granularities on `make_images`."""
    model = make_vae(router=request.param, entropy_thresholds=[1.2])
    return spread_router(model) if request.param == "feature" else model


@torch.no_grad()
def encode(model, *args, **kwargs):
    return model.encode(*args, **kwargs)


def alternating_map(num_granularities, batch_size, rows, columns):
    """Every granularity in turn."""
    return torch.arange(batch_size * rows * columns).view(batch_size, rows, columns) % num_granularities


def cells_of(grain_map, num_granularities):
    """For each cell of the fine grid: its granularity, and row and column of its code's first cell, slowly."""
    region = 2 ** (num_granularities - 1)
    shape = (grain_map.shape[0], grain_map.shape[1] * region, grain_map.shape[2] * region)
    cells = np.zeros((*shape, 3), dtype=int)
    for image, row, column in np.ndindex(*shape):
        granularity = int(grain_map[image, row // region, column // region])
        side = region // 2**granularity
        cells[image, row, column] = granularity, row // side * side, column // side * side
    return cells


# What encode gives


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_granularities", GRANULARITIES)
def test_a_prescribed_grain_map_is_obeyed_exactly(num_granularities, router):
    model = make_vae(router=router, **GRANULARITIES[num_granularities])
    factor, finest = model.config.granularities[0], model.config.granularities[-1]
    grain_map = alternating_map(num_granularities, 2, 16 // factor, 24 // factor)
    encoded = encode(model, make_images(2, 16, 24), grain_map=grain_map.to(torch.int32))
    assert torch.equal(encoded.grain_map, grain_map)
    assert encoded.codes.shape == (2, 16 // finest, 24 // finest) and encoded.codes.dtype == torch.long
    assert encoded.quantized.shape == (2, model.config.codebook_dim, 16 // finest, 24 // finest)
    assert encoded.gates.argmax(1).equal(grain_map)
    cells = cells_of(grain_map, num_granularities)
    for image, row, column in np.ndindex(*encoded.codes.shape):  # constant within a code
        _, first_row, first_column = cells[image, row, column]
        assert encoded.codes[image, row, column] == encoded.codes[image, first_row, first_column]
    distinct = [len({tuple(cell) for cell in image.reshape(-1, 3)}) for image in cells]
    assert encoded.num_codes.tolist() == distinct
    assert decode(model, encoded).shape == (2, 3, 16, 24)


@torch.no_grad()
def decode(model, encoded):
    sample = model.decode(encoded.quantized).sample
    torch.testing.assert_close(model.decode_codes(encoded.codes).sample, sample, atol=1e-4, rtol=1e-4)
    return sample


@pytest.mark.parametrize("num_granularities", GRANULARITIES)
def test_each_cell_takes_the_features_of_its_granularity(num_granularities):
    model = make_vae(**GRANULARITIES[num_granularities])
    factor = model.config.granularities[0]
    grain_map = alternating_map(num_granularities, 2, 16 // factor, 16 // factor)
    hidden_states = encode(model, make_images(), grain_map=grain_map).hidden_states
    with torch.no_grad():
        features = model.encoder(make_images())
    cells = cells_of(grain_map, num_granularities)
    for image, row, column in np.ndindex(*cells.shape[:3]):
        granularity = cells[image, row, column, 0]
        side = 2 ** (num_granularities - 1 - granularity)
        expected = features[granularity][image, :, row // side, column // side]
        assert torch.equal(hidden_states[image, :, row, column], expected)


def test_codes_are_nearest_to_the_projected_features(vae):
    encoded = encode(vae, make_images())
    weight, bias = vae.quant_conv.weight.detach()[:, :, 0, 0].double(), vae.quant_conv.bias.detach().double()
    vectors = encoded.hidden_states.double().permute(0, 2, 3, 1) @ weight.T + bias
    codebook = vae.quantizer.codebook.double()
    distances = (vectors[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(encoded.codes, distances.argmin(-1))
    torch.testing.assert_close(encoded.quantized.permute(0, 2, 3, 1), codebook[encoded.codes].float())


def test_both_granularities_are_chosen_by_the_router(vae):
    encoded = encode(vae, make_images())
    assert set(encoded.grain_map.unique().tolist()) == {0, 1}
    kind = vae.config.router
    assert (encoded.entropy is not None) == (kind == "entropy")
    assert (encoded.router_logits is not None) == (encoded.budget_loss is not None) == (kind == "feature")
    if kind != "feature":
        assert torch.equal(encoded.grain_map, (vae.region_scores(make_images()) > vae.router.thresholds).long())
    else:
        assert torch.equal(encoded.grain_map, encoded.router_logits.argmax(1))


def test_evaluation_is_deterministic_and_moves_nothing(vae):
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    first, second = encode(vae, make_images()), encode(vae, make_images())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"fine_ratio": 0.3}])
def test_an_image_alone_gives_what_it_gives_in_a_batch(vae, options):
    images = make_images(4)
    together = encode(vae, images, **options)
    for i in range(4):
        alone = encode(vae, images[i : i + 1], **options)
        assert torch.equal(alone.codes[0], together.codes[i])
        assert torch.equal(alone.grain_map[0], together.grain_map[i])
        torch.testing.assert_close(decode(vae, alone)[0], decode(vae, together)[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [0, 0.03, 0.25, 0.5, 0.77, 1])
def test_fine_ratio_is_the_exact_share_of_every_image(vae, share):
    encoded = encode(vae, make_images(3, 16, 20), fine_ratio=share)
    num_regions = 4 * 5
    counts = encoded.grain_map.flatten(1).sum(1)
    assert ((counts - share * num_regions).abs() <= 0.5).all() and (counts == counts[0]).all()
    assert encoded.num_codes.tolist() == [num_regions + 3 * count for count in counts.tolist()]
    logits = encoded.router_logits
    score = vae.region_scores(make_images(3, 16, 20)) if logits is None else logits[:, 1] - logits[:, 0]
    for i, count in enumerate(counts.tolist()):
        chosen = set(score[i].flatten().argsort(descending=True, stable=True)[:count].tolist())
        assert chosen == set(encoded.grain_map[i].flatten().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("router", ROUTERS)
def test_several_shares_for_several_granularities(router):
    model = make_vae(router=router, **GRANULARITIES[3])
    encoded = encode(model, make_images(), fine_ratio=[0.25, 0.5])
    assert [(encoded.grain_map == g).sum(dim=(1, 2)).tolist() for g in range(3)] == [[4, 4], [4, 4], [8, 8]]


def test_one_granularity_takes_an_empty_list_of_shares():
    assert encode(make_vae(**GRANULARITIES[1]), make_images(), fine_ratio=[]).grain_map.sum() == 0


@pytest.mark.parametrize("image_size", [[16, 24], 8])
def test_models_trained_at_another_size_take_any_multiple_of_the_coarsest_factor(image_size):
    model = make_vae(image_size=image_size)
    for height, width in ((4, 4), (16, 24), (28, 8)):
        images = make_images(1, height, width)
        encoded = encode(model, images)
        assert encoded.grain_map.shape == (1, height // 4, width // 4)
        assert decode(model, encoded).shape == images.shape


def test_half_precision_images_are_taken(vae):
    with torch.no_grad():
        assert vae(make_images().bfloat16()).sample.shape == (2, 3, 16, 16)


# Training


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_granularities", GRANULARITIES)
def test_forward_gives_the_sum_of_its_losses(num_granularities, router):
    model = make_vae(router=router, codebook_weight=0.5, **GRANULARITIES[num_granularities]).train()
    images = make_images()
    output = model(images)
    absolute = np.abs(output.sample.detach().double().numpy() - images.double().numpy()).mean()
    assert output.reconstruction_loss.item() == pytest.approx(absolute, rel=1e-5)
    total = absolute + 0.5 * output.vq_loss.item()
    if router == "feature":
        regions = output.grain_map[0].numel()
        shares = [(output.grain_map == g).double().mean().item() for g in range(num_granularities)]
        budget = 0.0
        for g in range(1, num_granularities):  # each wanted equally; a share is what its cost ratio comes to
            cost = 4**g
            codes = regions * (1 + (cost - 1) * shares[g])
            ratio = (codes - regions) / (cost * regions - regions)
            budget += (10 if g == num_granularities - 1 else 1) * (ratio - 1 / num_granularities) ** 2
        assert output.budget_loss.item() == pytest.approx(budget, abs=1e-5)
        total += budget
    else:
        assert output.budget_loss is None
    assert output.loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("num_granularities", [2, 3])
def test_vq_loss_counts_every_code_once(num_granularities):
    model = make_vae(**GRANULARITIES[num_granularities])
    grain_map = alternating_map(num_granularities, 2, 4, 4)
    images = make_images()
    encoded = encode(model, images, grain_map=grain_map)
    with torch.no_grad():
        projected = model.quant_conv(encoded.hidden_states).double()
    error = (model.quantizer.codebook[encoded.codes].permute(0, 3, 1, 2).double() - projected).square()
    weights = {2: [0.25, 1], 3: [0.0625, 0.25, 1]}[num_granularities]
    cells, total = cells_of(grain_map, num_granularities), 0.0
    for image, row, column in np.ndindex(*encoded.codes.shape):
        total += weights[cells[image, row, column, 0]] * error[image, :, row, column].sum().item()
    assert encoded.loss.item() == pytest.approx(1.25 * total / error.numel(), rel=1e-4)


@pytest.mark.parametrize("router", ["entropy", "feature", "random"])
@pytest.mark.parametrize("num_granularities", [1, 2, 3])
def test_gradient_reaches_every_parameter(num_granularities, router):
    thresholds = [1.2, 1.6][: num_granularities - 1]
    model = make_vae(router=router, entropy_thresholds=thresholds, **GRANULARITIES[num_granularities]).train()
    output = model(make_images(4))
    assert len(output.grain_map.unique()) == num_granularities
    output.loss.backward()
    for name, parameter in model.named_parameters():
        without_effect = name.endswith("to_k.bias") or (num_granularities == 1 and name.startswith("router"))
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any() or without_effect, name
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in model.buffers())


def test_training_leaves_a_gain_router_as_it_is_also_once_it_was_saved(tmp_path):
    make_vae(router="gain").save_pretrained(tmp_path)
    model = DQVAEModel.from_pretrained(tmp_path).train()
    model(make_images(4)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == name.startswith("router."), name


@pytest.mark.parametrize("router", ["feature", "gain"])
def test_a_router_learns_beside_a_frozen_encoder(router):
    """On a CPU PyTorch 2.13 crashes in the norm's backward pass if features in channels-last order need no gradient."""
    model = make_vae(router=router).train().requires_grad_(False)
    model.router.requires_grad_(True)
    images = make_images(4)
    features = [feature.contiguous(memory_format=torch.channels_last) for feature in model.encoder(images)]
    look = (
        model.router.predict
        if router == "gain"
        else lambda features: model.router.look(images, features).router_logits
    )
    look(features).square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in model.router.parameters())


def test_the_gate_alone_gives_the_router_gradient():
    model = make_vae(router="feature", budget_gamma=0.0).train()
    output = model(make_images())
    assert output.budget_loss.item() == 0
    output.loss.backward()
    assert all((parameter.grad != 0).any() for parameter in model.router.parameters())


def test_a_prescribed_map_leaves_the_router_out_of_training():
    model = make_vae(router="feature").train()
    output = model(make_images(), grain_map=alternating_map(2, 2, 4, 4))
    assert output.budget_loss is None
    output.loss.backward()
    assert all(parameter.grad is None for parameter in model.router.parameters())


def test_routing_in_training_follows_the_seed():
    model = make_vae(router="feature").train()
    maps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        maps.append(model.encode(make_images()).grain_map)
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_the_codebook_moves_in_training_only():
    model = make_vae()
    before = model.quantizer.codebook.clone()
    with torch.no_grad():
        model(make_images())
        assert torch.equal(model.quantizer.codebook, before)
        model.train()(make_images())
    assert not torch.equal(model.quantizer.codebook, before)


def test_the_reconstruction_improves_with_training():
    model = make_vae(block_out_channels=[8, 8, 8]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images = make_images(4)
    losses = []
    for _ in range(20):
        output = model(images)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.reconstruction_loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("router", ROUTERS)
def test_bfloat16_autocast_trains(router):
    model = make_vae(router=router).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(make_images())
    assert output.loss.dtype == output.vq_loss.dtype == model.quantizer.codebook.dtype == torch.float32
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable:FutureWarning"
)  # the older name works in all versions
def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_vae()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.encoder.levels[0].gradient_checkpointing and model.decoder.middle.gradient_checkpointing
        torch.manual_seed(0)
        model.train()(make_images()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


# Saving and loading


@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_model_loads_with_the_same_output(router, tmp_path):
    model = make_vae(router=router)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = DQVAEModel.from_pretrained(tmp_path)
    assert not loaded.training
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(value, loaded_state[name]) for name, value in state.items())
    with torch.no_grad():
        expected, output = model(make_images()), loaded(make_images())
    assert torch.equal(output.sample, expected.sample) and torch.equal(output.codes, expected.codes)


def test_thresholds_are_weights_and_no_files_of_the_configuration(tmp_path):
    model = make_vae(router="feature")
    model.router.set_thresholds([0.25])
    model.save_pretrained(tmp_path)
    assert DQVAEModel.from_pretrained(tmp_path).router.thresholds.tolist() == [0.25]
    make_vae(entropy_thresholds=[1.2]).save_pretrained(tmp_path)
    assert "entropy_thresholds" not in (tmp_path / "config.json").read_text()
    loaded = DQVAEModel.from_pretrained(tmp_path)
    assert loaded.config.entropy_thresholds is None and torch.equal(loaded.router.thresholds, torch.tensor([1.2]))


@pytest.mark.parametrize("router", ROUTERS)
def test_thresholds_that_are_missing_are_refused_as_any_weight_is(router, tmp_path):
    model = make_vae(router=router)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["router.thresholds"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path}.* weights are missing: router.thresholds"):
        DQVAEModel.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Missing key.*router.thresholds"):
        model.load_state_dict(weights)  # as a checkpoint of a run


@pytest.mark.parametrize(("router", "thresholds"), [("entropy", [math.inf]), ("feature", [math.nan])])
def test_thresholds_that_cannot_be_are_refused_by_file_and_key(router, thresholds, tmp_path):
    model = make_vae(router=router)
    model.router.thresholds.copy_(torch.tensor(thresholds))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: router.thresholds must be 1 finite"):
        DQVAEModel.from_pretrained(tmp_path)


def test_loading_in_bfloat16_keeps_the_codebook_in_float32(tmp_path):
    model = make_vae(entropy_thresholds=[1.2])
    model.save_pretrained(tmp_path)
    loaded = DQVAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.router.thresholds, torch.tensor([1.2]))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert all(
        torch.equal(value, loaded.quantizer.state_dict()[n]) for n, value in model.quantizer.state_dict().items()
    )
    with torch.no_grad():
        expected, output = model(make_images()), loaded(make_images())
    assert torch.equal(output.grain_map, expected.grain_map)
    assert output.sample.dtype == torch.bfloat16 and torch.isfinite(output.sample).all()


# Refused inputs

IMAGES = make_images()
BAD_IMAGES = [
    (IMAGES.numpy(), TypeError, "must be a float tensor in .* got ndarray; use DQImageProcessor"),
    ((IMAGES * 127).to(torch.uint8), TypeError, "must be a float tensor in .* got torch.uint8"),
    (IMAGES[0], ValueError, r"must have shape \(B, 3, height, width\), got \(3, 16, 16\)"),
    (IMAGES[:, :1], ValueError, r"must have shape \(B, 3, height, width\), got \(2, 1, 16, 16\)"),
    (IMAGES[:0], ValueError, "at least one image, got a batch of 0"),
    (IMAGES[:, :, :14], ValueError, "height must be a multiple of 4, got 14; resize or pad"),
    (IMAGES[:, :, :, :15], ValueError, "width must be a multiple of 4, got 15; resize or pad"),
    (IMAGES[:, :, :, :0], ValueError, "width must be a multiple of 4, got 0"),
    (IMAGES * 1.5, ValueError, r"lie in \[-1, 1\], got values from -1.4"),
    (IMAGES * 255, ValueError, r"lie in \[-1, 1\], got values from -2"),
    (IMAGES.clone().index_fill(3, torch.tensor([3]), torch.nan), ValueError, "finite .* got values from nan"),
    (IMAGES.clone().index_fill(3, torch.tensor([3]), torch.inf), ValueError, "finite .* got values from .* to inf"),
]
BAD_OPTIONS = [
    (dict(fine_ratio=1.1), ValueError, r"fine_ratio must lie in \[0, 1\]"),
    (dict(fine_ratio=-0.1), ValueError, r"fine_ratio must lie in \[0, 1\]"),
    (dict(fine_ratio=float("nan")), ValueError, r"fine_ratio must lie in \[0, 1\]"),
    (dict(fine_ratio=True), TypeError, "fine_ratio must be a number .* got True"),
    (dict(fine_ratio="half"), TypeError, "fine_ratio must be a number .* got 'half'"),
    (dict(fine_ratio=[0.3, 0.3]), ValueError, r"fine_ratio needs 1 share\(s\)"),
    (dict(fine_ratio=0.5, grain_map=torch.zeros(2, 4, 4, dtype=torch.long)), ValueError, "either .* not both"),
    (dict(grain_map=torch.zeros(2, 4, 3, dtype=torch.long)), ValueError, r"shape \(2, 4, 4\), got \(2, 4, 3\)"),
    (dict(grain_map=torch.zeros(4, 4, dtype=torch.long)), ValueError, r"shape \(2, 4, 4\), got \(4, 4\)"),
    (dict(grain_map=torch.zeros(2, 4, 4)), TypeError, "grain_map must be a tensor of integers, got torch.float32"),
    (dict(grain_map=torch.zeros(2, 4, 4, dtype=torch.bool)), TypeError, "tensor of integers, got torch.bool"),
    (dict(grain_map=[[0] * 4] * 4), TypeError, "grain_map must be a tensor of integers, got list"),
    (dict(grain_map=torch.full((2, 4, 4), 2)), ValueError, r"grain_map must lie in 0 ... 1, got values from 2 to 2"),
    (dict(grain_map=torch.full((2, 4, 4), -1)), ValueError, r"grain_map must lie in 0 ... 1, got values from -1"),
]
BAD_CODES = [
    (torch.zeros(2, 8, 8), TypeError, "codes must be a tensor of integers, got torch.float32"),
    (torch.zeros(8, 8, dtype=torch.long), ValueError, r"codes must have shape \(B, H, W\), got \(8, 8\)"),
    (torch.full((2, 8, 8), 16), ValueError, r"codes must lie in 0 ... 15, got values from 16 to 16"),
    (torch.full((2, 8, 8), -1), ValueError, r"codes must lie in 0 ... 15, got values from -1 to -1"),
    (None, TypeError, "codes must be a tensor of integers, got NoneType"),
]
BAD_QUANTIZED = [
    (torch.zeros(2, 8, 8, dtype=torch.long), TypeError, "quantized must be a float tensor, got torch.int64"),
    (None, TypeError, "quantized must be a float tensor, got NoneType"),
    (
        torch.zeros(2, 4, 8, 8),
        ValueError,
        r"shape \(B, 8, H, W\), got \(2, 4, 8, 8\); for code indices use decode_codes",
    ),
    (torch.zeros(2, 8, 8), ValueError, r"shape \(B, 8, H, W\), got \(2, 8, 8\)"),
    (torch.zeros(2, 8, 0, 8), ValueError, r"shape \(B, 8, H, W\), got \(2, 8, 0, 8\)"),
    (torch.full((2, 8, 8, 8), torch.nan), ValueError, "quantized must be finite"),
]


@pytest.mark.parametrize("part", ["encoder", "quant_conv"])
def test_features_that_are_not_finite_have_no_codes(part):
    model = make_vae()
    for parameter in getattr(model, part).parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    for method in (model.encode, model):
        with pytest.raises(ValueError, match="not finite.* load it with dtype=torch.bfloat16 or torch.float32"):
            method(IMAGES)


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_encode_refuses_bad_images(tiny_vae, images, error, message):
    for method in (tiny_vae.encode, tiny_vae):
        with pytest.raises(error, match=message):
            method(images)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_encode_refuses_bad_options(tiny_vae, options, error, message):
    for method in (tiny_vae.encode, tiny_vae):
        with pytest.raises(error, match=message):
            method(IMAGES, **options)


def test_encode_refuses_shares_that_do_not_fit_the_granularities():
    model = make_vae(**GRANULARITIES[3])
    with pytest.raises(ValueError, match=r"fine_ratio needs 2 share\(s\)"):
        model.encode(IMAGES, fine_ratio=0.5)
    with pytest.raises(ValueError, match=r"a sum of at most 1"):
        model.encode(IMAGES, fine_ratio=[0.6, 0.6])


@pytest.mark.parametrize(("codes", "error", "message"), BAD_CODES)
def test_decode_codes_refuses_bad_codes(tiny_vae, codes, error, message):
    with pytest.raises(error, match=message):
        tiny_vae.decode_codes(codes)


@pytest.mark.parametrize(("quantized", "error", "message"), BAD_QUANTIZED)
def test_decode_refuses_bad_vectors(tiny_vae, quantized, error, message):
    with pytest.raises(error, match=message):
        tiny_vae.decode(quantized)


def test_images_that_seem_to_lie_in_0_to_1_are_told():
    vae = make_vae()
    with LoggingLevel(logging.WARNING), CaptureLogger(logging.get_logger("dq_hf.modeling.modeling_dqvae")) as logs:
        logging.warning_once.cache_clear()
        vae.encode(IMAGES)
        vae.encode(IMAGES.clamp(min=0.2))  # light, but not as if black were 0
        assert logs.out == ""
        vae.encode(IMAGES / 2 + 0.5)
    assert "if they lie in [0, 1], give 2 * x - 1" in logs.out


def test_codes_without_a_batch_are_refused_by_name():
    with pytest.raises(ValueError, match=r"codes must have shape \(B, H, W\), got \(8, 8\)"):
        make_vae().decode_codes(torch.zeros(8, 8, dtype=torch.long))


def test_a_state_dict_is_loaded_without_a_folder():
    vae = make_vae()
    loaded = DQVAEModel.from_pretrained(None, config=vae.config, state_dict=vae.state_dict())
    assert all(torch.equal(weight, vae.state_dict()[name]) for name, weight in loaded.state_dict().items())
