"""SLiMe Overlay: draw the parts over their images, and as a label map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy_api.latest import io
from PIL import Image

from ..slime.parts.draw import color_labels, draw_legend, legend_below
from .common import RESULTS, Parts, PartsSocket, overlays, save_previews, schema, to_core, to_tensor


class SLiMeOverlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeOverlay",
            is_output_node=True,
            category=RESULTS,
            display_name="SLiMe Overlay",
            description="Draws the parts over their images, and as a label map in exact colours.",
            search_aliases="overlay, label map, segmentation preview, color mask",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.Float.Input("opacity", default=0.55, min=0.0, max=1.0, step=0.05, tooltip="Opacity of the tint."),
                io.Boolean.Input("legend", default=True, tooltip="Show names and colours in the corner."),
            ],
            outputs=[
                io.Image.Output(display_name="overlay", tooltip="The images with their parts tinted."),
                io.Image.Output(display_name="label_map", tooltip="One exact colour per part on black."),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, opacity: float = 0.55, legend: bool = True) -> io.NodeOutput:
        names, palette, labels = parts.maps.names, parts.maps.palette, parts.maps.label_map
        tinted, label_maps = (to_core(torch.empty(*labels.shape, 3)) for _ in range(2))

        def draw() -> Iterator[Image.Image]:
            """Fill both outputs image by image, and yield the pictures of the preview."""
            for index, picture in enumerate(overlays(parts.images, labels, palette, opacity)):
                yield legend_below(picture, names, palette) if legend else picture
                if legend:
                    draw_legend(picture, names, palette)
                tinted[index] = to_tensor(picture)
                label_maps[index] = torch.from_numpy(color_labels(labels[index].numpy(), palette)) / 255

        previews = save_previews(cls, draw())
        return io.NodeOutput(tinted, label_maps, ui=previews)
