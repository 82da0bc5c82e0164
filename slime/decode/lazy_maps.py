"""Compute probabilities at the images' size from part maps on their grid, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..batches import in_batches
from .closeups import Closeup, paste_closeups
from .linear import apply_temperature
from .refine import refine_maps, refined_labels


@dataclass(frozen=True)
class LazyMaps:
    """Part maps on their grid, with what brings them to full size; a :class:`slime.parts.maps.ProbabilitySource`.

    Attributes:
        images: [B, H, W, 3], as they were given.
        maps: [B, K, h, w], CPU.
        present: bool [B]; the other images are all background.
        refine: see :func:`.refine.refine_maps`.
        temperature: see :func:`.linear.apply_temperature`.
        device: where to compute.
        closeups: of every image, where there are any.
    """

    images: Tensor
    maps: Tensor
    present: Tensor
    refine: str
    temperature: float
    device: torch.device
    closeups: Sequence[Sequence[Closeup]] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.maps.shape[:2], self.images.shape[1], self.images.shape[2])  # type: ignore[return-value]

    def __call__(self, chunk: slice) -> Tensor:
        def probabilities(maps: Tensor, images: Tensor) -> Tensor:
            return apply_temperature(refine_maps(maps, images, self.refine), self.temperature)

        empty = torch.zeros(self.shape[1:])
        empty[0] = 1
        return self._finish(chunk, probabilities, empty)

    def labels(self, chunk: slice) -> Tensor:
        """Return the most probable class; the temperature does not change it."""
        return self._finish(chunk, partial(refined_labels, method=self.refine), torch.zeros(self.shape[2:]).byte())

    def coarse(self, chunk: slice) -> Tensor:
        """Return the probabilities [b, K, h, w] on their grid; at full size where there are close-ups."""
        return self(chunk) if self.closeups else self.maps[chunk]

    def for_image(self, index: int, image: Tensor) -> LazyMaps:
        """Return the maps of one image, refined along ``image`` [H, W, 3], which is the same at another size."""
        chunk = slice(index, index + 1)
        closeups = self.closeups[chunk]
        return replace(self, images=image[None], maps=self.maps[chunk], present=self.present[chunk], closeups=closeups)

    def _finish(self, chunk: slice, refine: Callable[[Tensor, Tensor], Tensor], empty: Tensor) -> Tensor:
        """Refine the maps of a chunk of the batch; ``empty`` is the result for an image without parts."""
        indices = range(*chunk.indices(len(self.maps)))
        result = torch.empty(len(indices), *empty.shape, dtype=empty.dtype)

        def finish(within: slice) -> None:
            some = slice(indices.start + within.start, indices.start + within.stop)
            images, maps = self.images[some].to(self.device), self.maps[some].to(self.device)
            if not (self.closeups and any(self.closeups[some])):
                result[within] = refine(maps, images).cpu()
                return
            for target, image, coarse, closeups in zip(result[within], images, maps, self.closeups[some], strict=True):
                if closeups:
                    target.copy_(paste_closeups(empty.to(self.device, copy=True), image, closeups, refine))
                else:
                    target.copy_(refine(coarse[None], image[None])[0])

        for _ in in_batches(len(indices), len(indices), finish):
            pass
        result[~self.present[chunk]] = empty
        return result
