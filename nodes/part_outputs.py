"""Parts to Mask List, to BBoxes and to SEGS: the forms that other nodes take."""

from __future__ import annotations

import json
from collections import namedtuple
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..slime.parts.masks import part_masks
from ..slime.parts.regions import Region, part_regions
from .common import RESULTS, Parts, PartsSocket, schema, to_core

# Impact Pack's form of one segment (modules/impact/core.py); any tuple with these fields serves its nodes.
SEG = namedtuple(  # it is theirs
    "SEG", ["cropped_image", "cropped_mask", "confidence", "crop_region", "bbox", "label", "control_net_wrapper"]
)
# Core's type where there is one (0.15.0 and later); the values are plain dictionaries in either case.
BoundingBoxSocket = getattr(io, "BoundingBox", None) or io.Custom("BOUNDING_BOX")


def _region_inputs() -> list[Any]:
    return [
        PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
        io.Boolean.Input("separate", default=True, tooltip="On: one per connected region. Off: one per part."),
        io.Int.Input(
            "minimum_area", default=16, min=1, max=1_000_000, tooltip="Ignore connected regions with fewer pixels."
        ),
    ]


def _regions(parts: Parts, separate: bool, minimum_area: int) -> list[list[Region]]:
    """Return the regions of every image."""
    labels = parts.maps.label_map.numpy()
    return [list(part_regions(label, len(parts.maps.names), separate, minimum_area)) for label in labels]


def _score(probabilities: torch.Tensor, region: Region) -> float:
    """Return the mean probability of the part inside the region, from an image's probabilities [K, H, W]."""
    rows, columns = slice(region.top, region.top + region.height), slice(region.left, region.left + region.width)
    return float(probabilities[region.label, rows, columns][torch.from_numpy(region.mask)].mean())


class SLiMePartList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartList",
            category=RESULTS,
            display_name="SLiMe Parts to Mask List",
            description="Makes one mask per part, as a list, with the names in the same order.",
            search_aliases="part list, split masks, mask list, masks by name, separate masks",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.Combo.Input(
                    "mode",
                    options=["argmax", "soft"],
                    default="argmax",
                    tooltip="argmax: exactly 0 or 1. soft: the probability of the part.",
                ),
                io.Boolean.Input("skip_empty", default=False, tooltip="Leave out parts that no image contains."),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="masks", is_output_list=True, tooltip="One per part, with all images of the batch."
                ),
                io.String.Output(display_name="names", is_output_list=True, tooltip="The part names, in that order."),
                io.Mask.Output(
                    display_name="mask_batch", tooltip="The same as one batch: part by part, each with all images."
                ),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, mode: str = "argmax", skip_empty: bool = False) -> io.NodeOutput:
        labels, masks = parts.maps.label_map, {}
        for index, name in enumerate(parts.maps.names, start=1):
            if not skip_empty or (labels == index).any():
                masks[name] = to_core(part_masks(parts.maps, [name], mode))
        if not masks:
            masks[""] = to_core(torch.zeros(labels.shape))  # an empty list would stop the workflow
        batch = torch.cat(list(masks.values()))
        return io.NodeOutput(list(masks.values()), list(masks), batch, ui=ui.PreviewMask(batch, cls=cls))


class SLiMePartBoxes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartBoxes",
            category=RESULTS,
            display_name="SLiMe Parts to BBoxes",
            description="Makes bounding boxes of the parts, with names and scores.",
            search_aliases="part boxes, bounding box, bbox, detect parts",
            inputs=_region_inputs(),
            outputs=[
                BoundingBoxSocket.Output(
                    display_name="bboxes", tooltip="For each image a list of boxes: x, y, width, height."
                ),
                io.String.Output(display_name="json", tooltip="The same as JSON text."),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, separate: bool = True, minimum_area: int = 16) -> io.NodeOutput:
        boxes = []
        for image, regions in enumerate(_regions(parts, separate, minimum_area)):
            probabilities = parts.maps.source(slice(image, image + 1))[0]
            boxes.append(
                [
                    {
                        "x": region.left,
                        "y": region.top,
                        "width": region.width,
                        "height": region.height,
                        "label": parts.maps.names[region.label - 1],
                        "score": round(_score(probabilities, region), 4),
                    }
                    for region in regions
                ]
            )
        text = json.dumps(boxes)
        return io.NodeOutput(boxes, text, ui=ui.PreviewText(text))


class SLiMePartSegs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = _region_inputs()
        inputs.append(
            io.Float.Input(
                "crop_factor",
                default=2.0,
                min=1.0,
                max=10.0,
                step=0.1,
                tooltip="Size of the crop around a region, for detailers, relative to the region.",
            )
        )
        return schema(
            node_id="SLiMePartSegs",
            category=RESULTS,
            display_name="SLiMe Parts to SEGS",
            description="Makes SEGS of the parts, with the names as labels, for the Impact Pack. First image of a "
            "batch.",
            search_aliases="part segs, segs, impact pack, detailer, mask to segs",
            inputs=inputs,
            outputs=[io.SEGS.Output(display_name="segs", tooltip="For Impact Pack's detailers and SEGS filters.")],
        )

    @classmethod
    def execute(
        cls, parts: Parts, separate: bool = True, minimum_area: int = 16, crop_factor: float = 2.0
    ) -> io.NodeOutput:
        height, width = parts.images.shape[1:3]
        segs, probabilities = [], parts.maps.source(slice(0, 1))[0]
        for region in _regions(parts, separate, minimum_area)[0]:
            box = (region.left, region.top, region.left + region.width, region.top + region.height)
            crop = crop_region(box, crop_factor, width, height)
            x1, y1, x2, y2 = crop
            mask = np.zeros((y2 - y1, x2 - x1), np.float32)
            mask[box[1] - y1 : box[3] - y1, box[0] - x1 : box[2] - x1] = region.mask
            image = parts.images[:1, y1:y2, x1:x2]
            name = parts.maps.names[region.label - 1]
            segs.append(SEG(image, mask, np.array(_score(probabilities, region), np.float32), crop, box, name, None))
        return io.NodeOutput(((height, width), segs))


def crop_region(box: tuple[int, int, int, int], factor: float, width: int, height: int) -> tuple[int, int, int, int]:
    """Enlarge a box (x1, y1, x2, y2) about its centre by ``factor``, and shift it into the image."""
    x1, y1, x2, y2 = box
    wide, high = min(round((x2 - x1) * factor), width), min(round((y2 - y1) * factor), height)
    left = min(max((x1 + x2 - wide) // 2, 0), width - wide)
    top = min(max((y1 + y2 - high) // 2, 0), height - high)
    return left, top, left + wide, top + high
