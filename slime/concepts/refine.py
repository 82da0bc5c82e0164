"""Refine coarse part maps by a promptable mask decoder, region by region in crops (PartSTAD, arXiv 2401.05906).

Such a decoder knows objects, not parts: it may answer with the whole object. Guards keep it to the part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..parts.maps import DenseMaps, PartMaps
from ..parts.regions import Region, part_regions
from ..settings import check_settings

PADDING = 0.1  # of a crop, relative to its region, as in ComfyUI's SAM3 Detect
LEAST_PADDING = 8  # pixels
SMALLEST_REGION = 16  # pixels; smaller connected regions stay as they are
LOGIT_LIMIT = 10.0

# Decodes a mask: crop [h, w, 3] in [0, 1] and coarse logits [h, w] to refined logits [h, w].
DecodeMask = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RefineSettings:
    """Guards of the refinement.

    Attributes:
        min_iou: a refined mask whose IoU with the coarse one is lower is refused.
        growth: how far a mask may grow beyond the coarse one, relative to the square root of its area.
    """

    min_iou: float = 0.5
    growth: float = 0.15

    def __post_init__(self) -> None:
        check_settings(self, min_iou=(0, 1), growth=(0, 1))


class Refined(NamedTuple):
    """Refined maps, and how many regions were refined and refused."""

    maps: PartMaps
    refined: int
    refused: int


def refine_parts(
    maps: PartMaps,
    images: Tensor,
    decode_mask: DecodeMask,
    settings: RefineSettings,
    on_region: Callable[[float], None] = lambda done: None,
) -> Refined:
    """Refine every connected region of every part; parts compete for pixels as before.

    Args:
        maps: of the images.
        images: [B, H, W, 3] in [0, 1].
        decode_mask: the decoder.
        settings: the guards.
        on_region: called after every region with the share that is done; an exception from it ends the work.
    """
    results = torch.empty(maps.source.shape, dtype=torch.float16)
    refined = refused = 0
    for index, image in enumerate(images):
        probabilities = maps.source(slice(index, index + 1))[0]
        labels = maps.source.labels(slice(index, index + 1))[0]
        result = probabilities.clone()
        touched = torch.zeros(labels.shape, dtype=torch.bool)
        regions = list(part_regions(labels.numpy(), len(maps.names), split=True, minimum_area=SMALLEST_REGION))
        for number, region in enumerate(regions, start=1):
            if _refine_region(image, probabilities, region, decode_mask, settings, result, touched):
                refined += 1
            else:
                refused += 1
            on_region((index + number / len(regions)) / len(images))
        # What a part has lost goes to the background, unless another part claims it.
        background = 1 - result[1:].amax(0)
        result[0] = torch.where(touched, background, result[0])
        results[index] = result / result.sum(0, keepdim=True).clamp(min=1e-6)
    return Refined(replace(maps, source=DenseMaps(results)), refined, refused)


def _refine_region(
    image: Tensor,
    probabilities: Tensor,
    region: Region,
    decode_mask: DecodeMask,
    settings: RefineSettings,
    result: Tensor,
    touched: Tensor,
) -> bool:
    """Write a region's refined probabilities to ``result``, unless a guard refuses them; return whether it did."""
    rows, columns = _crop(region, touched.shape)
    coarse = np.zeros(touched.shape, dtype=bool)
    inside = slice(region.top, region.top + region.height), slice(region.left, region.left + region.width)
    coarse[inside] = region.mask
    coarse = coarse[rows, columns]
    logits = torch.logit(probabilities[region.label, rows, columns], eps=1e-4).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    # Neighbouring regions of the same part are refined by themselves.
    logits = torch.where(torch.from_numpy(coarse), logits, logits.clamp(max=-1.0))
    decoded = decode_mask(image[rows, columns], logits).float().cpu()
    mask = (decoded > 0).numpy()
    union = int((mask | coarse).sum())
    if not bool(decoded.isfinite().all()) or int((mask & coarse).sum()) < settings.min_iou * union:
        return False
    reach = max(2, round(settings.growth * float(coarse.sum()) ** 0.5))
    allowed = torch.from_numpy(ndimage.binary_dilation(coarse, iterations=reach))
    probability = decoded.sigmoid()
    # Outside the region only what it grows by changes: other regions there keep what they have.
    changed = allowed & (torch.from_numpy(coarse) | (probability > 0.5))
    area = result[region.label, rows, columns]
    result[region.label, rows, columns] = torch.where(changed, probability, area)
    touched[rows, columns] |= changed
    return True


def _crop(region: Region, size: torch.Size) -> tuple[slice, slice]:
    vertical, horizontal = (max(LEAST_PADDING, round(PADDING * length)) for length in (region.height, region.width))
    return (
        slice(max(0, region.top - vertical), min(size[0], region.top + region.height + vertical)),
        slice(max(0, region.left - horizontal), min(size[1], region.left + region.width + horizontal)),
    )
