"""SLiMe Smooth Video Parts: reduce flicker of video masks."""

from __future__ import annotations

from comfy_api.latest import io

from ..slime.parts.video import smooth_video_parts
from .common import ADVANCED, Parts, PartsSocket, parts_outputs, parts_result, progress, schema, smoothing_input


class SLiMeSteadyParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSteadyParts",
            category=ADVANCED,
            display_name="SLiMe Smooth Video Parts",
            description="Reduces flicker of video masks: frames are averaged with those before, along the motion.",
            search_aliases="steady parts, video mask, temporal smoothing, flicker, video segmentation",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, the frames of a video as one batch."),
                smoothing_input("strength"),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(cls, parts: Parts, strength: float = 0.7) -> io.NodeOutput:
        count = len(parts.images)
        report = progress(count)
        smooth = smooth_video_parts(parts.maps, parts.images, strength, lambda done: report(done, count))
        return parts_result(cls, smooth, parts.images)
