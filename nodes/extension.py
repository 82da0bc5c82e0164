"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .example import SLiMeExample
from .files import SLiMeLoadEmbeddings, SLiMeSaveEmbeddings
from .overlay import SLiMeOverlay
from .part_mask import SLiMePartMask
from .segment import SLiMeSegment
from .train import SLiMeTrain


class SlimeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SLiMeExample,
            SLiMeTrain,
            SLiMeSegment,
            SLiMePartMask,
            SLiMeOverlay,
            SLiMeSaveEmbeddings,
            SLiMeLoadEmbeddings,
        ]
