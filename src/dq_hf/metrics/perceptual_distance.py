"""Perceptual distance: LPIPS, or a stand-in whose weights install as a package."""

import torch

from dq_hf.data.fingerprint import hash_weights
from dq_hf.metrics.streaming import StreamingMetric, image_pairs, per_image
from dq_hf.networks.extractors import make_first  # absolute: `evaluate` copies this file
from dq_hf.networks.perceptual import LPIPS, PERCEPTUAL_LOSSES, EfficientNetLitePerceptualLoss, load_efficientnet_lite0


class PerceptualDistance(StreamingMetric):
    """Perceptual distance, mean over images: "LPIPS" (VGG16), or "PD-EffLite0" by EfficientNet-Lite0, which is not LPIPS
    and cannot be compared with it.

    Predictions and references: (B, 3, H, W), float in [-1, 1] or uint8, image by image.

    Args:
        network: "lpips", "efficientnet-lite0", "auto" (the first whose weights are available), or such a network of
            `dq_hf.networks.perceptual`. It follows the images to their device.
    """

    def __init__(self, network="auto", **kwargs):
        ready = isinstance(network, (LPIPS, EfficientNetLitePerceptualLoss))
        self.network = network if ready else make_first(network, PERCEPTUAL_LOSSES, "perceptual network")
        if isinstance(self.network, LPIPS):
            self.figure, weights = "LPIPS", self.network
        else:  # the weights as they were before batch norms were folded into them, on every machine the same
            self.figure, weights = "PD-EffLite0", load_efficientnet_lite0()
        self.network_description = f"{self.figure}, weights {hash_weights(weights.state_dict())}"
        super().__init__(**kwargs)

    @property
    def identity(self):
        return {"network": self.network_description}

    def empty_state(self):
        return {"distance": torch.zeros((), dtype=torch.float64), "count": 0}

    def update(self, predictions, references):
        predictions, references = (images.float() * 2 - 1 for images in image_pairs(predictions, references))
        values = self.network.to(predictions.device).distance(predictions, references)
        self.state["distance"] += values.double().cpu().sum()
        self.state["count"] += len(values)

    def result(self, state):
        count = per_image(state["count"])
        return {
            self.figure: float(state["distance"]) / count,
            "network": self.network_description,
            "num_images": count,
        }
