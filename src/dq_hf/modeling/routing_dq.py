"""Dynamic grained coding: which granularity codes which region (paper section 3.1, equations 3 to 8).

A region is one cell of the coarsest grid. `grain_map` (B, h, w) long holds each region's granularity, 0 = coarsest.
"""

import torch
import torch.distributed as dist
from torch import nn

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
    for rows in patches.split(max(1, pixels_at_once // patch_size**2)):
        kernel = torch.exp(-0.5 * ((rows[..., None] - bins) / KERNEL_WIDTH) ** 2).mean(1)  # (rows, bins)
        density = kernel / (kernel.sum(1, keepdim=True) + 1e-40)
        entropies.append(torch.special.entr(density).sum(1))  # -p log p, 0 where p is 0
    return torch.cat(entropies).view(-1, height, width)


class EntropyRouter(nn.Module):
    """Finer codes where the grey values' entropy exceeds thresholds. No parameters.

    Differs: from the paper, which routes by features; this is the release's router, for any number of granularities.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config  # not a copy of the thresholds: calibration may change them

    def forward(self, pixel_values):
        """Entropy (B, h, w) float32 in nats, and the grain map (B, h, w) long that it implies."""
        entropy = image_entropy(pixel_values, self.config.granularities[0])
        grain_map = torch.zeros_like(entropy, dtype=torch.long)
        for threshold in self.config.entropy_thresholds:
            grain_map += entropy > threshold
        return entropy, grain_map


class FeatureRouter(nn.Module):
    """A gate on the pooled features of all granularities (paper equation 4), K logits a region."""

    def __init__(self, config):
        super().__init__()
        num_granularities = len(config.granularities)
        width = num_granularities * config.z_channels
        groups = config.router_norm_num_groups
        self.norms = nn.ModuleList(
            nn.Identity() if groups is None else nn.GroupNorm(groups, config.z_channels, eps=1e-6)
            for _ in range(num_granularities)
        )
        if config.router_activation is None:
            self.gate = nn.Linear(width, num_granularities)
        else:
            activation = {"silu": nn.SiLU, "relu": nn.ReLU}[config.router_activation]()
            self.gate = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, num_granularities))

    def forward(self, features):
        """Logits (B, K, h, w) from the granularities' features, a list of (B, C, H_g, W_g), coarsest first."""
        pooled = [
            nn.functional.avg_pool2d(norm(feature), 2**g)
            for g, (norm, feature) in enumerate(zip(self.norms, features))
        ]
        return self.gate(torch.cat(pooled, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gate_values(router_logits, training):
    """One-hot gates (B, K, h, w): hard Gumbel-softmax with straight-through gradient in training, else the argmax."""
    if training:
        return nn.functional.gumbel_softmax(router_logits.float(), tau=1.0, hard=True, dim=1)
    return one_hot_gate(router_logits.argmax(1), router_logits.shape[1])


def one_hot_gate(grain_map, num_granularities):
    """Gates (B, K, h, w) float of a grain map (B, h, w)."""
    return nn.functional.one_hot(grain_map, num_granularities).permute(0, 3, 1, 2).float()


def fineness(router_logits):
    """How much each region deserves finer codes, (B, h, w): log odds of granularity g or finer, summed over g > 0."""
    router_logits = router_logits.float()
    at_least = router_logits.flip(1).logcumsumexp(1).flip(1)[:, 1:]
    below = router_logits.logcumsumexp(1)[:, :-1]
    return (at_least - below).sum(1)


def budget_loss(gates, targets, gamma, all_processes=False):
    """How far the shares of finer regions are from their targets (paper equation 7), a scalar.

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
