"""Routes that the front end uses while a workflow is edited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import folder_paths
from aiohttp import web
from server import PromptServer

from ..slime.embedding_files import load_embeddings
from ..slime.errors import SlimeError
from .files import FOLDER
from .snapping import snap_painting

logger = logging.getLogger(__name__)


def register_routes() -> None:
    """Register POST /slime/snap {painting, image} and GET /slime/names?filename=, if there is a server."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    async def snap(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            painting, image = str(body["painting"]), body.get("image")
        except (ValueError, KeyError, TypeError, AttributeError):
            return web.json_response({"error": "the request cannot be read"}, status=400)
        return await _answer(lambda: snap_painting(painting, image))

    async def names(request: web.Request) -> web.Response:
        return await _answer(lambda: _names(request.query.get("filename", "")))

    server.routes.post("/slime/snap")(snap)
    server.routes.get("/slime/names")(names)


async def _answer(work: Callable[[], Any]) -> web.Response:
    """Run ``work`` in a thread and return its result, or the reason of its failure."""
    try:
        return web.json_response(await asyncio.to_thread(work))
    except SlimeError as error:
        return web.json_response({"error": str(error)}, status=400)
    except (ValueError, TypeError, OSError) as error:
        logger.warning("SLiMe: a request of the front end failed (%s)", error)
        return web.json_response({"error": "the request cannot be read"}, status=400)


def _names(filename: str) -> dict[str, Any]:
    """Return the part names of a file; none where there is no such file."""
    path = folder_paths.get_full_path(FOLDER, filename) if filename else None
    return {"names": [] if path is None else load_embeddings(path).names}
