"""Entropy thresholds of the release: a table {percentile: threshold in nats}, kept beside the code."""

import math
import os
from pathlib import Path

from ..hub.folders import read_json_object
from .text import shown

# Entropies in nats below which a share of the patches of a data set's training images lies, in percent.
PUBLISHED_THRESHOLDS = {
    "imagenet": {25: 0.0106980, 50: 1.6777750, 75: 2.4625628},
    "ffhq": {50: 1.5459324, 75: 2.3199890},
}
PUBLISHED_PATCH_SIZE = 16  # pixels


def entropy_threshold(router, patch_size, config_path, thresholds_path):
    """Entropy threshold in nats of an entropy router's fine ratio: from its table, or a published one."""
    json_path, fine_ratio = router.get("json_path", str), router.get("fine_grain_ratito", float)
    if not 0 <= fine_ratio <= 1 or abs(100 * fine_ratio - round(100 * fine_ratio)) > 1e-6:
        raise router.refusal("fine_grain_ratito", "must be a whole percentage between 0 and 1", fine_ratio)
    percentile = 100 - round(100 * fine_ratio)
    table_path = find_beside_or_above(config_path, json_path) if thresholds_path is None else Path(thresholds_path)
    if table_path is not None:
        return read_threshold(table_path, percentile)
    published = [table for name, table in PUBLISHED_THRESHOLDS.items() if name in os.path.basename(json_path).lower()]
    if len(published) != 1 or percentile not in published[0] or patch_size != PUBLISHED_PATCH_SIZE:
        raise FileNotFoundError(
            f"{config_path}: the entropy thresholds {shown(json_path)} (json_path) are neither beside it nor in a folder "
            "above it; give the table by --thresholds (thresholds_path)"
        )
    threshold = published[0][percentile]
    router.defaults.append(
        f"{router.path}.params.json_path: there is no file {shown(json_path)}; the threshold is {threshold} nats, the "
        f"published one for fine_grain_ratito {fine_ratio}"
    )
    return threshold


def find_beside_or_above(config_path, name):
    """Path of a file that a configuration names relative to its own folder or to one above; None if there is none."""
    for place in dict.fromkeys([Path(os.path.abspath(config_path)), Path(config_path).resolve()]):
        for folder in place.parents:
            if os.path.isfile(folder / name):
                return folder / name
    return None


def read_threshold(path, percentile):
    """Entropy threshold in nats of a percentile, from a table {percentile: threshold}."""
    threshold = read_json_object(path).get(str(percentile))
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise ValueError(
            f"{path} must give a number for percentile {percentile}, got {shown(threshold)}; choose a "
            "fine_grain_ratito that the table has"
        )
    return threshold
