"""Measures of reconstructions, codes and samples, as modules of `evaluate` that never hold the images.

`evaluate.load(path)` takes the path of a file of this folder that holds a metric, for example `psnr.py`; the classes
can be imported and made without it just as well.
"""

from .code_statistics import CodeStatistics
from .frechet_distance import FeatureStatistics, FrechetDistance, frechet_distance
from .inception_score import InceptionScore
from .perceptual_distance import PerceptualDistance
from .precision_recall import PrecisionRecall
from .psnr import PSNR, psnr
from .ssim import SSIM, ssim

__all__ = [
    "PSNR",
    "SSIM",
    "CodeStatistics",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionScore",
    "PerceptualDistance",
    "PrecisionRecall",
    "frechet_distance",
    "psnr",
    "ssim",
]
