"""The adversarial part of stage 1: the discriminator, its losses, and how much it weighs."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """How real each patch of an image looks: the convolutional PatchGAN of Isola et al. (2017).

    A logit sees a square of 16, 34, 70 or 142 pixels a side with 1, 2, 3 or 4 layers.

    Args:
        base_channels: width of the first convolution; widths double up to eight times this.
        num_layers: convolutions of stride 2, 1 or more; two of stride 1 follow.
        norm: "batch", by the statistics of all images (Isola et al. 2017); "group", by those of each image (Wu and He
            2018); "none". Only with the latter two an image's logits depend on that image alone, in training too.
    """

    def __init__(self, base_channels=64, num_layers=3, norm="batch"):
        super().__init__()
        self.num_layers = num_layers
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=norm == "none"),
                NORMS[norm](widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, pixel_values):
        """Logits (B, 1, h, w), high for real, of images (B, 3, H, W) in [-1, 1]: h = H // 2^num_layers - 2, w alike.

        Raises:
            ValueError: images too small for a single logit.
        """
        self.check_size(*pixel_values.shape[2:])
        return self.layers(pixel_values)

    def check_size(self, height, width):
        """Raise `ValueError` for images too small for a single logit."""
        smallest = 3 * 2**self.num_layers
        if min(height, width) < smallest:
            raise ValueError(
                f"a discriminator with num_layers={self.num_layers} needs images of at least {smallest} x {smallest} "
                f"pixels, got {height} x {width}; use fewer layers or larger images"
            )


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the statistics of the images of all processes, on any device and backend.

    In one process, or in evaluation mode, it is plain `nn.BatchNorm2d`. In several, all must call it as often and in the
    same order; their running averages stay the same. Statistics are float32 under autocast too.

    Differs: torch's own `SyncBatchNorm` refuses CPU tensors.
    """

    def forward(self, features):
        if not (self.training and _num_processes() > 1):
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            values = features.float()
            cells = values.new_tensor([values.numel() / self.num_features])
            sums = _SumOverProcesses.apply(torch.cat([values.sum(dim=(0, 2, 3)), cells]))
            total, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
            centred = values - mean[:, None, None]
            variance = _SumOverProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / total
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * total / (total - 1), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            normalised = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalised.to(features.dtype)


# By the width that is normalised.
NORMS = {
    "batch": GlobalBatchNorm2d,
    "group": lambda width: nn.GroupNorm(math.gcd(32, width), width),
    "none": lambda width: nn.Identity(),
}


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes; each process's loss sends its gradient to all of them."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverProcesses.apply(gradient)


def _num_processes():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss, a float32 scalar: 0 once real logits are at least 1 and fake ones at most -1."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def r1_penalty(discriminator, pixel_values, scale=1.0):
    """Squared norm of the gradient of an image's summed logits by its pixels, the mean over images, a float32 scalar.

    R1 of Mescheder et al. (2018), to be weighed by gamma / 2: real images must not lie on a slope of the discriminator.
    The logits of an image must not depend on others, as they do with batch norm.

    Args:
        discriminator: images (B, 3, H, W) to logits (B, 1, h, w).
        pixel_values: real images.
        scale: the gradient scaler's factor, for fp16, where small gradients would vanish.
    """
    pixel_values = pixel_values.detach().requires_grad_()
    logits = discriminator(pixel_values).float().sum()
    (gradient,) = torch.autograd.grad(logits * scale, pixel_values, create_graph=True)
    return (gradient.float() / scale).square().sum(dim=(1, 2, 3)).mean()


class LeCam(nn.Module):
    """The regularisation of Tseng et al. (2021), a float32 scalar: how far the logits of real images are from the moving
    average of generated ones', and the other way round, squared.

    It keeps a discriminator that has seen few images from parting the two ever further. The averages, over the batches of
    all processes, start at 0 and are those before the present batch; they belong into checkpoints.

    Args:
        decay: of the moving averages.
    """

    def __init__(self, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))  # real, generated

    def forward(self, real_logits, fake_logits):
        logits = torch.stack([real_logits.float(), fake_logits.float()])
        loss = (logits - self.averages.flip(0).view(2, 1, 1, 1, 1)).square().flatten(1).mean(1).sum()
        with torch.no_grad():
            means = logits.flatten(1).mean(1)
            if _num_processes() > 1:
                dist.all_reduce(means)
                means /= _num_processes()
            self.averages.lerp_(means, 1 - self.decay)
        return loss


def generator_loss(fake_logits):
    """The autoencoder's adversarial loss, a float32 scalar: low when reconstructions look real."""
    return -fake_logits.float().mean()


def disc_factor(step, start, ramp_steps):
    """Share of the adversarial loss that counts at a step: 0 up to `start`, 1 from `ramp_steps` later, linear between.

    With `ramp_steps` 0 it jumps to 1 at `start`.
    """
    if step < start:
        return 0.0
    return min(1.0, (step - start) / ramp_steps) if ramp_steps else 1.0


def adaptive_weight(reconstruction_loss, generator_loss, last_weight, disc_weight, scale=1.0):
    """Weight of the generator loss at which its pull on the decoder's last layer compares with the reconstruction's.

    The ratio of the two gradient norms, at most 1e4, times `disc_weight`, and then at most 0.75.
    Gradients are averaged over the processes first, so that all get the weight of the whole batch. Both graphs are
    kept for the backward pass that follows.

    Args:
        reconstruction_loss: scalar, with the perceptual part.
        generator_loss: scalar.
        last_weight: the parameter that both gradients are taken of.
        disc_weight: factor of the ratio.
        scale: the gradient scaler's factor, for fp16, where small gradients would vanish.

    Returns:
        float32 scalar without gradient; NaN where a gradient is not finite.
    """
    gradients = [
        torch.autograd.grad(loss * scale, last_weight, retain_graph=True)[0].float() / scale
        for loss in (reconstruction_loss, generator_loss)
    ]
    gradients = torch.stack(gradients)
    if _num_processes() > 1:
        dist.all_reduce(gradients)
        gradients /= _num_processes()
    norms = gradients.flatten(1).norm(dim=1)
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4) * disc_weight
    return torch.where(norms.isfinite().all(), weight.clamp(max=0.75), torch.nan)
