"""What an image is generated for, as a value: which start token opens its stream, and what both stacks read before it."""

from dataclasses import dataclass, replace

import torch

from .modeling_utils_dq import check_indices


@dataclass(frozen=True)
class Condition:
    """What the images of a batch are generated for, B images.

    Args:
        labels: (B,) long, which of the start tokens opens every granularity; 0 without classes.
        prefix: (B, T, width) float, what both stacks read before the stream, or None.
        null_label: start-token label that says nothing of the class; None: the model was trained without one.
        null_prefix: (T, width) float, the prefix that says nothing, or None.
    """

    labels: torch.Tensor
    prefix: torch.Tensor | None = None
    null_label: int | None = None
    null_prefix: torch.Tensor | None = None

    def __len__(self):
        return len(self.labels)

    @property
    def prefix_length(self):
        """Elements that the stacks read before the stream."""
        return 0 if self.prefix is None else self.prefix.shape[1]

    def hidden(self):
        """The twin that says nothing, for guidance and for dropout.

        Raises:
            ValueError: the model was trained without one.
        """
        if self.null_label is None and self.null_prefix is None:
            raise ValueError(
                "guidance_scale other than 1 needs a model trained with class_dropout; this one has class_dropout 0"
            )
        labels = self.labels if self.null_label is None else torch.full_like(self.labels, self.null_label)
        prefix = self.prefix if self.null_prefix is None else self.null_prefix.expand_as(self.prefix)
        return replace(self, labels=labels, prefix=prefix)

    def hide(self, rows):
        """This condition, but the twin's where `rows` (B,) bool is true."""
        hidden, prefix = self.hidden(), self.prefix
        if prefix is not None:
            prefix = torch.where(rows[:, None, None], hidden.prefix, prefix)
        return replace(self, labels=torch.where(rows, hidden.labels, self.labels), prefix=prefix)


def class_condition(class_labels, batch, config, device) -> Condition:
    """The condition of class labels, or of none for an unconditional model.

    Args:
        class_labels: (B,) integers, or one for all; None for an unconditional model.
        batch: number of images; None: as many as there are labels, or 1.
        config: `DQTransformerConfig`.
        device: of the result.

    Raises:
        TypeError, ValueError: labels given to an unconditional model, missing, of another shape or out of range.
    """
    null_label = config.num_classes if config.class_dropout > 0 else None
    if config.num_classes == 0:
        if class_labels is not None:
            raise ValueError("this model is unconditional (num_classes 0): leave out class_labels")
        return Condition(torch.zeros(batch or 1, dtype=torch.long, device=device))
    if class_labels is None:
        raise ValueError(
            f"this model is class-conditional: give class_labels, integers in 0 ... {config.num_classes - 1}"
        )
    if not isinstance(class_labels, torch.Tensor):
        try:
            class_labels = torch.tensor(class_labels)
        except (TypeError, ValueError, RuntimeError):  # strings, None, ragged lists
            raise TypeError(f"class_labels must be integers, got {class_labels!r}") from None
    if class_labels.numel() == 0:
        raise ValueError("class_labels must hold at least one label, got none")
    if class_labels.dim() == 0:
        class_labels = class_labels[None]
    labels = check_indices("class_labels", class_labels, (None,), config.num_classes, device)
    if len(labels) == 1 and batch is not None:
        labels = labels.expand(batch)
    if batch is not None and len(labels) != batch:
        raise ValueError(f"class_labels must hold one label or one for each of {batch} images, got {len(labels)}")
    return Condition(labels, null_label=null_label)
