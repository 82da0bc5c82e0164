"""ComfyUI pack of the demo: it lets the stock "Load Checkpoint" load the tiny model. One node loads a tiny SAM3."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    from comfy_api.latest import ComfyExtension

    from .tiny_config import register
    from .tiny_sam3 import LoadTinySam3

    class DemoExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return [LoadTinySam3]

    register()
    return DemoExtension()
