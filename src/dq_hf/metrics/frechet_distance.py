"""Fréchet distance of two sets of images: FID, if the extractor is InceptionV3; rFID for reconstructions and originals."""

import torch

from dq_hf.metrics.features import FeatureMetric, check_features, check_sides  # absolute: `evaluate` copies this file


class FeatureStatistics:
    """Mean and covariance of features, from running sums in float64.

    Statistics are added with `+`.

    Args:
        extractor: description of the extractor that gives the features.
    """

    def __init__(self, extractor):
        self.extractor = extractor
        self.count = 0
        self.total = self.products = None  # sum of x (D,), sum of x xᵀ (D, D)

    def update(self, features):
        """Add features (B, D).

        Raises:
            TypeError, ValueError: another shape or type, or NaN.
        """
        features = check_features(features, None if self.count == 0 else len(self.total)).double()
        total, products = features.sum(0), features.T @ features
        self.total = total if self.count == 0 else self.total + total
        self.products = products if self.count == 0 else self.products + products
        self.count += len(features)

    def __add__(self, other):
        check_same_extractor(self, other)
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        joint = FeatureStatistics(self.extractor)
        joint.count = self.count + other.count
        joint.total, joint.products = self.total + other.total, self.products + other.products
        return joint

    @property
    def mean(self):
        """(D,) float64."""
        return self.total / self.count

    @property
    def covariance(self):
        """(D, D) float64, unbiased, as is usual for FID."""
        return (self.products - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet_distance(first, second):
    """Squared Fréchet distance of the normal distributions with the mean and covariance of two `FeatureStatistics`.

    |m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)). With fewer samples than features the covariances are singular; the
    distance is defined all the same, and, as at every size, larger than that of many samples.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017).

    Raises:
        ValueError: fewer than two images on a side, or features of different extractors.
    """
    check_same_extractor(first, second)
    for name, statistics in (("predictions", first), ("references", second)):
        if statistics.count < 2:
            raise ValueError(
                f"a Fréchet distance needs at least 2 {name}, got {statistics.count}: one has no covariance"
            )
    root = symmetric_root(first.covariance)
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2); those below zero are rounding.
    eigenvalues = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0)
    difference = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = float(difference + traces - 2 * eigenvalues.sqrt().sum())
    return max(distance, 0.0)  # equal sets: zero but for rounding


def symmetric_root(matrix):
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def check_same_extractor(first, second):
    """ValueError unless both statistics are of one extractor's features."""
    if first.extractor != second.extractor:
        raise ValueError(
            f"features of different extractors cannot be compared, got {first.extractor} and {second.extractor}"
        )


class FrechetDistance(FeatureMetric):
    """Fréchet distance of two sets of images, "FID" by InceptionV3 and "FD-EffLite0" by EfficientNet-Lite0.

    Predictions and references: (B, 3, H, W), float in [-1, 1] or uint8; two sets, not pairs: either may be left out of a
    batch. Memory does not grow with their number.
    """

    def empty_state(self):
        return {side: FeatureStatistics(self.extractor.description) for side in self.inputs}

    def add_features(self, predictions=None, references=None):
        width = next((len(each.total) for each in self.state.values() if each.count), None)
        for side, features in check_sides(predictions, references, width).items():
            self.state[side].update(features)

    def result(self, state):
        return {
            self.extractor.frechet_distance_name: frechet_distance(state["predictions"], state["references"]),
            "extractor": self.extractor.description,
            "num_predictions": state["predictions"].count,
            "num_references": state["references"].count,
        }
