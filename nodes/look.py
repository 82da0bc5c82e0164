"""SLiMe Look and SLiMe Read Parts: one pass over the image, read for any number of embeddings."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..slime.embeddings import PartEmbeddings
from ..slime.reading.look import Look
from ..slime.segment import look, read_look
from ..slime.settings import LookSettings, ReadSettings
from .common import (
    EXPERTS,
    Embeddings,
    Looks,
    clip_input,
    confidence_input,
    draws_input,
    flip_input,
    named_errors,
    parts_outputs,
    parts_result,
    refine_input,
    schema,
    seed_input,
)
from .connected import clip_vision_input, connected, latent_input, looking_inputs, shown


class SLiMeLook(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeLook",
            category=EXPERTS,
            display_name="SLiMe Look",
            description="Runs the model over images once, for any number of SLiMe Read Parts.",
            search_aliases=["segment features", "attention features"],
            inputs=[
                *looking_inputs("The model the parts were learned on, or one of the same family."),
                Embeddings.Input("embeddings", tooltip="Any of the embeddings that will be read; all of one kind fit."),
                io.Image.Input("image", optional=True, tooltip="Images of any size."),
                seed_input(),
                clip_input(),
                flip_input(),
                draws_input(),
                clip_vision_input(),
                latent_input(),
                Looks.Input(
                    "previous",
                    optional=True,
                    tooltip="A look at the same image, with another model or for other embeddings. SLiMe Read Parts "
                    "then takes embeddings of either; what was looked at already is not looked at again.",
                ),
            ],
            outputs=[Looks.Output(display_name="look", tooltip="For SLiMe Read Parts.")],
        )

    @classmethod
    def execute(
        cls,
        embeddings: PartEmbeddings,
        image: Tensor | None = None,
        model: Any = None,
        vae: Any = None,
        seed: int = 0,
        clip: Any = None,
        average_flip: bool = False,
        noise_draws: int = 1,
        clip_vision: Any = None,
        latent: dict[str, Tensor] | None = None,
        previous: Look | None = None,
    ) -> io.NodeOutput:
        settings = LookSettings(seed=seed, flip=average_flip, draws=noise_draws)
        with named_errors("SLiMe Look"):
            backbone = connected(model, vae, clip, clip_vision)
            images, latents = shown(image, latent, backbone)
            return io.NodeOutput(look(backbone, images, embeddings, settings, latents, previous))


class SLiMeReadParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeReadParts",
            category=EXPERTS,
            display_name="SLiMe Read Parts",
            description="Reads learned parts from a SLiMe Look, without running the model again.",
            search_aliases=["read parts", "segment many embeddings"],
            inputs=[
                Looks.Input("look", tooltip="From SLiMe Look."),
                Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings."),
                refine_input(),
                confidence_input(),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(
        cls, look: Look, embeddings: PartEmbeddings, refine: str = "fast", min_confidence: float = 0.0
    ) -> io.NodeOutput:
        settings = ReadSettings(refine=refine, min_confidence=min_confidence)
        with named_errors("SLiMe Read Parts"):
            maps = read_look(look, embeddings, settings, comfy.model_management.get_torch_device())
        return parts_result(cls, maps, look.images)
