"""SLiMe Part Mask: one or several parts as a MASK ready for inpainting."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui
from scipy import ndimage
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.examples import BACKGROUND
from ..slime.segment import PartMaps
from .common import EXPERT, PartsSocket, named_errors, schema, split_names, to_core


class SLiMePartMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartMask",
            display_name="SLiMe Part Mask",
            description="The mask of one or several parts, cleaned for inpainting.",
            search_aliases=["part mask", "grow mask", "feather mask", "fill holes", "mask by name"],
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.String.Input(
                    "names",
                    default="",
                    tooltip="Parts to take, separated by commas; background is one too. Empty takes every part.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["argmax", "threshold", "soft"],
                    default="argmax",
                    tooltip="argmax: where the parts are the most probable class. threshold: where their probability "
                    "reaches the threshold. soft: the probability itself.",
                ),
                io.Float.Input(
                    "threshold", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="For the mode threshold."
                ),
                io.Int.Input(
                    "grow", default=0, min=-512, max=512, tooltip="Widen the mask by pixels; negative shrinks it."
                ),
                io.Int.Input(
                    "feather", default=0, min=0, max=512, tooltip="Soften the border over about so many pixels."
                ),
                io.Boolean.Input("invert", default=False, tooltip="Everything but these parts."),
                io.Boolean.Input(
                    "fill_holes", default=False, optional=True, **EXPERT, tooltip="Close holes inside the mask."
                ),
                io.Int.Input(
                    "minimum_area",
                    default=0,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    **EXPERT,
                    tooltip="Drop separate pieces with fewer pixels.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="One mask for each image; empty where nothing is found.")
            ],
        )

    @classmethod
    def execute(
        cls,
        parts,
        names="",
        mode="argmax",
        threshold=0.5,
        grow=0,
        feather=0,
        invert=False,
        fill_holes=False,
        minimum_area=0,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Part Mask"):
            mask = select_parts(parts.maps, split_names(names), mode, threshold)
        cleaned = torch.stack([_clean(layer, mode == "soft", fill_holes, minimum_area) for layer in mask])
        shaped = feather_mask(grow_mask(cleaned, grow), feather)
        mask = 1 - shaped if invert else shaped
        return io.NodeOutput(to_core(mask), ui=ui.PreviewMask(mask, cls=cls))


def select_parts(maps: PartMaps, names: list[str], mode: str, threshold: float) -> Tensor:
    """MASK [B, H, W] of the named parts (every part when none is named).

    Raises:
        SlimeError: a name that was not learned.
    """
    classes = [BACKGROUND, *maps.names]
    wanted = names or list(maps.names)
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        raise SlimeError(f"there is no part {', '.join(unknown)}; these were learned: {', '.join(maps.names)}.")
    indices = [classes.index(name) for name in dict.fromkeys(wanted)]
    if mode == "argmax":
        return torch.isin(maps.label_map, torch.tensor(indices)).float()
    probability = maps.probabilities[:, indices].sum(1).clamp(0, 1)
    return probability if mode == "soft" else (probability >= threshold).float()


def _clean(mask: Tensor, soft: bool, fill_holes: bool, minimum_area: int) -> Tensor:
    """Fill holes and drop specks of one mask [H, W]; a soft mask is judged at 0.5 and keeps its values inside."""
    if not fill_holes and not minimum_area:
        return mask
    inside = mask.numpy() > 0.5 if soft else mask.numpy() > 0
    if fill_holes:
        inside = ndimage.binary_fill_holes(inside)
    if minimum_area:
        pieces, count = ndimage.label(inside, structure=np.ones((3, 3)))
        areas = np.bincount(pieces.ravel(), minlength=count + 1)
        inside = inside & (areas[pieces] >= minimum_area)
    cleaned = torch.from_numpy(np.ascontiguousarray(inside)).float()
    return torch.where(mask > 0.5, mask, 1.0) * cleaned if soft else cleaned


def grow_mask(mask: Tensor, pixels: int) -> Tensor:
    """Widen [B, H, W] by a disc of ``pixels``; a negative number shrinks."""
    if pixels == 0:
        return mask
    radius = abs(pixels)
    outside = mask.numpy() < 0.5 if pixels > 0 else mask.numpy() >= 0.5
    grown = []
    for layer in outside:
        # Distance to the mask (or, when shrinking, to what is outside it); no seed means nothing to grow from.
        near = ndimage.distance_transform_edt(layer) <= radius if not layer.all() else np.zeros_like(layer)
        grown.append(near if pixels > 0 else ~near)
    shape = torch.from_numpy(np.stack(grown)).float()
    return torch.maximum(mask, shape) if pixels > 0 else mask * shape


def feather_mask(mask: Tensor, pixels: int) -> Tensor:
    """Gaussian border about ``pixels`` wide."""
    if pixels == 0:
        return mask
    blurred = ndimage.gaussian_filter(mask.numpy(), sigma=(0, pixels / 2, pixels / 2), mode="nearest")
    return torch.from_numpy(blurred).float().clamp(0, 1)
