"""SLiMe Overlay: draw the parts over their images, and as a label map."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..slime.parts.draw import color_labels
from .common import RESULTS, Parts, PartsSocket, overlays, schema, to_core, with_legend


class SLiMeOverlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeOverlay",
            is_output_node=True,
            category=RESULTS,
            display_name="SLiMe Overlay",
            description="Draws the parts over their images, and as a label map in exact colours.",
            search_aliases=["overlay", "label map", "segmentation preview", "color mask"],
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
        labels = parts.maps.label_map
        names, palette = parts.maps.names, parts.maps.palette
        tinted = shown = overlays(parts.images, labels, palette, opacity)
        if legend:
            shown, tinted = with_legend(tinted, names, palette), with_legend(tinted, names, palette, inside=True)
        colored = np.stack([color_labels(label.numpy(), parts.maps.palette) for label in labels])
        label_image = torch.from_numpy(colored).float() / 255
        return io.NodeOutput(to_core(tinted), to_core(label_image), ui=ui.PreviewImage(shown, cls=cls))
