"""Peak signal-to-noise ratio."""

import torch

from dq_hf.metrics.streaming import StreamingMetric, image_pairs, per_image  # absolute: `evaluate` copies this file


def psnr(predictions, references):
    """PSNR (B,) float64 in dB of each image, infinite where two are equal; peak to peak, black to white.

    Args:
        predictions, references: (B, 3, H, W), float in [-1, 1] or uint8.
    """
    return decibels(squared_errors(predictions, references))


def squared_errors(predictions, references):
    """Mean squared error (B,) of each image, in units of the peak."""
    predictions, references = image_pairs(predictions, references)
    return (predictions - references).square().mean(dim=(1, 2, 3))


def decibels(error):
    """PSNR of a mean squared error."""
    return -10 * error.log10()


class PSNR(StreamingMetric):
    """PSNR in dB, in its two ways: "PSNR" is the mean over images of each one's, "PSNR of mean error" that of the
    squared error over all pixels of all images, which a few bad images lower. They differ; only like compares with like.

    Predictions and references: (B, 3, H, W), float in [-1, 1] or uint8, image by image.
    """

    def empty_state(self):
        return {
            "psnr": torch.zeros((), dtype=torch.float64),
            "error": torch.zeros((), dtype=torch.float64),
            "count": 0,
        }

    def update(self, predictions, references):
        errors = squared_errors(predictions, references).cpu()
        self.state["psnr"] += decibels(errors).sum()
        self.state["error"] += errors.sum()
        self.state["count"] += len(errors)

    def result(self, state):
        count = per_image(state["count"])
        return {
            "PSNR": float(state["psnr"]) / count,
            "PSNR of mean error": float(decibels(state["error"] / count)),
            "num_images": count,
        }
