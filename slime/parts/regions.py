"""Find boxes and connected regions of parts in a label map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage


class Region(NamedTuple):
    """A region of a part: its label (1..P), its box in pixels, and its mask bool [height, width] inside the box."""

    label: int
    left: int
    top: int
    width: int
    height: int
    mask: np.ndarray


def part_regions(labels: np.ndarray, parts: int, split: bool, minimum_area: int = 1) -> Iterator[Region]:
    """Yield the regions of a label map [H, W], part by part.

    Args:
        labels: integers, 0 the background.
        parts: classes 1..parts are looked for.
        split: one region per connected component (8-neighbours), else one per part.
        minimum_area: connected components with fewer pixels are left out.
    """
    for label in range(1, parts + 1):
        inside = labels == label
        components, count = ndimage.label(inside, structure=np.ones((3, 3)))
        areas = np.bincount(components.ravel(), minlength=count + 1)
        kept = [index for index in range(1, count + 1) if areas[index] >= minimum_area]
        if not split and kept:
            components, kept = np.isin(components, kept).astype(np.int32), [1]
        boxes = ndimage.find_objects(components)
        for index in kept:
            rows, columns = boxes[index - 1]
            mask = components[rows, columns] == index
            yield Region(label, columns.start, rows.start, mask.shape[1], mask.shape[0], mask)
