"""What the page asks of the server while a workflow is edited."""

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
from .snapping import snapped

logger = logging.getLogger(__name__)


def register_routes() -> None:
    """POST /slime/snap {painting, image}, GET /slime/names?filename=. Without a server there are none."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    async def snap(request: web.Request) -> web.Response:
        try:
            given = await request.json()
            painting, image = str(given["painting"]), given.get("image")
        except (ValueError, KeyError, TypeError, AttributeError):
            return web.json_response({"error": "the request cannot be read"}, status=400)
        return await _answer(lambda: snapped(painting, image))

    async def names(request: web.Request) -> web.Response:
        return await _answer(lambda: _names(request.query.get("filename", "")))

    server.routes.post("/slime/snap")(snap)
    server.routes.get("/slime/names")(names)


async def _answer(work: Callable[[], Any]) -> web.Response:
    """What ``work`` gives, in a thread of its own, or why it cannot."""
    try:
        return web.json_response(await asyncio.to_thread(work))
    except SlimeError as error:
        return web.json_response({"error": str(error)}, status=400)
    except (ValueError, TypeError, OSError) as error:
        logger.warning("SLiMe: a request of the page failed (%s)", error)
        return web.json_response({"error": "the request cannot be read"}, status=400)


def _names(filename: str) -> dict[str, Any]:
    path = folder_paths.get_full_path(FOLDER, filename) if filename else None
    if path is None:
        raise SlimeError(f'there is no "{filename}" in models/slime.')
    return {"names": load_embeddings(path).names}
