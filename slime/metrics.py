"""Evaluation: the paper's protocol and pooled IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """IoU in [0, 1]; class 0 is the background.

    Attributes:
        per_class: [K] the paper's: mean over the images that hold the class; NaN where none does.
        pooled: [K] intersections over unions summed over all images.
    """

    per_class: np.ndarray
    pooled: np.ndarray

    @property
    def part_miou(self) -> float:
        """Mean over the parts, without the background."""
        return float(np.nanmean(self.per_class[1:]))

    @property
    def miou(self) -> float:
        """Mean over all classes, background included, as the paper reports."""
        return float(np.nanmean(self.per_class))

    @property
    def pooled_part_miou(self) -> float:
        return float(np.nanmean(self.pooled[1:]))


def evaluate(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], classes: int, ignore: int = 255
) -> Scores:
    """Compare label maps of equal sizes.

    The paper's protocol (official src/utils.py): IoU per image and class, classes absent from the truth of an image
    skipped, mean over images per class, then over classes.

    Args:
        predictions, truths: integer label maps [H, W] each.
        classes: number of classes with the background.
        ignore: label of truth pixels that do not count.
    """
    if len(predictions) != len(truths) or not truths:
        raise ValueError(f"{len(predictions)} predictions for {len(truths)} truths")
    rows = np.full((len(truths), classes), np.nan)
    inter, union = np.zeros(classes), np.zeros(classes)
    for index, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in size")
        counts = truth != ignore
        for k in range(classes):
            found, real = (prediction == k) & counts, truth == k
            both, either = np.count_nonzero(found & real), np.count_nonzero(found | real)
            inter[k] += both
            union[k] += either
            if real.any():
                rows[index, k] = both / either
    with np.errstate(invalid="ignore", divide="ignore"):
        held = ~np.isnan(rows)
        per_class = np.where(held.any(0), np.nansum(rows, 0) / held.sum(0), np.nan)
        return Scores(per_class, np.where(union > 0, inter / union, np.nan))
