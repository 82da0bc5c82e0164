"""ComfyUI pack of the demo: it lets the stock "Load Checkpoint" load the tiny model. It has no nodes."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    from comfy_api.latest import ComfyExtension

    from .tiny_config import register

    class DemoExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return []

    register()
    return DemoExtension()
