"""Make masks of chosen parts, cleaned and shaped for inpainting, one image at a time in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..examples import BACKGROUND, check_known
from .maps import PartMaps

MODES = ("argmax", "threshold", "soft")
EIGHT_NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class MaskShape:
    """Operations on a mask, applied in this order.

    Attributes:
        fill_holes: fill holes inside.
        minimum_area: drop connected regions with fewer pixels.
        grow: widen by a disc of this radius in pixels; negative shrinks.
        feather: soften the border over about so many pixels.
        invert: invert the mask.
    """

    fill_holes: bool = False
    minimum_area: int = 0
    grow: int = 0
    feather: int = 0
    invert: bool = False


def part_masks(
    maps: PartMaps,
    names: Sequence[str] = (),
    mode: str = "argmax",
    threshold: float = 0.5,
    shape: MaskShape | None = None,
) -> Tensor:
    """Return one mask float32 [B, H, W] of the named parts together; of every part when none is named.

    Args:
        maps: of the images.
        names: part names, or "background".
        mode: "argmax", where the parts are the most probable class; "threshold", where their probability reaches
            ``threshold``; "soft", the probability itself.
        threshold: for that mode.
        shape: operations on each mask.

    Raises:
        SlimeError: a name that was not learned.
    """
    classes, wanted = [BACKGROUND, *maps.names], list(names) or list(maps.names)
    check_known(wanted, classes)
    indices = [classes.index(name) for name in dict.fromkeys(wanted)]
    result = torch.empty(len(maps), *maps.size)
    for chunk, masks in _selected(maps, indices, mode, threshold):
        for index, mask in zip(range(chunk.start, chunk.stop), masks, strict=True):
            result[index] = mask if shape is None else shape_mask(mask, shape, mode == "soft")
    return result


def _selected(maps: PartMaps, indices: list[int], mode: str, threshold: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the batch with masks [b, H, W]."""
    if mode == "argmax":
        wanted = torch.tensor(indices, dtype=torch.uint8)
        for index in range(len(maps)):
            chunk = slice(index, index + 1)
            yield chunk, torch.isin(maps.label_map[chunk], wanted).float()
        return
    for chunk, probabilities in maps.chunks():
        together = probabilities[:, indices].sum(1).clamp(0, 1)
        yield chunk, together if mode == "soft" else (together >= threshold).float()


def shape_mask(mask: Tensor, shape: MaskShape, soft: bool = False) -> Tensor:
    """Apply the operations of ``shape`` to one mask [H, W]."""
    cleaned = clean_mask(mask, soft, shape.fill_holes, shape.minimum_area)
    shaped = feather_mask(grow_mask(cleaned, shape.grow), shape.feather)
    return 1 - shaped if shape.invert else shaped


def clean_mask(mask: Tensor, soft: bool, fill_holes: bool, minimum_area: int) -> Tensor:
    """Fill holes and drop small regions of one mask [H, W]; a soft mask is thresholded at 0.5, but keeps its values."""
    if not fill_holes and not minimum_area:
        return mask
    inside = mask.numpy() > 0.5 if soft else mask.numpy() > 0
    if fill_holes:
        inside = ndimage.binary_fill_holes(inside)
    if minimum_area:
        regions, count = ndimage.label(inside, structure=EIGHT_NEIGHBOURS)
        areas = np.bincount(regions.ravel(), minlength=count + 1)
        inside = inside & (areas[regions] >= minimum_area)
    cleaned = torch.from_numpy(np.ascontiguousarray(inside)).float()
    return torch.where(mask > 0.5, mask, 1.0) * cleaned if soft else cleaned


def grow_mask(mask: Tensor, pixels: int) -> Tensor:
    """Widen one mask [H, W] by a disc of ``pixels``; a negative number shrinks."""
    if pixels == 0:
        return mask
    outside = mask.numpy() < 0.5 if pixels > 0 else mask.numpy() >= 0.5
    # Distance to the mask (or, when shrinking, to its outside); an empty mask has nothing to grow from.
    near = np.zeros_like(outside) if outside.all() else ndimage.distance_transform_edt(outside) <= abs(pixels)
    if pixels > 0:
        return torch.maximum(mask, torch.from_numpy(near).float())
    return mask * torch.from_numpy(~near).float()


def feather_mask(mask: Tensor, pixels: int) -> Tensor:
    """Blur the border of one mask [H, W] over about ``pixels`` pixels."""
    if pixels == 0:
        return mask
    blurred = ndimage.gaussian_filter(mask.numpy(), sigma=pixels / 2, mode="nearest")
    return torch.from_numpy(blurred).float().clamp(0, 1)
