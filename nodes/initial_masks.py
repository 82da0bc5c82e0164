"""Read masks of other nodes as the label map that SLiMe Part Painter opens with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..slime.errors import SlimeError
from ..slime.examples import MAX_PARTS
from ..slime.parts.palette import Color, default_palette
from ..slime.parts.runs import encode_runs
from .common import Parts, PartsSocket, as_masks

MOST_PIXELS = 4_000_000  # of a painting, as in web/painter/label_map.js
# io.BoundingBox where the core has it (0.15.0), of the same name.
INITIAL_MASKS = (PartsSocket, io.Mask, io.Custom("SEGS"), io.Custom("BOUNDING_BOX"))


def read_initial_masks(value: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Convert parts, MASK, SEGS or BOUNDING_BOX of an image of ``size`` (height, width) to what
    web/painter/painter.js takes.

    Raises:
        SlimeError: more than one image, another size, too many parts, or something else.
    """
    if isinstance(value, Parts):
        check_one_image(value)
        return _checked(value.maps.names, value.maps.palette, value.maps.label_map[0].numpy().astype(np.uint8), size)
    if isinstance(value, torch.Tensor):
        masks = (as_masks(value) > 0.5).numpy()
        return _stacked([(f"part {index}", mask) for index, mask in enumerate(masks, start=1)], size)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Sequence):
        if tuple(value[0]) != tuple(size):
            raise SlimeError(f"initial_masks is {_text(value[0])} but the image is {_text(size)}. Resize the masks.")
        return _stacked(list(_segments(value, size)), size)
    if isinstance(value, dict | list):
        return _stacked([(f"part {index}", box) for index, box in enumerate(_boxes(value, size), start=1)], size)
    raise SlimeError(f"initial_masks is {type(value).__name__}. Connect SLiMe parts, a MASK, SEGS or bounding boxes.")


def check_one_image(parts: Parts) -> None:
    """Raise SlimeError for parts of several images."""
    if len(parts.images) != 1:
        raise SlimeError(
            f"initial_masks has {len(parts.images)} images. Connect one, for example from SLiMe Select Lowest "
            "Confidence."
        )


def _segments(value: Any, size: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the masks of Impact Pack's SEGS, ((height, width), [SEG]); segments of one label are one part."""
    for seg in value[1]:
        x1, y1, x2, y2 = (int(side) for side in seg.crop_region)
        mask = np.zeros(size, bool)
        inside = np.asarray(seg.cropped_mask) > 0.5
        mask[y1:y2, x1:x2] = inside[: max(0, size[0] - y1), : max(0, size[1] - x1)]
        yield str(seg.label), mask


def _boxes(value: Any, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield masks of one box, of a list of boxes, or of the first image's list of a batch."""
    boxes = [value] if isinstance(value, dict) else value[0] if value and isinstance(value[0], list) else value
    for box in boxes:
        try:
            x, y, width, height = (float(box[side]) for side in ("x", "y", "width", "height"))
            left, right, top, bottom = (max(0, round(side)) for side in (x, x + width, y, y + height))
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise SlimeError(
                f"A bounding box of initial_masks is {str(box)[:60]}; it needs the numbers x, y, width and height."
            ) from error
        mask = np.zeros(size, bool)
        mask[top:bottom, left:right] = True
        yield mask


def _stacked(masks: Sequence[tuple[str, np.ndarray]], size: tuple[int, int]) -> dict[str, Any]:
    """Combine named masks into one label map; where they overlap the later one wins."""
    names = list(dict.fromkeys(name for name, _ in masks))
    labels = np.zeros(size, np.uint8)
    for name, mask in masks:
        if mask.shape != size:
            raise SlimeError(f"initial_masks is {_text(mask.shape)} but the image is {_text(size)}. Resize the masks.")
        labels[mask] = min(names.index(name) + 1, 255)
    return _checked(names, default_palette(len(names)), labels, size)


def _checked(
    names: Sequence[str], colors: Sequence[Color], labels: np.ndarray, size: tuple[int, int]
) -> dict[str, Any]:
    if len(names) > MAX_PARTS:
        raise SlimeError(f"initial_masks has {len(names)} parts; at most {MAX_PARTS} can be painted. Merge some.")
    if labels.shape != size:
        raise SlimeError(f"initial_masks is {_text(labels.shape)} but the image is {_text(size)}. Resize the masks.")
    scale = min(1.0, math.sqrt(MOST_PIXELS / labels.size))
    width, height = (max(1, round(side * scale)) for side in reversed(size))
    labels = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    parts = [{"name": name, "color": "#" + bytes(color).hex()} for name, color in zip(names, colors, strict=True)]
    return {"parts": parts, "width": width, "height": height, "runs": encode_runs(labels)}


def _text(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"
