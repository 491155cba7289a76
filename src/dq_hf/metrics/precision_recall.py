"""Precision and recall of a set of images by nearest neighbours."""

import torch

from dq_hf.metrics.features import FeatureMetric, check_sides  # absolute: `evaluate` copies this file
from dq_hf.metrics.streaming import precise

ROWS = 1024  # of the matrices of distances that are in memory at a time


class PrecisionRecall(FeatureMetric):
    """Precision: the share of predictions that lie among the references, that is, within one reference's distance to its
    k-th nearest other reference. Recall: the same with the sets exchanged.

    Predictions and references: (B, 3, H, W), float in [-1, 1] or uint8; two sets, not pairs: either may be left out of a
    batch. All features are kept. Both figures depend on the numbers of images: sets of one size compare best.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), whose
    features are those of VGG16; here they are the extractor's.

    Args:
        extractor: as in `FeatureMetric`.
        num_neighbours: k.
    """

    def __init__(self, extractor="auto", num_neighbours=3, **kwargs):
        if type(num_neighbours) is not int or num_neighbours < 1:
            raise ValueError(f"num_neighbours must be a whole number of at least 1, got {num_neighbours!r}")
        self.num_neighbours = num_neighbours
        super().__init__(extractor, **kwargs)

    @property
    def identity(self):
        return super().identity | {"num_neighbours": self.num_neighbours}

    def empty_state(self):
        return {side: [] for side in self.inputs}

    def add_features(self, predictions=None, references=None):
        earlier = [*self.state["predictions"], *self.state["references"]]
        width = earlier[0].shape[1] if earlier else None
        for side, features in check_sides(predictions, references, width).items():
            self.state[side].append(features)

    def result(self, state):
        device = next(self.extractor.parameters()).device
        predictions, references = (
            precise(torch.cat(state[side]).to(device)) if state[side] else torch.empty(0, 0) for side in self.inputs
        )
        for side, features in (("predictions", predictions), ("references", references)):
            if len(features) <= self.num_neighbours:
                raise ValueError(
                    f"precision and recall with {self.num_neighbours} neighbours need at least {self.num_neighbours + 1} "
                    f"{side}, got {len(features)}"
                )
        suffix = self.extractor.suffix
        return {
            f"precision-{suffix}": share_within(predictions, references, self.num_neighbours),
            f"recall-{suffix}": share_within(references, predictions, self.num_neighbours),
            "num_neighbours": self.num_neighbours,
            "extractor": self.extractor.description,
            "num_predictions": len(predictions),
            "num_references": len(references),
        }


def share_within(samples, support, num_neighbours):
    """Share of samples (M, D) within the distance of a point of `support` (N, D) to its k-th nearest other point."""
    radii = torch.cat(
        [
            # the nearest of all is the point itself
            distances(rows, support).kthvalue(num_neighbours + 1, dim=1).values
            for rows in support.split(ROWS)
        ]
    )  # (N,)
    return float(
        torch.cat([(distances(rows, support) <= radii).any(dim=1) for rows in samples.split(ROWS)]).double().mean()
    )


def distances(rows, columns):
    """Euclidean distances (R, C), from differences: equal points have distance zero."""
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
