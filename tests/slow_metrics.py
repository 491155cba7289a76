"""Metrics by other libraries and in other words, slowly."""

import numpy as np
import scipy.linalg


def slow_frechet_distance(first, second):
    """With scipy's square root of a matrix."""
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(covariances[0]) @ covariances[1] @ scipy.linalg.sqrtm(covariances[0]))
    difference = first.mean(0) - second.mean(0)
    return difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real)
