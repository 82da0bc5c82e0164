"""SLiMe Learn SAM3 Concept and SLiMe SAM3 Prompt: parts learned as prompts of ComfyUI's SAM3 nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..slime.batches import OUT_OF_MEMORY
from ..slime.concepts.train import ConceptSettings, concept_limits, concept_tokens, train_concepts
from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.examples import Example, check_known
from .comfy_sam3 import ComfySam3
from .common import SAM3, EmbeddingsSocket, ExamplesSocket, advanced, named_errors, schema, seed_input
from .train import TrainingProgress, autosave_on_error

_NO_MEMORY = "Out of GPU memory while training through SAM3's detector. Close other programs."


class SLiMeLearnSam3Concept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        usual = ConceptSettings()
        return schema(
            node_id="SLiMeLearnSam3Concept",
            category=SAM3,
            is_experimental=True,
            display_name="SLiMe Learn SAM3 Concept",
            description="Learns the parts of the examples as prompts for SAM3 Detect and Run SAM3 Video Track: instead "
            "of a text, SAM3 gets what was learned. The weights of SAM3 do not change. Its accuracy on SAM3's real "
            "weights has not been measured.",
            search_aliases="sam3, learn prompt, mask exemplar, one shot, concept, segment same thing",
            inputs=[
                io.Model.Input("model", tooltip="A SAM3 MODEL from Load Checkpoint (ComfyUI 0.20 or newer)."),
                ExamplesSocket.Input("examples", tooltip="From SLiMe Example or SLiMe Part Painter. One is enough."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the SAM3 checkpoint: training starts from the names of the parts.",
                ),
                io.Int.Input(
                    "steps",
                    default=usual.steps,
                    min=1,
                    max=100_000,
                    tooltip="Number of training steps (Adam optimiser).",
                ),
                seed_input("Seed of the augmentation and, without clip, of the random starting tokens."),
                EmbeddingsSocket.Input(
                    "init_embeddings", optional=True, tooltip="Concepts of the same parts to continue training from."
                ),
                *_advanced_inputs(usual),
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    display_name="embeddings", tooltip="For SLiMe SAM3 Prompt and Save SLiMe Embeddings."
                ),
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="All parts, for SAM3 Detect or Run SAM3 Video Track."
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        examples: Sequence[Example],
        steps: int,
        seed: int = 0,
        clip: Any = None,
        init_embeddings: PartEmbeddings | None = None,
        **more: Any,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Learn SAM3 Concept"):
            detector = ComfySam3(model)
            settings = ConceptSettings(steps=steps, seed=seed, **more)
            words = None if clip is None else [_encode_name(clip, name, detector) for name in examples[0].names]
            progress = TrainingProgress(cls.hidden.unique_id, "concept")
            with autosave_on_error(progress):
                try:
                    learned = train_concepts(detector, examples, settings, words, init_embeddings, progress)
                except OUT_OF_MEMORY as error:
                    raise SlimeError(_NO_MEMORY) from error
        return io.NodeOutput(learned, conditioning_of(learned), {"loss": list(learned.losses)})


class SLiMeSam3Prompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSam3Prompt",
            category=SAM3,
            is_experimental=True,
            display_name="SLiMe SAM3 Prompt",
            description="Turns learned concepts into a prompt for SAM3 Detect or Run SAM3 Video Track: all parts, "
            "or one.",
            search_aliases="sam3, concept to conditioning, load concept",
            inputs=[
                EmbeddingsSocket.Input("embeddings", tooltip="From SLiMe Learn SAM3 Concept or Load SLiMe Embeddings."),
                io.String.Input("name", default="", tooltip="Name of the part. Empty = all parts."),
                io.Int.Input(
                    "max_detections",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Maximum number of instances of each part in an image; 0 = as many as the examples show.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For SAM3 Detect or Run SAM3 Video Track.")
            ],
        )

    @classmethod
    def execute(cls, embeddings: PartEmbeddings, name: str = "", max_detections: int = 0) -> io.NodeOutput:
        with named_errors("SLiMe SAM3 Prompt"):
            return io.NodeOutput(conditioning_of(embeddings, name.strip(), max_detections))


def conditioning_of(embeddings: PartEmbeddings, name: str = "", max_detections: int = 0) -> list[Any]:
    """Return CONDITIONING of concepts, as ComfyUI's SAM3 text encoder makes it for several texts.

    Raises:
        SlimeError: embeddings that are no concepts, or a name that is not among them.
    """
    tokens, limits = concept_tokens(embeddings), concept_limits(embeddings)
    check_known([name] if name else [], embeddings.names)
    entries = [
        {
            "cond": concept[None].clone(),
            "attention_mask": torch.ones(1, len(concept), dtype=torch.int64),
            "max_detections": max_detections or limit,
        }
        for part, concept, limit in zip(embeddings.names, tokens, limits, strict=True)
        if name in ("", part)
    ]
    first = entries[0]
    return [[first["cond"], {"attention_mask": first["attention_mask"], "sam3_multi_cond": entries}]]


def _encode_name(clip: Any, name: str, detector: ComfySam3) -> Tensor:
    """Return the tokens [n, D] of a part's name.

    Raises:
        SlimeError: the CLIP of another model.
    """
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(name.replace(":", " ")))
    tokens, extra = encoded[0]
    if tokens.shape[-1] != detector.token_width:
        raise SlimeError(
            f"The connected CLIP gives {tokens.shape[-1]} channels, SAM3 takes {detector.token_width}. Connect the "
            "CLIP of the SAM3 checkpoint, or none."
        )
    mask = extra.get("attention_mask")
    return tokens[0].float().cpu() if mask is None else tokens[0][mask[0].bool().to(tokens.device)].float().cpu()


def _advanced_inputs(usual: ConceptSettings) -> list[Any]:
    """Return the widgets that few need."""
    return [
        advanced(
            io.Float.Input(
                "learning_rate",
                default=usual.learning_rate,
                min=0.0001,
                max=1.0,
                step=0.0001,
                optional=True,
                tooltip="Learning rate of Adam. A smaller one needs more steps.",
            )
        ),
        advanced(
            io.Int.Input(
                "views",
                default=usual.views,
                min=1,
                max=200,
                optional=True,
                tooltip="Augmented crops of the examples, at least one each; 10 to 20 MB of memory each.",
            )
        ),
        io.Boolean.Input(
            "instances",
            default=True,
            optional=True,
            tooltip="On: every connected region of a part is an instance of its own, as SAM3 finds them. Off: all of a "
            "part is one mask.",
        ),
    ]
