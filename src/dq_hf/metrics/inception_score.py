"""Inception score."""

import torch

from dq_hf.metrics.features import FeatureMetric, check_features  # absolute: `evaluate` copies this file
from dq_hf.metrics.streaming import per_image


class InceptionScore(FeatureMetric):
    """exp of the mean KL divergence of each image's classes from those of all images: "IS" by InceptionV3,
    "IS-EffLite0" by EfficientNet-Lite0. From 1 to the number of classes.

    Over all images at once, which depends on no order. (Published values are mostly means over tenths of the images,
    which are lower the fewer images a tenth has.)

    Predictions: (B, 3, H, W), float in [-1, 1] or uint8.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016).
    """

    inputs = ("predictions",)

    def empty_state(self):
        zero = torch.zeros((), dtype=torch.float64)
        return {"probabilities": zero, "negative_entropy": zero, "count": 0}

    def update(self, predictions):
        if predictions is None:
            raise ValueError("the inception score needs predictions, got none")
        self.add_logits(self.extractor.logits(self.unit_images(predictions)))

    def add_logits(self, logits):
        """Add logits (B, classes) of this metric's extractor instead of images."""
        log_probabilities = check_features(logits).double().log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        self.state["probabilities"] = self.state["probabilities"] + probabilities.sum(0)
        self.state["negative_entropy"] = self.state["negative_entropy"] + (probabilities * log_probabilities).sum()
        self.state["count"] += len(logits)

    def result(self, state):
        count = per_image(state["count"])
        marginal = state["probabilities"] / count
        divergence = state["negative_entropy"] / count - marginal.xlogy(marginal).sum()
        return {
            self.extractor.inception_score_name: float(divergence.exp()),
            "extractor": self.extractor.description,
            "num_predictions": count,
        }
