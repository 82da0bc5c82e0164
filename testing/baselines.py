"""Trivial baselines that use no model: the mean mask, and nearest neighbours in colour and position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from slime.examples import Example

STRIDE = 4
NEIGHBOURS = 5


def mean_mask(examples: Sequence[Example]) -> np.ndarray:
    """Return the most frequent label [H, W] of every pixel of the examples, for any image of their size."""
    classes = len(examples[0].names) + 1
    votes = sum(np.eye(classes)[example.labels.numpy()] for example in examples)
    return np.asarray(votes).argmax(-1)


def color_neighbours(examples: Sequence[Example], images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return label maps of images uint8 [H, W, 3] by the 5 nearest example pixels in (r, g, b, y, x).

    Only every 4th pixel per axis is used.
    """
    classes = len(examples[0].names) + 1
    known = np.concatenate([_pixels(example.image.numpy() * 255) for example in examples])
    labels = np.concatenate([example.labels.numpy()[::STRIDE, ::STRIDE].ravel() for example in examples])
    tree = cKDTree(known)
    results = []
    for image in images:
        nearest = labels[tree.query(_pixels(image), NEIGHBOURS)[1]]
        votes = np.stack([(nearest == k).sum(1) for k in range(classes)], -1).argmax(-1)
        height, width = image.shape[:2]
        small = votes.reshape(-(-height // STRIDE), -(-width // STRIDE))
        results.append(small.repeat(STRIDE, 0).repeat(STRIDE, 1)[:height, :width])
    return results


def _pixels(image: np.ndarray) -> np.ndarray:
    small = image[::STRIDE, ::STRIDE].astype(np.float32) / 255
    y, x = np.mgrid[0 : small.shape[0], 0 : small.shape[1]]
    where = np.stack([y / small.shape[0], x / small.shape[1]], -1)
    return np.concatenate([small, where], -1).reshape(-1, 5)
