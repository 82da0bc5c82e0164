"""SLiMe Look and SLiMe Read Parts: one pass over the image, read for any number of embeddings."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io, ui

from ..slime.segment import look, read_look
from ..slime.settings import SegmentSettings
from .comfy_denoiser import ComfyDenoiser
from .common import EXPERT, Embeddings, Looks, Parts, PartsSocket, as_images, named_errors, overlays, schema, to_core


class SLiMeLook(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeLook",
            display_name="SLiMe Look",
            description="Runs the model over images once, for any number of SLiMe Read Parts.",
            search_aliases=["segment features", "attention features"],
            inputs=[
                io.Model.Input("model", tooltip="The model the parts were learned on, or one of the same family."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                Embeddings.Input("embeddings", tooltip="Any of the embeddings that will be read; all of one kind fit."),
                io.Image.Input("image", tooltip="Images of any size."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the noise; the same seed gives the same masks.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Needed only for embeddings in the compact text form."),
                io.Boolean.Input(
                    "average_flip",
                    default=False,
                    optional=True,
                    **EXPERT,
                    tooltip="Also look at the mirrored image and average: twice the work, no gain on the demo scenes.",
                ),
                io.Int.Input(
                    "noise_draws",
                    default=1,
                    min=1,
                    max=16,
                    optional=True,
                    **EXPERT,
                    tooltip="Looks with other noise, averaged: one more pass each, no clear gain on the demo scenes.",
                ),
            ],
            outputs=[Looks.Output(display_name="look", tooltip="For SLiMe Read Parts.")],
        )

    @classmethod
    def execute(
        cls, model, vae, embeddings, image, seed=0, clip=None, average_flip=False, noise_draws=1
    ) -> io.NodeOutput:
        settings = SegmentSettings(seed=seed, flip=average_flip, draws=noise_draws)
        with named_errors("SLiMe Look"):
            return io.NodeOutput(look(ComfyDenoiser(model, vae, clip), as_images(image), embeddings, settings))


class SLiMeReadParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeReadParts",
            display_name="SLiMe Read Parts",
            description="Reads learned parts from a SLiMe Look, without running the model again.",
            search_aliases=["read parts", "segment many embeddings"],
            inputs=[
                Looks.Input("look", tooltip="From SLiMe Look."),
                Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings."),
                io.Combo.Input(
                    "refine",
                    options=["off", "fast", "best"],
                    default="fast",
                    tooltip="Pull mask borders to the edges of the image.",
                ),
                io.Float.Input(
                    "min_confidence",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    optional=True,
                    tooltip="Images where the parts are less sure than this count as without the object; 0 never.",
                ),
            ],
            outputs=[
                PartsSocket.Output(display_name="parts", tooltip="For SLiMe Part Mask and SLiMe Overlay."),
                io.Mask.Output(display_name="mask", tooltip="All parts together, exactly 0 or 1."),
            ],
        )

    @classmethod
    def execute(cls, look, embeddings, refine="fast", min_confidence=0.0) -> io.NodeOutput:
        settings = SegmentSettings(refine=refine, min_confidence=min_confidence)
        with named_errors("SLiMe Read Parts"):
            maps = read_look(look, embeddings, settings, comfy.model_management.get_torch_device())
        labels = maps.label_map
        preview = overlays(look.images, labels, maps.palette, maps.names)
        return io.NodeOutput(
            Parts(maps, look.images), to_core((labels > 0).float()), ui=ui.PreviewImage(preview, cls=cls)
        )
