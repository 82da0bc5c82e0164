"""Evaluate label maps: the paper's protocol, pooled IoU, boundary F."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

from ..examples import IGNORE

BOUNDARY_TOLERANCE = 0.01  # largest distance of borders that match, as a share of the image's diagonal


@dataclass(frozen=True)
class Scores:
    """IoU in [0, 1]; class 0 is the background.

    Attributes:
        per_class: [K] the paper's: mean over the images that contain the class; NaN where none does.
        pooled: [K] intersections over unions summed over all images.
        per_image: [B, K], NaN where an image does not contain the class.
    """

    per_class: np.ndarray
    pooled: np.ndarray
    per_image: np.ndarray

    @property
    def part_miou(self) -> float:
        """Mean over the parts, without the background."""
        return float(mean_known(self.per_class[1:]))

    @property
    def miou(self) -> float:
        """Mean over all classes, background included, as the paper reports."""
        return float(mean_known(self.per_class))

    @property
    def pooled_part_miou(self) -> float:
        return float(mean_known(self.pooled[1:]))


def boundary_f(prediction: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Return the boundary F-score of one image, mean over the parts in the ground truth (Csurka et al. 2013).

    Args:
        prediction, truth: label maps [H, W].
        classes: number of classes with the background.
    """
    reach = BOUNDARY_TOLERANCE * float(np.hypot(*truth.shape))
    scores = []
    for k in range(1, classes):
        if not (truth == k).any():
            continue
        found, real = _outline(prediction == k), _outline(truth == k)
        if not found.any() or not real.any():
            scores.append(float(not found.any() and not real.any()))
            continue
        (box,) = find_objects((found | real).view(np.uint8))  # distances are needed at the outlines alone
        found, real = found[box], real[box]
        precision = float((distance_transform_edt(~real)[found] <= reach).mean())
        recall = float((distance_transform_edt(~found)[real] <= reach).mean())
        scores.append(2 * precision * recall / max(precision + recall, 1e-9))
    return float(np.mean(scores)) if scores else float("nan")


def false_area(predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], classes: int) -> float:
    """Return the share of the image assigned to parts that it does not contain, mean over the images.

    The paper's metric skips these parts.
    """
    shares = []
    for prediction, truth in zip(predictions, truths, strict=True):
        absent = [k for k in range(1, classes) if not (truth == k).any()]
        shares.append(float(np.isin(prediction, absent).mean()))
    return float(np.mean(shares))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask with a neighbour outside it; the image's border does not count."""
    return mask & ~binary_erosion(mask, border_value=1)


class EvaluationCounts:
    """Counts of images that are evaluated one after the other, by the paper's protocol (official src/utils.py).

    IoU per image and class, classes absent from the truth of an image skipped, mean over images per class, then over
    classes.

    Args:
        classes: number of classes with the background. Pixels whose true label is ``IGNORE`` do not count.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._rows: list[np.ndarray] = []
        self._inter, self._union = np.zeros(classes), np.zeros(classes)

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count an image, label maps [H, W]; raise ValueError if they differ in size."""
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in size")
        row, counts = np.full(self.classes, np.nan), truth != IGNORE
        for k in range(self.classes):
            found, real = (prediction == k) & counts, truth == k
            both, either = np.count_nonzero(found & real), np.count_nonzero(found | real)
            self._inter[k] += both
            self._union[k] += either
            if real.any():
                row[k] = both / either
        self._rows.append(row)

    def scores(self) -> Scores:
        """Return the scores of all images so far."""
        rows = np.stack(self._rows)
        with np.errstate(invalid="ignore", divide="ignore"):
            return Scores(mean_known(rows), np.where(self._union > 0, self._inter / self._union, np.nan), rows)


def evaluate(predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], classes: int) -> Scores:
    """Compare label maps [H, W] of equal sizes, see :class:`EvaluationCounts`."""
    if len(predictions) != len(truths) or not truths:
        raise ValueError(f"{len(predictions)} predictions for {len(truths)} truths")
    counts = EvaluationCounts(classes)
    for prediction, truth in zip(predictions, truths, strict=True):
        counts.add(prediction, truth)
    return counts.scores()


def mean_known(rows: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of the values that are not NaN; NaN where all are."""
    held = ~np.isnan(rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(held.any(0), np.nansum(rows, 0) / held.sum(0), np.nan)
