"""SLiMe Segment: find trained parts in other images."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.settings import SegmentSettings
from .backbones import build_backbone, clip_vision_input, model_inputs, resolve_inputs
from .common import (
    EmbeddingsSocket,
    advanced,
    clip_input,
    confidence_input,
    named_errors,
    parts_outputs,
    parts_result,
    progress,
    refine_input,
    schema,
    seed_input,
)
from .feature_cache import segment_cached


class SLiMeSegment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSegment",
            essentials_category="Image Tools",
            is_output_node=True,
            display_name="SLiMe Segment",
            description="Finds the trained parts in other images, with one pass through the model per image. Features "
            "of the last images are kept (batches of up to 4 images, 1 GB of main memory): instant embeddings trained "
            "with the same settings then need no new pass.",
            search_aliases="segment, segment anything, SAM, one shot segmentation, mask, part segmentation, "
            "segment same thing, similar",
            inputs=[
                *model_inputs("The model the parts were trained with, or one of the same family."),
                EmbeddingsSocket.Input("embeddings", tooltip="From SLiMe Train or Load SLiMe Embeddings."),
                io.Image.Input("image", optional=True, tooltip="Images of any size; a batch gives a batch of masks."),
                refine_input(),
                seed_input(),
                clip_input(),
                advanced(
                    io.Int.Input(
                        "tiles",
                        default=1,
                        min=1,
                        max=4,
                        optional=True,
                        tooltip="2 segments 2 x 2 overlapping crops, as the paper does for faces: four times the work. "
                        "Worse where an object fills the image.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "average_flip",
                        default=False,
                        optional=True,
                        tooltip="Also segment the mirrored image, and average: twice the time for at most 0.01 IoU in "
                        "our tests.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "batch_size",
                        default=0,
                        min=0,
                        max=64,
                        optional=True,
                        tooltip="Images per pass; 0 chooses by the free memory.",
                    )
                ),
                io.Int.Input(
                    "closeups",
                    default=0,
                    min=0,
                    max=4,
                    optional=True,
                    tooltip="Number of objects to segment again in close-up crops, 0 = off: for objects much smaller "
                    "than in the examples. Only for images whose confidence is below 0.8 of the examples'. Up to ten "
                    "more passes for one object.",
                ),
                confidence_input(),
                advanced(
                    io.Int.Input(
                        "noise_samples",
                        default=1,
                        min=1,
                        max=16,
                        optional=True,
                        tooltip="Average over this many noise samples: one pass each, for at most 0.01 IoU in our "
                        "tests.",
                    )
                ),
                clip_vision_input(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The images as latents, instead of image: saves the VAE encoding. With image as well, mask "
                    "borders are sharper.",
                ),
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
        clip: Any = None,
        clip_vision: Any = None,
        latent: dict[str, Tensor] | None = None,
        **more: Any,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Segment"):
            settings = SegmentSettings(**more)
            backbone = build_backbone(model, vae, clip, clip_vision)
            images, latents = resolve_inputs(image, latent, backbone)
            if image is None and (settings.closeups or settings.tiles > 1):
                raise SlimeError("closeups and tiles need pixels: connect the image as well, or switch them off.")
            maps = segment_cached(backbone, images, embeddings, settings, progress(), latents)
        return parts_result(cls, maps, images)
