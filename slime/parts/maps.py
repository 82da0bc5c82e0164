"""The result of segmentation: part maps of a batch of images, brought to full size when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..images import most_probable
from .palette import Color

CHUNK_VALUES = 2**23  # of probabilities computed at once: 32 MB; filters take a multiple of it


class ProbabilitySource(Protocol):
    """Probabilities at full size, by slices of the batch."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, H, W)."""
        ...

    def __call__(self, chunk: slice) -> Tensor:
        """Return probabilities float32 [b, K, H, W] on the CPU that sum to 1 over K."""
        ...

    def labels(self, chunk: slice) -> Tensor:
        """Return the most probable class of every pixel, uint8 [b, H, W] on the CPU."""
        ...

    def coarse(self, chunk: slice) -> Tensor:
        """Return probabilities [b, K, h, w] at the smallest size at hand."""
        ...


@dataclass(frozen=True)
class DenseMaps:
    """Probabilities in memory, [B, K, H, W] of any floating type."""

    probabilities: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, k, h, w = self.probabilities.shape
        return b, k, h, w

    def __call__(self, chunk: slice) -> Tensor:
        return self.probabilities[chunk].float()

    def labels(self, chunk: slice) -> Tensor:
        return most_probable(self.probabilities[chunk])

    def coarse(self, chunk: slice) -> Tensor:
        return self(chunk)


@dataclass(frozen=True)
class HardMaps:
    """Maps that only know the class of every pixel: uint8 ``label_map`` [B, H, W] of ``classes`` classes."""

    label_map: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, w = self.label_map.shape
        return b, self.classes, h, w

    def __call__(self, chunk: slice) -> Tensor:
        return one_hot(self.label_map[chunk].long(), self.classes).movedim(-1, 1).float()

    def labels(self, chunk: slice) -> Tensor:
        return self.label_map[chunk]

    def coarse(self, chunk: slice) -> Tensor:
        return self(chunk)


@dataclass(frozen=True)
class PartMaps:
    """Result of segmentation.

    Attributes:
        source: gives the probabilities; class 0 is the background, class k is ``names[k - 1]``.
        names: part names.
        palette: one RGB colour per part.
        peaks: float32 [B, P], highest value of every part's map in every image, before refinement.
        example_confidence: mean of the ``peaks`` on the examples, 0 where unknown.
    """

    source: ProbabilitySource
    names: tuple[str, ...]
    palette: tuple[Color, ...]
    peaks: Tensor
    example_confidence: float = 0.0

    @classmethod
    def of_labels(cls, label_map: Tensor, names: Sequence[str], palette: Sequence[Color]) -> PartMaps:
        """Return the maps of label maps uint8 [B, H, W]; the peak of a part is 1 where it is there, else 0."""
        count = len(names)
        shown = [(label_map == part).flatten(1).any(1) for part in range(1, count + 1)]
        maps = HardMaps(label_map, count + 1)
        return cls(maps, tuple(names), tuple(palette), torch.stack(shown, 1).float())

    def __len__(self) -> int:
        return self.source.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.source.shape[2], self.source.shape[3]

    @property
    def confidence(self) -> Tensor:
        """float32 [B]: mean peak of the parts, relative to the examples (1: as confident as there)."""
        return self.peaks.mean(1) / (self.example_confidence or 1.0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the batch with their probabilities [b, K, H, W], within a fixed memory."""
        for chunk in self._slices():
            yield chunk, self.source(chunk)

    def _slices(self) -> Iterator[slice]:
        count, classes, height, width = self.source.shape
        size = max(1, CHUNK_VALUES // (classes * height * width))
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    @property
    def probabilities(self) -> Tensor:
        """float32 [B, K, H, W], all at once: for small batches."""
        return self.source(slice(0, len(self)))

    @cached_property
    def label_map(self) -> Tensor:
        """uint8 [B, H, W]: the most probable class of every pixel."""
        labels = torch.empty(len(self), *self.size, dtype=torch.uint8)
        for chunk in self._slices():
            labels[chunk] = self.source.labels(chunk)
        return labels
