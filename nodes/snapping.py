"""Edge snapping for SLiMe Part Painter: a rough painting becomes the regions that the image suggests."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image
from scipy import ndimage
from server import PromptServer

from ..slime.errors import SlimeError
from ..slime.parts.runs import encode_runs
from .painter import Painting, read_picture

REACH = 0.03  # how far a border may move, relative to the longer side
logger = logging.getLogger(__name__)


def snap(labels: np.ndarray, image: np.ndarray, reach: float = REACH) -> np.ndarray:
    """Move the borders of painted parts to edges of the image, by SciPy's watershed.

    What lies deeper in a part than ``reach``, or deepest where it is thinner, stays the part's; what lies farther away
    from all parts stays free; the strip between is shared out along the image's edges.

    Args:
        labels: [h, w] uint8, 0 free.
        image: [h, w, 3] uint8.
        reach: share of the longer side.

    Returns:
        Labels [h, w] uint8.
    """
    far = max(2.0, reach * max(labels.shape))
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
    for label in np.unique(labels[labels > 0]):
        pieces, count = ndimage.label(labels == label)
        depth = ndimage.distance_transform_edt(labels == label)
        deepest = ndimage.maximum(depth, pieces, range(1, count + 1))
        inside = np.minimum(far, 0.6 * np.concatenate([[0], np.atleast_1d(deepest)]))[pieces]
        markers[(pieces > 0) & (depth >= inside)] = label
    found = ndimage.watershed_ift(height, markers)
    return np.where(found == free, 0, found).astype(np.uint8)


def _snapped(text: str, file: str | None) -> dict[str, Any]:
    painted = Painting.parse(text)
    if painted.labels is None or not painted.labels.any():
        raise SlimeError("nothing is painted yet.")
    picture = read_picture(painted.image_path() if file is None else Painting(file, (), (), None).image_path())
    height, width = painted.labels.shape
    pixels = Image.fromarray((picture[0].numpy() * 255).round().astype(np.uint8)).resize((width, height))
    labels = snap(painted.labels, np.asarray(pixels))
    return {"width": width, "height": height, "runs": encode_runs(labels)}


def register_route() -> None:
    """POST /slime/snap {painting, image}: the painting's runs anew. Without a server there is none."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.post("/slime/snap")
    async def snap_painting(request: web.Request) -> web.Response:
        try:
            given = await request.json()
            answer = await asyncio.to_thread(_snapped, str(given["painting"]), given.get("image"))
        except SlimeError as error:
            return web.json_response({"error": str(error)}, status=400)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("SLiMe: a painting could not be snapped (%s)", error)
            return web.json_response({"error": "the request cannot be read"}, status=400)
        return web.json_response(answer)
