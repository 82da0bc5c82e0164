"""SLiMe Pick Least Sure: which image of a batch is most worth correcting."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..slime.errors import SlimeError
from ..slime.parts.maps import Held
from .common import Parts, PartsSocket, named_errors, overlay_preview, schema, to_core


class SLiMePickLeastSure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePickLeastSure",
            display_name="SLiMe Pick Least Sure",
            description="The image of a batch whose parts are least sure: the one most worth correcting and teaching.",
            search_aliases=["active learning", "worst image", "uncertainty", "confidence", "correct mask"],
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, of several images."),
                io.Int.Input("rank", default=1, min=1, max=10_000, tooltip="1 is the least sure image, 2 the next."),
            ],
            outputs=[
                PartsSocket.Output(display_name="parts", tooltip="Of this image; for SLiMe Part Painter to correct."),
                io.Image.Output(display_name="image", tooltip="This image."),
                io.Int.Output(display_name="index", tooltip="Its place in the batch, from 0."),
                io.String.Output(display_name="order", tooltip="All images, the least sure first: index and sureness."),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, rank: int = 1) -> io.NodeOutput:
        with named_errors("SLiMe Pick Least Sure"):
            confidence = parts.maps.confidence
            if rank > len(confidence):
                raise SlimeError(f"there are {len(confidence)} images; rank {rank} is more than that.")
        order = confidence.argsort(stable=True).tolist()
        index = order[rank - 1]
        part = slice(index, index + 1)
        picked = replace(parts.maps, pixels=Held(parts.maps.pixels(part)), peaks=parts.maps.peaks[part])
        images = parts.images[part]
        text = ", ".join(f"{place}: {confidence[place]:.2f}" for place in order)
        return io.NodeOutput(
            Parts(picked, images), to_core(images), index, text, ui=overlay_preview(cls, picked, images)
        )
