"""SLiMe Refine with SAM3: sharpen parts by SAM3's mask decoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..slime.batches import OUT_OF_MEMORY
from ..slime.concepts.refine import RefineSettings, refine_parts
from ..slime.errors import SlimeError
from .comfy_sam3 import ComfySam3
from .common import SAM3, Parts, PartsSocket, named_errors, parts_outputs, parts_result, progress, schema, show_text

BAR = 1000


class SLiMeSam3Refine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        usual = RefineSettings()
        return schema(
            node_id="SLiMeSam3Refine",
            category=SAM3,
            is_experimental=True,
            is_output_node=True,
            display_name="SLiMe Refine with SAM3",
            description="Sharpens every region of the parts with SAM3's mask decoder, in a crop around it. Its effect "
            "on SAM3's real weights has not been measured.",
            search_aliases="sam3, refine mask, sharpen mask, segment anything",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.Model.Input("model", tooltip="A SAM3 MODEL from Load Checkpoint (ComfyUI 0.20 or newer)."),
                io.Int.Input(
                    "iterations",
                    default=2,
                    min=1,
                    max=5,
                    tooltip="Passes of SAM3's image encoder and mask decoder per region; each starts from the previous "
                    "mask.",
                ),
                io.Float.Input(
                    "min_iou",
                    default=usual.min_iou,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="A region is left as it was if its refined mask overlaps the old one less than this "
                    "(intersection over union).",
                ),
                io.Float.Input(
                    "growth",
                    default=usual.growth,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far a region may grow, relative to its size. What lies beyond is cut.",
                ),
            ],
            outputs=parts_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, parts: Parts, model: Any, iterations: int = 2, min_iou: float = 0.5, growth: float = 0.15) -> Any:
        report = progress(BAR)
        with named_errors("SLiMe Refine with SAM3"):
            sam3 = ComfySam3(model)
            try:
                maps, refined, refused = refine_parts(
                    parts.maps,
                    parts.images,
                    lambda image, logits: sam3.decode_mask(image, logits, iterations),
                    RefineSettings(min_iou, growth),
                    lambda done: report(round(BAR * done), BAR),
                )
            except OUT_OF_MEMORY as error:
                raise SlimeError("Out of GPU memory in SAM3's mask decoder. Close other programs.") from error
        show_text(cls.hidden.unique_id, f"{refined} regions refined, {refused} left as they were")
        return parts_result(cls, maps, parts.images)
