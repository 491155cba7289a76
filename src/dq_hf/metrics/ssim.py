"""Structural similarity."""

import torch
import torch.nn.functional as F

from dq_hf.metrics.streaming import StreamingMetric, image_pairs, per_image  # absolute: `evaluate` copies this file

WINDOW, SIGMA = 11, 1.5  # pixels; these and the constants are the paper's
C1, C2 = 0.01**2, 0.03**2  # in units of the peak, squared


def ssim(predictions, references):
    """SSIM (B,) float64 of each image, at most 1: Gaussian windows that lie wholly inside, mean over the three colours.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004).

    Args:
        predictions, references: (B, 3, H, W), float in [-1, 1] or uint8; sides of at least 11 pixels.

    Raises:
        ValueError: smaller images.
    """
    x, y = image_pairs(predictions, references)
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW} pixels, got {x.shape[3]}x{x.shape[2]}")
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (blur(values) for values in (x, y, x * x, y * y, x * y))
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    structure = (2 * covariance + C2) / (variances + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (structure * luminance).mean(dim=(1, 2, 3))


def blur(images):
    """Gaussian mean of each window that lies inside, (B, 3, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    kernel = (weights / weights.sum()).expand(3, 1, 1, WINDOW)
    return F.conv2d(F.conv2d(images, kernel, groups=3), kernel.transpose(2, 3), groups=3)


class SSIM(StreamingMetric):
    """Structural similarity, mean over images, at most 1.

    Predictions and references: (B, 3, H, W), float in [-1, 1] or uint8, image by image; sides of at least 11 pixels.
    """

    def empty_state(self):
        return {"ssim": torch.zeros((), dtype=torch.float64), "count": 0}

    def update(self, predictions, references):
        values = ssim(predictions, references).cpu()
        self.state["ssim"] += values.sum()
        self.state["count"] += len(values)

    def result(self, state):
        count = per_image(state["count"])
        return {"SSIM": float(state["ssim"]) / count, "num_images": count}
