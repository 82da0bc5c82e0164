"""SLiMe Segment: find learned parts in other images."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.segment import Segmenter
from ..slime.settings import SegmentSettings
from .common import (
    Embeddings,
    clip_input,
    confidence_input,
    draws_input,
    expert,
    flip_input,
    named_errors,
    parts_outputs,
    parts_result,
    refine_input,
    schema,
    seed_input,
)
from .connected import clip_vision_input, connected, latent_input, looking_inputs, shown


class SLiMeSegment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSegment",
            essentials_category="Image Tools",
            is_output_node=True,
            display_name="SLiMe Segment",
            description="Finds the learned parts in other images, with one pass through the model each.",
            search_aliases=["segment", "one shot segmentation", "mask", "part segmentation", "segment same thing"],
            inputs=[
                *looking_inputs("The model the parts were learned on, or one of the same family."),
                Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings."),
                io.Image.Input("image", optional=True, tooltip="Images of any size; a batch gives a batch of masks."),
                refine_input(),
                seed_input(),
                clip_input(),
                expert(
                    io.Int.Input(
                        "crops",
                        default=1,
                        min=1,
                        max=4,
                        optional=True,
                        tooltip="2 looks at 2 x 2 overlapping crops, as the paper does for faces: four times the work. "
                        "Worse where an object fills the image.",
                    )
                ),
                flip_input(),
                expert(
                    io.Int.Input(
                        "batch_size",
                        default=0,
                        min=0,
                        max=64,
                        optional=True,
                        tooltip="Images in one pass; 0 chooses from the free memory.",
                    )
                ),
                # Newer inputs stand last: saved workflows hold widget values by position.
                io.Int.Input(
                    "zoom",
                    default=0,
                    min=0,
                    max=4,
                    optional=True,
                    tooltip="How many objects to look at again more closely, 0 for none: for objects that are much "
                    "smaller in the image than in the examples. Up to ten passes more for one object.",
                ),
                confidence_input(),
                draws_input(),
                clip_vision_input(),
                latent_input(),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(
        cls,
        embeddings: PartEmbeddings,
        image: Tensor | None = None,
        model: Any = None,
        vae: Any = None,
        refine: str = "fast",
        seed: int = 0,
        clip: Any = None,
        average_flip: bool = False,
        noise_draws: int = 1,
        clip_vision: Any = None,
        latent: dict[str, Tensor] | None = None,
        **more: Any,
    ) -> io.NodeOutput:
        settings = SegmentSettings(seed=seed, refine=refine, flip=average_flip, draws=noise_draws, **more)
        with named_errors("SLiMe Segment"):
            backbone = connected(model, vae, clip, clip_vision)
            images, latents = shown(image, latent, backbone)
            if image is None and (settings.zoom or settings.crops > 1):
                raise SlimeError("zoom and crops look at pixels: connect the image as well, or switch them off.")
            bar = comfy.utils.ProgressBar(1)

            def on_batch(done: int, total: int) -> None:
                bar.update_absolute(done, total)
                comfy.model_management.throw_exception_if_processing_interrupted()

            maps = Segmenter(backbone, embeddings, settings)(images, on_batch, latents)
        return parts_result(cls, maps, images)
