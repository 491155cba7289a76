"""What metrics on features of images share."""

from abc import ABC

import torch

from ..networks.extractors import make_extractor
from .streaming import StreamingMetric, unit_images


class FeatureMetric(StreamingMetric, ABC):
    """A metric that sees images through a feature extractor, which every result names.

    Args:
        extractor: as in `make_extractor`: "auto", "inception-v3", "efficientnet-lite0" or a `FeatureExtractor`, which may
            be shared by several metrics. It follows the images to their device.
    """

    def __init__(self, extractor="auto", **kwargs):
        self.extractor = make_extractor(extractor)
        super().__init__(**kwargs)

    @property
    def identity(self):
        return {"extractor": self.extractor.description}

    def unit_images(self, images):
        """Images for the extractor, which is then on their device."""
        images = unit_images(images).float()
        self.extractor.to(images.device)
        return images

    def update(self, predictions, references):
        given = {"predictions": predictions, "references": references}
        images = {side: self.unit_images(images) for side, images in given.items() if images is not None}
        self.add_features(**{side: self.extractor.features(each) for side, each in images.items()})

    def add_features(self, predictions=None, references=None):
        """Add features (B, D) of this metric's extractor instead of images."""
        raise NotImplementedError


def check_sides(predictions, references, width=None):
    """{side: features} of what was given, checked as by `check_features`; ValueError if the sides have other widths."""
    given = {"predictions": predictions, "references": references}
    checked = {side: check_features(each, width) for side, each in given.items() if each is not None}
    if len({each.shape[1] for each in checked.values()}) > 1:
        raise ValueError("features of predictions and references must have as many columns")
    return checked


def check_features(features, width=None):
    """Features (B, D) on the CPU; ValueError for another shape, or NaN."""
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or not features.is_floating_point():
        got = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, torch.Tensor) else type(features)
        raise TypeError(f"features must be a float tensor (B, D), got {got}")
    if width is not None and features.shape[1] != width:
        raise ValueError(f"features must have {width} columns as before, got {features.shape[1]}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinite values")
    return features.detach().cpu()
