"""The losses of stage 2 over the targets of whole batches: of all processes, and of all held-out images."""

import torch
from torch.nn import functional as F

from ..modeling.sequence_dq import target_masks

LOSSES = ("loss", "content_loss", "position_loss", "coarse_position_loss", "fine_position_loss")


def named_losses(content_loss, position_losses, config):
    """The losses of `LOSSES`, as the model combines them."""
    position_loss = position_losses.mean()
    loss = config.content_loss_weight * content_loss + config.position_loss_weight * position_loss
    return dict(zip(LOSSES, (loss, content_loss, position_loss, position_losses[0], position_losses[-1])))


def whole_batch_losses(accelerator, output, config):
    """Losses by name whose means over the processes are means over all processes' targets.

    Streams differ in length: the mean of the processes' own means would weigh a target by where it happened to be.

    Args:
        output: `DQTransformerOutput` of this process's part of the batch.
        config: `DQTransformerConfig`.
    """
    counts = target_masks(output.stream, len(config.grid_sizes)).sum((1, 2)).float()
    weights = counts / accelerator.reduce(counts, "mean")
    return named_losses(output.content_loss * weights[0], output.position_losses * weights[1:], config)


def summed_losses(output, config):
    """Sums over each stream's targets in nats, and their counts, (B, 2, 1 + K): contents, then each granularity's
    positions.
    """
    stream = output.stream
    masks = target_masks(stream, len(config.grid_sizes))
    contents, positions = (
        F.cross_entropy(logits.float().transpose(1, 2), targets[:, 1:], reduction="none")
        for logits, targets in (
            (output.content_logits, stream.contents),
            (output.position_logits, stream.positions),
        )
    )
    losses = torch.stack([contents, *[positions] * len(config.grid_sizes)]) * masks
    return torch.stack([losses.sum(2), masks.sum(2)]).permute(2, 0, 1)
