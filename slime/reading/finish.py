"""From part maps on their grid to probabilities at the images' size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..batches import in_batches
from .read import calibrate
from .refine import refine_maps, refined_labels
from .zoom import Seen, compose


@dataclass(frozen=True)
class Finished:
    """Small maps with all that finishes them, see :class:`slime.parts.maps.Pixels`.

    Attributes:
        images: [B, H, W, 3], as they were given.
        maps: [B, K, h, w], CPU.
        present: bool [B]; other images are all background.
        refine: see :func:`.refine.refine_maps`.
        exponent: see :func:`.read.calibrate`.
        device: where to compute.
        closer: what closer looks showed of every image, where there were any.
    """

    images: Tensor
    maps: Tensor
    present: Tensor
    refine: str
    exponent: float
    device: torch.device
    closer: Sequence[Sequence[Seen]] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.maps.shape[:2], self.images.shape[1], self.images.shape[2])  # type: ignore[return-value]

    def __call__(self, part: slice) -> Tensor:
        def probabilities(maps: Tensor, pictures: Tensor) -> Tensor:
            return calibrate(refine_maps(maps, pictures, self.refine), self.exponent)

        empty = torch.zeros(self.shape[1:])
        empty[0] = 1
        return self._each(part, probabilities, empty)

    def labels(self, part: slice) -> Tensor:
        """No exponent: it changes no order."""
        return self._each(part, partial(refined_labels, method=self.refine), torch.zeros(self.shape[2:]).byte())

    def _each(self, part: slice, refine: Callable[[Tensor, Tensor], Tensor], empty: Tensor) -> Tensor:
        """What ``refine`` makes of these images' maps, ``empty`` where there is no part."""
        indices = range(*part.indices(len(self.maps)))
        found = torch.empty(len(indices), *empty.shape, dtype=empty.dtype)

        def finish(within: slice) -> None:
            some = slice(indices.start + within.start, indices.start + within.stop)
            pictures, maps = self.images[some].to(self.device), self.maps[some].to(self.device)
            if not (self.closer and any(self.closer[some])):
                found[within] = refine(maps, pictures).cpu()
                return
            for place, picture, one, closer in zip(found[within], pictures, maps, self.closer[some], strict=True):
                if closer:
                    place.copy_(compose(empty.to(self.device, copy=True), picture, closer, refine))
                else:
                    place.copy_(refine(one[None], picture[None])[0])

        for _ in in_batches(len(indices), len(indices), finish):
            pass
        found[~self.present[part]] = empty
        return found
