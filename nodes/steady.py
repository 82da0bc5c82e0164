"""SLiMe Steady Parts: less flicker on video."""

from __future__ import annotations

from comfy_api.latest import io

from ..slime.parts.steady import steady_parts
from .common import EXPERTS, Parts, PartsSocket, parts_outputs, parts_result, schema


class SLiMeSteadyParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSteadyParts",
            category=EXPERTS,
            display_name="SLiMe Steady Parts",
            description="Less flicker on video: parts of neighbouring frames support each other where nothing moves.",
            search_aliases=["video mask", "temporal smoothing", "flicker", "video segmentation"],
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, the frames of a video as one batch."),
                io.Float.Input(
                    "strength",
                    default=0.7,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="How much neighbouring frames count where the picture stands still.",
                ),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(cls, parts: Parts, strength: float = 0.7) -> io.NodeOutput:
        return parts_result(cls, steady_parts(parts.maps, parts.images, strength), parts.images)
