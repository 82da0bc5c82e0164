"""From part maps on their grid to probabilities at the images' size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batches import in_batches
from ..images import as_rgb
from .read import calibrate
from .refine import refine_maps
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
        start = part.start or 0
        count = len(self.maps[part])

        def finish(within: slice) -> Tensor:
            return self._finish(slice(start + within.start, start + within.stop))

        found = list(in_batches(count, count, finish))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _finish(self, part: slice) -> Tensor:
        pictures = as_rgb(self.images[part]).to(self.device)
        maps = self.maps[part].to(self.device)
        if self.closer:
            pairs = zip(pictures, maps, self.closer[part], strict=True)
            full = torch.stack([compose(picture, one, closer, self.refine) for picture, one, closer in pairs])
        else:
            full = refine_maps(maps, pictures, self.refine)
        full = only_background(calibrate(full, self.exponent), ~self.present[part].to(full.device))
        return full.float().cpu()


def only_background(maps: Tensor, where: Tensor) -> Tensor:
    """Probabilities [B, K, H, W] that are all background in the images where ``where`` [B] is true."""
    empty = torch.zeros_like(maps)
    empty[:, 0] = 1
    return torch.where(where[:, None, None, None], empty, maps)
