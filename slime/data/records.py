"""Records of segmented images, one JSON line each: the source of every format, and of a resumed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..images import most_probable
from .shapes import coco_rle, mask_of_coco


@dataclass(frozen=True)
class PartRecord:
    """One part in an image.

    Attributes:
        label: 1.. in the order of the embeddings' names.
        counts: its mask, as COCO's compressed run lengths.
        area: in pixels.
        bbox: left, top, width, height in pixels.
        score: mean probability in its mask.
    """

    label: int
    counts: str
    area: int
    bbox: tuple[int, int, int, int]
    score: float


@dataclass(frozen=True)
class Record:
    """One segmented image.

    Attributes:
        name: of the image, as its source has it.
        height, width: in pixels.
        confidence: see :attr:`slime.parts.maps.PartMaps.confidence`.
        parts: in the order of their labels.
    """

    name: str
    height: int
    width: int
    confidence: float
    parts: tuple[PartRecord, ...]

    def line(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False) + "\n"

    @classmethod
    def of(cls, line: str) -> Record:
        body: dict[str, Any] = json.loads(line)
        parts = (PartRecord(**{**part, "bbox": tuple(part["bbox"])}) for part in body.pop("parts"))
        return cls(**body, parts=tuple(parts))

    def labels(self) -> np.ndarray:
        """Return the label map, uint8 [H, W]."""
        labels = np.zeros((self.height, self.width), np.uint8)
        for part in self.parts:
            labels[mask_of_coco(part.counts, self.height, self.width)] = part.label
        return labels


def record_of(name: str, labels: np.ndarray, maps: Tensor, confidence: float) -> Record:
    """Make a record from a label map uint8 [H, W] and the small probabilities [K, h, w] it was made of."""
    scores, parts = part_scores(maps), []
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is not None:
            mask, (rows, columns) = labels == label, place
            box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
            parts.append(PartRecord(label, coco_rle(mask), int(mask.sum()), box, round(scores[label], 4)))
    return Record(name, labels.shape[0], labels.shape[1], round(confidence, 4), tuple(parts))


def part_scores(maps: Tensor) -> Sequence[float]:
    """Return one score per class: its mean probability where it is the most probable in [K, h, w], else its peak."""
    labels = most_probable(maps[None])[0]
    inside = torch.stack([labels == label for label in range(len(maps))])
    sums, counts = (maps * inside).sum((1, 2)), inside.sum((1, 2))
    return [float(x) for x in torch.where(counts > 0, sums / counts.clamp(min=1), maps.amax((1, 2))).clamp(0, 1)]
