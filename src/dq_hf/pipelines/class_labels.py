"""Class names and ids, as users give them."""

import difflib
import operator

from ..modeling.conditioning_dq import inputs_of


def as_list(labels):
    """A list of labels, from one label, a list, a tensor or an array."""
    if hasattr(labels, "tolist"):
        labels = labels.tolist()
    return list(labels) if isinstance(labels, (list, tuple, range)) else [labels]


def class_ids(labels, config):
    """Ids of class names or ids.

    Args:
        labels: a list of names or integers.
        config: a `DQTransformerConfig`.

    Raises:
        TypeError: neither name nor integer.
        ValueError: unknown name (the nearest ones are suggested), id out of range, or a model without classes.
    """
    if config.num_classes == 0 and labels:
        raise ValueError(f"this model takes {inputs_of(config)}: it has no classes, got {labels[0]!r}")
    return [class_id(label, config) for label in labels]


def class_id(label, config):
    """Id of one class name or id."""
    if isinstance(label, str):
        if label in config.label2id:
            return config.label2id[label]
        close = difflib.get_close_matches(label.lower(), [str(name) for name in config.label2id], n=3, cutoff=0.5)
        names = [config.id2label[i] for i in range(min(config.num_classes, 20))]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known classes: {', '.join(names)}"
        raise ValueError(f"unknown class {label!r}; {hint}")
    try:
        if isinstance(label, bool):
            raise TypeError
        label = operator.index(label)
    except TypeError:
        raise TypeError(f"a class label must be a name or an integer, got {label!r}") from None
    if not 0 <= label < config.num_classes:
        raise ValueError(f"class labels must lie in 0 ... {config.num_classes - 1}, got {label}")
    return label
