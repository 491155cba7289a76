"""A router that learns, from a trained tokenizer, where finer codes help."""

import math

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modeling.configuration_dqvae import DQVAEConfig
from ..modeling.modeling_dqvae import DQVAEModel
from ..modeling.modeling_utils_dq import evaluation_mode

WARMUP_STEPS = 20


def learn_router(vae, batches, steps, learning_rate=3e-3):
    """The tokenizer with a new `GainRouter`; everything else in it stays as it is.

    The router is fitted, by least squares, to what finer codes gain: each image is coded with all regions coarse and with
    all of them fine. The new router's thresholds are still to be set, by `training.calibration.calibrate`.

    Args:
        vae: a trained `DQVAEModel` of two granularities or more, which is not changed.
        batches: iterable of `pixel_values` (B, 3, H, W) in [-1, 1], at least `steps`.
        steps: optimizer steps, one for each batch.
        learning_rate: of Adam at its highest; it rises in 20 steps, and falls to 0 linearly.

    Returns:
        a new `DQVAEModel` on the same device, in evaluation mode.

    Raises:
        ValueError: one granularity, no steps, too few batches, images that `encode` would refuse, or a learning rate
            with which the router diverges.
    """
    if len(vae.config.granularities) == 1:
        raise ValueError("a tokenizer with one granularity has nothing to route")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    learner = with_gain_router(vae)
    router = learner.router.requires_grad_(True)
    optimizer = torch.optim.Adam(router.parameters(), learning_rate)
    batches = iter(batches)
    for step in tqdm(range(steps), desc="learn the router"):
        pixel_values = next(batches, None)
        if pixel_values is None:
            raise ValueError(f"{steps} steps need as many batches, got {step}")
        pixel_values = pixel_values.to(vae.device, torch.float32)
        gains = region_gains(learner, pixel_values)
        predicted = router.predict(learner.encoder(pixel_values))
        error = nn.functional.mse_loss(predicted, gains.sign() * gains.abs().sqrt())
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    if not error.isfinite():
        raise ValueError(
            f"the router's error is not finite after {steps} steps; use a learning_rate below {learning_rate}"
        )
    router.requires_grad_(False)
    optimizer.zero_grad()
    trained = dict(vae.named_parameters())
    for name, parameter in learner.named_parameters():
        if not name.startswith("router."):
            parameter.requires_grad_(trained[name].requires_grad)
    return learner.to(vae.dtype)


def with_gain_router(vae):
    """A copy of a tokenizer, float32, frozen and in evaluation mode, whose router is a new, random `GainRouter`."""
    config = vae.config.to_dict() | {"router": "gain", "entropy_thresholds": None}
    if config["router_norm_num_groups"] is not None:  # another router need not have had any that fit
        config["router_norm_num_groups"] = math.gcd(config["router_norm_num_groups"], config["z_channels"])
    copy = DQVAEModel(DQVAEConfig.from_dict(config)).to(vae.device)
    weights = {name: value for name, value in vae.state_dict().items() if not name.startswith("router.")}
    copy.load_state_dict(weights, strict=False)
    copy.source_card = vae.source_card
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def region_gains(vae, pixel_values):
    """Decrease of each region's mean squared error, (B, h, w), from all regions coarsest to all of them finest.

    Args:
        vae: `DQVAEModel`.
        pixel_values: (B, 3, H, W) in [-1, 1]; reconstructions are clipped to this range.
    """
    side, finest = vae.config.granularities[0], len(vae.config.granularities) - 1
    height, width = (size // side for size in pixel_values.shape[2:])
    coarse = torch.zeros(len(pixel_values), height, width, dtype=torch.long, device=pixel_values.device)
    errors = []
    with evaluation_mode(vae):
        for grain_map in (coarse, coarse + finest):
            sample = vae(pixel_values, grain_map=grain_map).sample.clamp(-1, 1)
            errors.append(nn.functional.avg_pool2d((sample - pixel_values).square().mean(1), side))
    return errors[0] - errors[1]
