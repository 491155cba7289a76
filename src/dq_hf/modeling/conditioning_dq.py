"""What an image is generated for, as a value: which start token opens its stream, and what both stacks read before it.

A class is a start token; a text is a prefix.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from .modeling_utils_dq import call_device, check_indices


@dataclass(frozen=True)
class Condition:
    """What the images of a batch are generated for, B images.

    Args:
        labels: (B,) long, which of the start tokens opens every granularity; 0 without classes.
        prefix: (B, T, width) float, what both stacks read before the stream, or None.
        null_label: start-token label that says nothing of the class; None: the model was trained without one.
        null_prefix: (B, T, width) float, the prefix of the twin; None without a prefix.
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

    def is_finite(self):
        """Whether the prefixes are, the twin's too; waits for the device."""
        prefixes = (self.prefix, self.null_prefix)
        return all(prefix.isfinite().all() for prefix in prefixes if prefix is not None)

    def hidden(self):
        """The twin that says nothing, for guidance and for dropout.

        Raises:
            ValueError: the model was trained without one.
        """
        if self.null_label is None and self.null_prefix is None:
            raise ValueError(
                "guidance_scale other than 1 needs a model trained with class_dropout, or with text; this one has "
                "class_dropout 0 and no text"
            )
        labels = self.labels if self.null_label is None else torch.full_like(self.labels, self.null_label)
        return replace(self, labels=labels, prefix=self.null_prefix)

    def repeat(self, repeats):
        """Each image's condition so often, one after the other."""
        columns = {"labels": self.labels, "prefix": self.prefix, "null_prefix": self.null_prefix}
        given = {name: column for name, column in columns.items() if column is not None}
        return replace(self, **{name: column.repeat_interleave(repeats, dim=0) for name, column in given.items()})

    def hide(self, labels=None, prefixes=None):
        """This condition, but with the twin's label or prefix where (B,) bool is true; None: nowhere."""
        hidden, changed = self.hidden(), {}
        if labels is not None:
            changed["labels"] = torch.where(labels, hidden.labels, self.labels)
        if prefixes is not None:
            changed["prefix"] = torch.where(prefixes[:, None, None], hidden.prefix, self.prefix)
        return replace(self, **changed)


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
            raise ValueError(f"this model takes {inputs_of(config)}: leave out class_labels")
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
    labels = check_indices("class_labels", class_labels, ("B",), config.num_classes, device)
    if len(labels) == 1 and batch is not None:
        labels = labels.expand(batch)
    if batch is not None and len(labels) != batch:
        raise ValueError(f"class_labels must hold one label or one for each of {batch} images, got {len(labels)}")
    return Condition(labels, null_label=null_label)


def inputs_of(config):
    """What a model makes images of, for messages."""
    classes = f"class_labels (integers in 0 ... {config.num_classes - 1})" if config.num_classes else ""
    prompt = "a prompt" if config.text_length is not None else ""
    nothing = "nothing to go by, it is unconditional (num_classes 0)"
    return " and ".join(part for part in (classes, prompt) if part) or nothing


class TextPrefix(nn.Module):
    """The states of any text encoder as a prefix of fixed length: LayerNorm, then one linear layer.

    A slot without a token gets a learned vector of its own. No text, the empty prompt, the unconditional half of guidance and
    what dropout leaves of a caption are all the same: no slot has a token.
    """

    def __init__(self, config):
        super().__init__()
        self.length, self.text_hidden_size = config.text_length, config.text_hidden_size
        self.norm = nn.LayerNorm(config.text_hidden_size, eps=1e-5)
        self.projection = nn.Linear(config.text_hidden_size, config.hidden_size)
        self.padding = nn.Embedding(config.text_length, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None):
        """(B, length, width) of states (B, T, d), T at most the length, and their mask (B, T): 0 where there is no token."""
        hidden_states, attention_mask = check_text(hidden_states, attention_mask, self.length, self.text_hidden_size)
        hidden_states = hidden_states.to(call_device(self.projection), self.projection.weight.dtype)
        missing = self.length - hidden_states.shape[1]
        hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, missing))
        mask = nn.functional.pad(attention_mask.to(hidden_states.device), (0, missing))[..., None] > 0
        hidden_states = hidden_states.where(mask, 0)  # else what is not finite there would reach the gradients
        return torch.where(mask, self.projection(self.norm(hidden_states)), self.empty())

    def empty(self):
        """The prefix of no text, (length, width)."""
        return self.padding(torch.arange(self.length, device=call_device(self.padding)))


def check_text(
    hidden_states, attention_mask, length, size, name="encoder_hidden_states", mask="encoder_attention_mask"
):
    """States and mask of a text encoder, or TypeError or ValueError with these names."""
    if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
        got = getattr(hidden_states, "dtype", type(hidden_states).__name__)
        raise TypeError(f"{name} must be a float tensor (B, T, {size}), got {got}")
    shape = tuple(hidden_states.shape)
    if len(shape) != 3 or shape[2] != size or not 1 <= shape[1] <= length or shape[0] == 0:
        raise ValueError(
            f"{name} must have shape (B, T, {size}) with T at most text_length {length}, got {shape}; "
            "cut longer texts when they are tokenised"
        )
    if attention_mask is None:
        attention_mask = torch.ones(shape[:2], dtype=torch.long, device=hidden_states.device)
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != shape[:2]:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(f"{mask} must have shape {shape[:2]}, that of {name}; got {got}")
    return hidden_states, attention_mask
