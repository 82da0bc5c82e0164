"""SLiMe Select Lowest Confidence: select the image of a batch that is most worth correcting."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..slime.errors import SlimeError
from ..slime.parts.maps import DenseMaps
from .common import Parts, PartsSocket, named_errors, overlay_preview, schema, to_core


class SLiMePickLeastSure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePickLeastSure",
            display_name="SLiMe Select Lowest Confidence",
            description="Selects the image of a batch with the lowest confidence, as a candidate for correction.",
            search_aliases="pick least sure, active learning, worst image, uncertainty, confidence",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, of several images."),
                io.Int.Input(
                    "rank",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="1 is the image with the lowest confidence, 2 the next.",
                ),
            ],
            outputs=[
                PartsSocket.Output(display_name="parts", tooltip="Of the selected image, for SLiMe Part Painter."),
                io.Image.Output(display_name="image", tooltip="The selected image."),
                io.Int.Output(display_name="index", tooltip="Its index in the batch, from 0."),
                io.String.Output(display_name="order", tooltip="Index and confidence of all images, the lowest first."),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, rank: int = 1) -> io.NodeOutput:
        with named_errors("SLiMe Select Lowest Confidence"):
            confidence = parts.maps.confidence
            if rank > len(confidence):
                raise SlimeError(f"rank is {rank}, but there are {len(confidence)} images. Lower it.")
        order = confidence.argsort(stable=True).tolist()
        index = order[rank - 1]
        chunk = slice(index, index + 1)
        selected = replace(parts.maps, source=DenseMaps(parts.maps.source(chunk)), peaks=parts.maps.peaks[chunk])
        images = parts.images[chunk]
        text = ", ".join(f"{number}: {confidence[number]:.2f}" for number in order)
        preview = overlay_preview(cls, selected, images)
        return io.NodeOutput(Parts(selected, images), to_core(images), index, text, ui=preview)
