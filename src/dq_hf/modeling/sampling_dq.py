"""Drawing the next position or code: random streams, warpers, guidance."""

import math
from functools import wraps

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def in_evaluation_mode(method):
    """A model's method with dropout off; afterwards every module is in the mode that it was in."""

    @wraps(method)
    def wrapped(model, *args, **kwargs):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            return method(model, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return wrapped


def make_warpers(prefix, temperature, top_k, top_p, defaults, do_sample):
    """transformers' warpers for one kind of logits.

    Args:
        prefix: of the arguments' names in messages and in `defaults`.
        temperature, top_k, top_p: as in `generate`.
        defaults: what takes the place of None.
        do_sample: without it there is nothing to warp.

    Raises:
        TypeError, ValueError: arguments of another type or range, or without effect.
    """
    if temperature is None:
        temperature = defaults.get(f"{prefix}temperature", 1.0)
    if top_k is None:
        top_k = defaults.get(f"{prefix}top_k")
    if top_p is None:
        top_p = defaults.get(f"{prefix}top_p", 1.0)
    for name, value, kinds in (
        ("temperature", temperature, (int, float)),
        ("top_k", top_k, int),
        ("top_p", top_p, (int, float)),
    ):
        if isinstance(value, bool) or not isinstance(value, kinds) and not (name == "top_k" and value is None):
            raise TypeError(f"{prefix}{name} must be a number, got {value!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{prefix}temperature must be above 0 and finite, got {temperature}; greedy is do_sample=False"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"{prefix}top_k must be at least 1, or None for no restriction; got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{prefix}top_p must lie in (0, 1], got {top_p}")
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if warpers and not do_sample:
        raise ValueError(f"{prefix}temperature, {prefix}top_k and {prefix}top_p have no effect with do_sample=False")
    return warpers


def random_streams(generator, num_images, num_steps):
    """Uniform numbers in [0, 1), (steps, 2, B) float64: for each image from a generator of its own.

    Image i's generator is seeded by the i-th draw from `generator`, or the first one from `generator[i]`.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_images
    if len(generators) != num_images:
        raise ValueError(f"generator must be one or a list of {num_images}, one for each image; got {len(generators)}")
    if any(source is not None and not isinstance(source, torch.Generator) for source in generators):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    columns = []
    for source in generators:
        device = "cpu" if source is None else source.device
        seed = torch.randint(2**63 - 1, (), generator=source, device=device).item()
        own = torch.Generator().manual_seed(seed)
        columns.append(torch.rand(num_steps, 2, dtype=torch.float64, generator=own))
    return torch.stack(columns, dim=2)


def choose(logits, allowed, warpers, uniform):
    """One index of each row (B,) long: drawn by inverse distribution function from `uniform` (B,), or the largest.

    Args:
        logits: (B, V).
        allowed: (B, V) bool, at least one true in each row.
        warpers: applied to what is allowed.
        uniform: (B,) float64 in [0, 1), or None for the largest logit.
    """
    scores = logits.float().masked_fill(~allowed, -torch.inf)
    if uniform is None:
        return scores.argmax(1)
    cumulative = warpers(None, scores).double().softmax(1).cumsum(1)
    threshold = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def with_guidance_rows(guided, values, hidden_class_values):
    """(B, 1) from (B,); guided: (2B, 1), the rows with the class followed by those without."""
    return (torch.cat([values, hidden_class_values]) if guided else values)[:, None]


def guide(logits, scale):
    """Classifier-free guidance (Ho & Salimans 2022): logits (2B, V) of both conditions to (B, V). Scale 1: as they are."""
    if scale == 1:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)
