"""Dynamic grained coding: which granularity codes which region (paper section 3.1, equations 3 to 8).

A region is one cell of the coarsest grid. `grain_map` (B, h, w) long holds each region's granularity, 0 = coarsest.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .grain_map_dq import check_thresholds, one_hot_gates, rank_routing, repeat_cells
from .modeling_utils_dq import ExactBuffers

# Entropy of grey values: bins evenly spaced over the image range [-1, 1], smoothed by a Gaussian kernel.
NUM_BINS = 32
KERNEL_WIDTH = 0.01
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)


def image_entropy(pixel_values, patch_size, pixels_at_once=2**20):
    """Entropy in nats of the grey values of each patch, (B, H / patch_size, W / patch_size) float32.

    Args:
        pixel_values: (B, 3, H, W) in [-1, 1].
        patch_size: side of a patch in pixels.
        pixels_at_once: bounds memory, at about 32 floats a pixel; results do not depend on it.
    """
    pixel_values = pixel_values.float()
    grey = (pixel_values * pixel_values.new_tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True)
    height, width = grey.shape[-2] // patch_size, grey.shape[-1] // patch_size
    patches = nn.functional.unfold(grey, patch_size, stride=patch_size)  # (B, patch_size^2, h*w)
    patches = patches.transpose(1, 2).flatten(0, 1)  # (B*h*w, patch_size^2)
    bins = torch.linspace(-1, 1, NUM_BINS, device=grey.device)
    entropies = []
    at_once = max(1, pixels_at_once // patch_size**2)
    for rows in [patches] if torch.compiler.is_exporting() else patches.split(at_once):  # for any number of images
        kernel = torch.exp(-0.5 * ((rows[..., None] - bins) / KERNEL_WIDTH) ** 2).mean(1)  # (rows, bins)
        density = kernel / (kernel.sum(1, keepdim=True) + 1e-40)
        entropies.append(torch.special.entr(density).sum(1))  # -p log p, 0 where p is 0
    return torch.cat(entropies).view(-1, height, width)


@dataclass
class DQRouterOutput(ModelOutput):
    """What a router gives.

    Args:
        score: (B, h, w) float32, how much each region deserves finer codes.
        grain_map: (B, h, w) long, granularity of each region, 0 = coarsest.
        gates: (B, K, h, w) float32, one-hot; of a feature router that chose in training they carry its gradient.
        loss: scalar, the router's own training loss, where it has one and chose the grain map.
        router_logits: (B, K, h, w), of a feature router.
        entropy: (B, h, w) nats, of an entropy router.
    """

    score: torch.Tensor | None = None
    grain_map: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class DQRouter(ExactBuffers):
    """Gives every region a score, and makes it as many steps finer as its score exceeds thresholds.

    The thresholds, a buffer (K - 1,) of ascending numbers, are saved with the weights; they stay float32 when the model is
    cast to another dtype. A subclass has `look`, a `score_name` and, if it learns, a `choose` of its own.

    Args:
        config: `DQVAEConfig`.
        thresholds: to begin with, K - 1 numbers.
    """

    score_name = None  # what the score is called in pictures, with its unit if it has one
    uses_features = False  # whether `look` needs the encoder's features
    highest_score = None  # scores lie in [0, highest_score]; None: they may be any number

    def __init__(self, config, thresholds):
        super().__init__()
        self.num_granularities = len(config.granularities)
        self.initial_thresholds = thresholds
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.float32))

    def look(self, pixel_values, features):
        """A `DQRouterOutput` of the score alone, and of what it was made of."""
        raise NotImplementedError

    def forward(self, pixel_values, features, grain_map=None, shares=None):
        """Route images.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            features: the granularities' features, a list of (B, C, H_g, W_g), coarsest first.
            grain_map: (B, h, w) long; prescribes the choice.
            shares: of each image's regions at each granularity but the coarsest; they go by the score's rank.
        """
        seen = self.look(pixel_values, features)
        if shares is not None:
            grain_map = rank_routing(seen.score, shares)
        if grain_map is None:
            grain_map, gates, loss = self.choose(seen)
        else:
            gates, loss = one_hot_gates(grain_map, self.num_granularities), None
        return DQRouterOutput(**seen, grain_map=grain_map, gates=gates, loss=loss)

    def choose(self, seen):
        """Grain map, gates, and the loss or None, from what `look` gave."""
        grain_map = self.above_thresholds(seen.score)
        return grain_map, one_hot_gates(grain_map, self.num_granularities), None

    def above_thresholds(self, score):
        """Grain map (B, h, w) long: how many thresholds each score exceeds."""
        return (score[..., None] > self.thresholds).sum(-1)

    @torch.no_grad()
    def set_thresholds(self, thresholds):
        """Put K - 1 finite ascending numbers in place of the thresholds; raises ValueError for others."""
        check_thresholds("thresholds", thresholds, self.num_granularities)
        self.thresholds.copy_(torch.tensor(thresholds))

    def finish_loading(self, config):
        """Called when weights have been loaded; raises `ValueError` if the thresholds cannot be."""
        if not self.thresholds.is_meta:
            check_thresholds("router.thresholds", self.thresholds.tolist(), self.num_granularities)

    def reset_parameters(self):
        """The thresholds to begin with, unless others were loaded."""
        init.copy_(self.thresholds, torch.tensor(self.initial_thresholds, dtype=torch.float32))


class EntropyRouter(DQRouter):
    """Finer codes where the grey values' entropy exceeds thresholds. No parameters.

    Differs: from the paper, which routes by features; this is the release's router, for any number of granularities.
    """

    score_name = "entropy, nats"
    highest_score = math.log(NUM_BINS)

    def __init__(self, config):
        super().__init__(config, config.initial_thresholds)
        self.patch_size = config.granularities[0]

    def finish_loading(self, config):
        """As for every router; thresholds that the configuration gives go before those of the weights."""
        if config.entropy_thresholds is not None:
            self.set_thresholds(config.entropy_thresholds)
        super().finish_loading(config)

    def look(self, pixel_values, features):
        """The entropy, in nats."""
        entropy = image_entropy(pixel_values, self.patch_size)
        return DQRouterOutput(score=entropy, entropy=entropy)


class FeatureRouter(DQRouter):
    """A gate on the pooled features of all granularities (paper equation 4), K logits a region.

    While it learns it draws its choice by Gumbel-softmax. Else the choice is the argmax until the router is calibrated,
    which sets thresholds on its score; before they are infinite.
    """

    score_name = "log odds of finer codes"
    uses_features = True

    @property
    def learns(self):
        """Whether it is in training and its weights are not frozen."""
        return self.training and any(parameter.requires_grad for parameter in self.parameters())

    def __init__(self, config):
        super().__init__(config, [math.inf] * (len(config.granularities) - 1))  # until it is calibrated
        self.budget_targets, self.budget_gamma = config.budget_targets, config.budget_gamma
        self.gradient = config.router_gradient
        width = self.num_granularities * config.z_channels
        self.norms = feature_norms(config)
        if config.router_activation is None:
            self.gate = nn.Linear(width, self.num_granularities)
        else:
            self.gate = two_layers(width, width, self.num_granularities, config.router_activation)

    def finish_loading(self, config):
        """As for every router, but it may be uncalibrated."""
        if self.thresholds.is_meta or not self.thresholds.isinf().all():
            super().finish_loading(config)

    def look(self, pixel_values, features):
        """The fineness of the logits (B, K, h, w)."""
        pooled = [pool(feature, g) for g, feature in enumerate(normalised(self.norms, features))]
        router_logits = self.gate(torch.cat(pooled, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return DQRouterOutput(score=fineness(router_logits.detach()), router_logits=router_logits)

    def choose(self, seen):
        """Gumbel-softmax while it learns, hard with a straight-through gradient; else thresholds or argmax. And the budget.

        Differs: from the release, unless `router_gradient` is "selected": the gates of all granularities pass a
        gradient on, so that the logits' is that of the difference between the granularities.
        """
        if self.learns:
            gates = nn.functional.gumbel_softmax(seen.router_logits.float(), tau=1.0, hard=True, dim=1)
            grain_map = gates.argmax(1)
        else:
            uncalibrated = self.thresholds.isinf().any()
            by_score = self.above_thresholds(seen.score)
            grain_map = torch.where(uncalibrated, seen.router_logits.argmax(1), by_score)
            gates = one_hot_gates(grain_map, self.num_granularities)
        loss = budget_loss(gates, self.budget_targets, self.budget_gamma, all_processes=self.training)
        if self.gradient == "selected":
            gates = gates * one_hot_gates(grain_map, self.num_granularities)
        return grain_map, gates, loss


class GainRouter(DQRouter):
    """Predicts what finer codes would gain in each region, from the means and mean squares of its features.

    The score is the predicted decrease of the region's mean squared error from the coarsest granularity to the finest, its
    square root with its sign. `training.router.learn_router` teaches it to a trained tokenizer; else its weights are
    frozen.
    Differs: from the paper, whose router learns by a gradient through its own choice (`FeatureRouter`).
    """

    score_name = "predicted gain"
    uses_features = True

    def __init__(self, config):
        super().__init__(config, [0.0] * (len(config.granularities) - 1))  # fine where that is predicted to be a gain
        width = self.num_granularities * config.z_channels
        self.norms = feature_norms(config)
        self.gate = two_layers(2 * width, width, 1, config.router_activation or "silu")
        self.requires_grad_(False)

    def finish_loading(self, config):
        """As for every router; transformers makes new parameters of loaded weights."""
        super().finish_loading(config)
        self.requires_grad_(False)

    def look(self, pixel_values, features):
        """The predicted gain."""
        return DQRouterOutput(score=self.predict(features).detach())

    def predict(self, features):
        """The score, with its gradient."""
        features = normalised(self.norms, features)
        pooled = [pool(part, g) for g, feature in enumerate(features) for part in (feature, feature**2)]
        return self.gate(torch.cat(pooled, dim=1).permute(0, 2, 3, 1))[..., 0].float()


class RandomRouter(DQRouter):
    """The control: a score from a uniform distribution over [0, 1), whatever the image shows. No parameters.

    Drawn anew, from torch's global generator, in training. In evaluation it is a hash of the image's pixels and of the
    region's place: the same for an image in every batch and on every device.
    """

    score_name = "random number"
    highest_score = 1.0

    def __init__(self, config):
        targets = config.budget_targets  # which these thresholds give on average
        super().__init__(config, [1 - sum(targets[granularity:]) for granularity in range(len(targets))])
        self.patch_size = config.granularities[0]

    def look(self, pixel_values, features):
        """Random numbers."""
        height, width = (side // self.patch_size for side in pixel_values.shape[2:])
        if self.training:
            return DQRouterOutput(score=torch.rand(len(pixel_values), height, width, device=pixel_values.device))
        bits = pixel_values.float().flatten(1).view(torch.int32).long()
        keys = (bits * hash_numbers(torch.arange(bits.shape[1], device=bits.device))).sum(1, keepdim=True)
        hashes = hash_numbers(keys + torch.arange(height * width, device=bits.device))
        return DQRouterOutput(score=((hashes & (2**24 - 1)).float() / 2**24).view(-1, height, width))


def hash_numbers(values):
    """Integers (int64) as other ones that look random: SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    values = (values + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        values = (values ^ ((values >> shift) & (2 ** (64 - shift) - 1))) * factor
    return values


ROUTERS = {"entropy": EntropyRouter, "feature": FeatureRouter, "gain": GainRouter, "random": RandomRouter}


def feature_norms(config):
    """A norm for each granularity's features."""
    groups = config.router_norm_num_groups
    return nn.ModuleList(
        nn.Identity() if groups is None else nn.GroupNorm(groups, config.z_channels, eps=1e-6)
        for _ in config.granularities
    )


def normalised(norms, features):
    """Each granularity's features (B, C, H_g, W_g) through its norm."""
    # In channels-last order PyTorch 2.13 on a CPU crashes where a norm learns and its input does not (encoder frozen).
    return [norm(feature.contiguous()) for norm, feature in zip(norms, features)]


def pool(feature, granularity):
    """Means over the cells of each region, (B, C, h, w), of features (B, C, H_g, W_g)."""
    return nn.functional.avg_pool2d(feature, 2**granularity)


def two_layers(inputs, width, outputs, activation):
    """Two linear layers, and "silu" or "relu" between them."""
    activation = {"silu": nn.SiLU, "relu": nn.ReLU}[activation]()
    return nn.Sequential(nn.Linear(inputs, width), activation, nn.Linear(width, outputs))


def mix_features(features, gates):
    """Routed features (B, C, H, W): of all granularities, repeated (nearest) to the fine grid, by their gates.

    Args:
        features: a list of (B, C, H_g, W_g), coarsest first.
        gates: (B, K, h, w), one-hot.
    """
    finest = len(features) - 1
    gates = repeat_cells(gates, 2**finest).to(features[-1].dtype)
    mixed = 0
    for granularity, feature in enumerate(features):
        mixed = mixed + repeat_cells(feature, 2 ** (finest - granularity)) * gates[:, granularity, None]
    return mixed


def fineness(router_logits):
    """How much each region deserves finer codes, (B, h, w): log odds of granularity g or finer, summed over g > 0."""
    router_logits = router_logits.float()
    at_least = router_logits.flip(1).logcumsumexp(1).flip(1)[:, 1:]
    below = router_logits.logcumsumexp(1)[:, :-1]
    return (at_least - below).sum(1)


def budget_loss(gates, targets, gamma, all_processes=False):
    """How far the shares of finer regions are from their targets (paper section 3.1), a scalar.

    For each finer granularity g, ratio_g = (codes spent if every other choice cost one code, less the minimum) /
    (the maximum less the minimum); the finest squared error counts gamma times.

    Args:
        gates: (B, K, h, w), non-negative.
        targets: share wanted at each granularity but the coarsest.
        gamma: weight of the finest granularity's term.
        all_processes: ratios are those of the batches of all processes together, which must all call it.
    """
    shares = gates.mean((0, 2, 3))  # (K,)
    if all_processes:
        shares = mean_over_processes(shares)
    loss = gates.new_zeros(())
    for granularity, target in enumerate(targets, start=1):
        cost = 4**granularity
        codes = shares.sum() + (cost - 1) * shares[granularity]  # a region
        ratio = (codes - 1) / (cost - 1)
        weight = gamma if granularity == len(targets) else 1.0
        loss = loss + weight * (ratio - target) ** 2
    return loss


def mean_over_processes(values):
    """Mean of a tensor over the processes that train together; its gradient is that of this process's own values.

    Averaged over the processes, as data-parallel training does, gradients are then those of the mean.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    mean = values.detach().clone()
    dist.all_reduce(mean)
    return values + (mean / dist.get_world_size() - values.detach())
