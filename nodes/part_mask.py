"""SLiMe Part Mask: one or several parts as a MASK for inpainting."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..slime.parts.masks import MODES, MaskShape, part_masks
from .common import Parts, PartsSocket, advanced, named_errors, schema, split_names, to_core


class SLiMePartMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartMask",
            essentials_category="Image Tools",
            is_output_node=True,
            display_name="SLiMe Part Mask",
            description="Makes a mask of one or several parts, cleaned for inpainting.",
            search_aliases="part mask, grow mask, feather mask, fill holes, mask by name",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.String.Input(
                    "names",
                    default="",
                    tooltip="Names of the parts, separated by commas; background is allowed too. Empty = all parts.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="argmax",
                    tooltip="argmax: white where the parts are the most probable class. threshold: where their "
                    "probability reaches the threshold. soft: the probability itself.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Minimum probability; used only if mode is threshold.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-512,
                    max=512,
                    tooltip="Widen the mask by this many pixels; negative values shrink it.",
                ),
                io.Int.Input(
                    "feather", default=0, min=0, max=512, tooltip="Blur the border over about this many pixels."
                ),
                io.Boolean.Input("invert", default=False, tooltip="Invert the mask."),
                advanced(
                    io.Boolean.Input("fill_holes", default=False, optional=True, tooltip="Fill holes in the mask.")
                ),
                advanced(
                    io.Int.Input(
                        "minimum_area",
                        default=0,
                        min=0,
                        max=1_000_000,
                        optional=True,
                        tooltip="Drop connected regions with fewer pixels.",
                    )
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="One mask for each image; empty where nothing is found.")
            ],
        )

    @classmethod
    def execute(
        cls,
        parts: Parts,
        names: str = "",
        mode: str = "argmax",
        threshold: float = 0.5,
        grow: int = 0,
        feather: int = 0,
        invert: bool = False,
        fill_holes: bool = False,
        minimum_area: int = 0,
    ) -> io.NodeOutput:
        shape = MaskShape(fill_holes, minimum_area, grow, feather, invert)
        with named_errors("SLiMe Part Mask"):
            mask = part_masks(parts.maps, split_names(names), mode, threshold, shape)
        return io.NodeOutput(to_core(mask), ui=ui.PreviewMask(mask, cls=cls))
