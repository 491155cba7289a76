"""Captions of images: those of a row, one of them drawn anew each time it is seen, and rows that have none."""

import hashlib
import logging

import numpy as np

from .images import check_column

logger = logging.getLogger(__name__)


def captions_of(value):
    """The texts of a row's value, which is a string, several, or None; blank ones do not count.

    Raises:
        TypeError: something else.
    """
    texts = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
    for text in texts:
        if not (text is None or isinstance(text, str)):
            raise TypeError(
                f"captions must be strings or lists of strings, got {type(text).__name__}: {text!r}; a table in CSV has numbers "
                "where all texts of a column are digits, JSON Lines and Parquet keep them"
            )
    return [str(text).strip() for text in texts if text is not None and text.strip()]


def all_captions(dataset, column, max_missing_share=None):
    """The distinct captions of a data set, in the order in which they come.

    Args:
        column: of the captions, as in `captions_of`.
        max_missing_share: share of rows without a caption, in [0, 1], above which it is an error, as the option
            `--max_uncaptioned_share` has it; None: all need one.

    Raises:
        ValueError: no such column, too many rows without a caption, or none with one.
        TypeError: as `captions_of`.
    """
    check_column(dataset, column)
    captions, num_missing = {}, 0
    for value in dataset.with_format(None)[column]:
        texts = captions_of(value)
        captions |= dict.fromkeys(texts)
        num_missing += not texts
    share = max_missing_share or 0.0
    if not captions or num_missing > share * len(dataset):
        more = "" if max_missing_share is None else ", or raise --max_uncaptioned_share"
        raise ValueError(
            f"at most {share:.2%} of the images may have no caption in column {column!r}, got {num_missing} "
            f"of {len(dataset)}; write them, or remove these images{more}"
        )
    if num_missing:
        logger.warning("%d of %d images have no caption: they count as images of no text", num_missing, len(dataset))
    return list(captions)


class CaptionDraw:
    """One caption a row, drawn anew in each epoch.

    Which one depends on the seed, the epoch and the row's picture only: in any batch, process and worker, and after
    resuming, it is the same.

    Args:
        column: of the captions, as in `captions_of`.
        seed: another one, another draw.
    """

    def __init__(self, column, seed=0):
        self.column = column
        self.seed = seed

    def __call__(self, rows, pictures, epoch):
        """The text of each row, an empty one where it has no caption; arguments as for `more` of a collator."""
        texts = []
        for row, picture in zip(rows, pictures):
            digest = hashlib.blake2b(f"{self.seed} {epoch} {picture}".encode(), digest_size=8).digest()
            own = captions_of(row[self.column])
            texts.append(own[int.from_bytes(digest, "big") % len(own)] if own else "")
        return texts


def with_wrong_captions(dataset, column, wrong_column):
    """The data set, with another row's captions beside each row's own, mixed once and for all."""
    values = dataset.with_format(None)[column]
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    other = dict(zip(order, [*order[1:], *order[:1]]))
    wrong = [values[other[row]] for row in range(len(dataset))]
    return dataset.add_column(wrong_column, wrong, feature=dataset.features[column])
