"""SLiMe Smooth Video Parts: reduce flicker of video masks."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..slime.parts.video import smooth_video_parts
from .common import ADVANCED, Parts, PartsSocket, parts_outputs, parts_result, schema


class SLiMeSteadyParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSteadyParts",
            category=ADVANCED,
            display_name="SLiMe Smooth Video Parts",
            description="Reduces flicker of video masks: frames are averaged with those before, along the motion.",
            search_aliases=["steady parts", "video mask", "temporal smoothing", "flicker", "video segmentation"],
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, the frames of a video as one batch."),
                io.Float.Input(
                    "strength",
                    default=0.7,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="How strongly earlier frames count; 0 = off.",
                ),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(cls, parts: Parts, strength: float = 0.7) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(len(parts.images))

        def on_frame(done: int) -> None:
            bar.update_absolute(done)
            comfy.model_management.throw_exception_if_processing_interrupted()

        return parts_result(cls, smooth_video_parts(parts.maps, parts.images, strength, on_frame), parts.images)
