"""Images for training: any `datasets` source, as `pixel_values` with labels."""

from pathlib import Path

import datasets
import torch


def load_images(data, split, image_column="image"):
    """A split of a data set: a folder of images (class folders give labels) or Parquet files, or a Hub id.

    Raises:
        ValueError: no such split or column; the message lists what there is.
    """
    folder = Path(data)  # absolute, because datasets has builders of its own named "parquet", "csv", "imagefolder"
    splits = datasets.load_dataset(str(folder.absolute() if folder.exists() else data))
    if split not in splits:
        raise ValueError(f"{data} has no split {split!r}; it has {', '.join(splits)}")
    dataset = splits[split]
    if image_column not in dataset.column_names:
        raise ValueError(f"{data} has no column {image_column!r}; it has {', '.join(dataset.column_names)}")
    return dataset.cast_column(image_column, datasets.Image())


def class_names(dataset, label_column):
    """Class names of a label column, in the order of their ids.

    Raises:
        ValueError: no such column, or it is not a `ClassLabel`.
    """
    feature = dataset.features.get(label_column)
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"label column {label_column!r} must hold class labels (datasets.ClassLabel), got {feature}; "
            "use dataset.class_encode_column, or train without labels"
        )
    return feature.names


class ImageCollator:
    """Rows of a data set to {"pixel_values": (B, 3, H, W) in [-1, 1], "class_labels": (B,) long}."""

    def __init__(self, processor, image_column="image", label_column=None):
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column

    def __call__(self, rows):
        batch = {"pixel_values": self.processor([row[self.image_column] for row in rows])["pixel_values"]}
        if self.label_column is not None:
            batch["class_labels"] = torch.tensor([row[self.label_column] for row in rows])
        return batch


def flip_half(pixel_values):
    """Each image mirrored left to right with probability 1/2."""
    flip = torch.rand(len(pixel_values), device=pixel_values.device) < 0.5
    return torch.where(flip[:, None, None, None], pixel_values.flip(-1), pixel_values)
