"""Boxes and separate pieces of parts in a label map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage


class Region(NamedTuple):
    """One piece of a part: its class (1..P), its box in pixels, and its mask [height, width] bool inside the box."""

    label: int
    left: int
    top: int
    width: int
    height: int
    mask: np.ndarray


def part_regions(labels: np.ndarray, parts: int, split: bool, minimum_area: int = 1) -> Iterator[Region]:
    """Regions of a label map [H, W], part by part.

    Args:
        labels: integers, 0 the background.
        parts: classes 1..parts are looked for.
        split: one region a connected piece (8-neighbours), else one a part.
        minimum_area: pieces with fewer pixels are left out.
    """
    for part in range(1, parts + 1):
        inside = labels == part
        pieces, count = ndimage.label(inside, structure=np.ones((3, 3)))
        areas = np.bincount(pieces.ravel(), minlength=count + 1)
        kept = [index for index in range(1, count + 1) if areas[index] >= minimum_area]
        groups = [[index] for index in kept] if split else [kept] * bool(kept)
        for group in groups:
            mask = np.isin(pieces, group)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
            yield Region(part, int(left), int(top), int(right - left), int(bottom - top), mask[top:bottom, left:right])
