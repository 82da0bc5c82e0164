"""Edge snapping for SLiMe Part Painter: move the borders of a rough painting to edges of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..slime.errors import SlimeError
from ..slime.parts.runs import encode_runs
from .painter import Painting, read_image

REACH = 0.03  # how far a border may move, relative to the longer side


def snap(labels: np.ndarray, image: np.ndarray, reach: float = REACH) -> np.ndarray:
    """Move the borders of painted parts to edges of the image, by SciPy's watershed.

    Pixels deeper inside a part than ``reach`` (or deepest, where the part is thinner) keep its label; pixels farther
    away from all parts stay background; the pixels between are assigned along the image's edges.

    Args:
        labels: [h, w] uint8, 0 is background.
        image: [h, w, 3] uint8.
        reach: share of the longer side.

    Returns:
        Labels [h, w] uint8.
    """
    far = max(2.0, reach * max(labels.shape))
    margin = int(2 * far) + 2  # beyond it no pixel has a say
    (around,) = ndimage.find_objects((labels > 0).view(np.uint8))
    box = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in around)
    snapped = labels.copy()
    snapped[box] = _snap(labels[box], image[box], far)
    return snapped


def _snap(labels: np.ndarray, image: np.ndarray, far: float) -> np.ndarray:
    """Snap borders by at most ``far`` pixels."""
    outside = ndimage.distance_transform_edt(labels == 0)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0))
    # SciPy's watershed follows steps between neighbours of ONE channel: the colours' main direction around the parts.
    near = smooth[outside < 2 * far]
    near -= near.mean(0)
    gray = smooth @ np.linalg.svd(near.T @ near)[0][:, 0]
    gray -= gray.min()
    height = (65535 * gray / max(float(gray.max()), 1e-6)).astype(np.uint16)
    free = int(labels.max()) + 1
    markers = np.zeros(labels.shape, np.int16)
    markers[outside > far] = free
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is None:
            continue
        around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in place)
        inside = labels[around] == label
        components, count = ndimage.label(inside)
        depth = ndimage.distance_transform_edt(inside)
        deepest = ndimage.maximum(depth, components, range(1, count + 1))
        kept = np.minimum(far, 0.6 * np.concatenate([[0], np.atleast_1d(deepest)]))[components]
        markers[around][inside & (depth >= kept)] = label
    snapped = ndimage.watershed_ift(height, markers)
    return np.where(snapped == free, 0, snapped).astype(np.uint8)


def snap_painting(text: str, file: str | None) -> dict[str, Any]:
    """Snap the label map of a painting; return the form that web/painter/painter.js takes.

    Args:
        text: the painting.
        file: the connected image as "subfolder/name [type]", or None for the painting's own.

    Raises:
        SlimeError: nothing is painted, or the text or the image cannot be read.
    """
    painted = Painting.parse(text)
    if painted.labels is None or not painted.labels.any():
        raise SlimeError("Nothing is painted yet.")
    image = read_image(painted.image_path() if file is None else Painting(file, (), (), None).image_path())
    height, width = painted.labels.shape
    pixels = Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).resize((width, height))
    labels = snap(painted.labels, np.asarray(pixels))
    return {"width": width, "height": height, "runs": encode_runs(labels)}
