"""Define the result of training: part embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .backbones.base import Backbone, ExtractionSpec
from .backbones.fused import TOGETHER
from .backbones.layers import LayerChoice
from .decode.linear import LinearDecoder
from .errors import SlimeError
from .examples import check_names
from .paper.decoder import PaperDecoder
from .parts.palette import Color, default_palette
from .settings import RESOLUTION, SHARED

LINEAR, CONTEXT, CONCEPT = "linear", "context", "concept"
Decoder = LinearDecoder | PaperDecoder  # a decoder extracts what it needs in a pass, and decodes part maps from that
DECODERS: dict[str, type[Decoder]] = {decoder.kind: decoder for decoder in (LinearDecoder, PaperDecoder)}


@dataclass(frozen=True)
class PartEmbeddings:
    """What one training run learned.

    Attributes:
        names: part names.
        vectors: float32 [P, D] by feature group. In "linear" mode weights of a linear probe on the features; in
            "context" mode token embeddings, under the one name "shared" (without a condition: offsets from the first
            token).
        condition: inputs of the backbone besides the image, or None in the compact form until :meth:`completed`.
        prompt: text that the condition was made of.
        backbone: id of the kind of model the vectors belong to.
        layers: layers that are read.
        timestep, side: noise level and image size of the features.
        mode: "linear" (the backbone runs on its own condition, the vectors only score its features) or "context" (the
            vectors replace tokens 1.. of the text context, as in the paper) or "concept" (text tokens for SAM3, see
            :mod:`slime.concepts.train`).
        grouping: how layers form feature groups, "resolution" or "layer".
        decoder: how part maps are decoded.
        palette: one RGB colour per part.
        example_confidence: mean peak of the part maps on the examples, 0 where unknown, see
            :attr:`slime.parts.maps.PartMaps.confidence`.
        settings, losses: of the training, for information.
    """

    names: tuple[str, ...]
    vectors: Mapping[str, Tensor]
    condition: Mapping[str, Tensor] | None
    prompt: str
    backbone: str
    layers: LayerChoice
    timestep: int
    side: int
    mode: str = LINEAR
    grouping: str = RESOLUTION
    decoder: Decoder = LinearDecoder()
    palette: tuple[Color, ...] = ()
    example_confidence: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.names)
        shapes = {name: list(vector.shape) for name, vector in self.vectors.items()}
        if not shapes or any(len(shape) != 2 or shape[0] != len(self.names) for shape in shapes.values()):
            raise SlimeError(f"Vectors of the shapes {shapes} do not fit {len(self.names)} parts.")
        if not self.palette:
            object.__setattr__(self, "palette", default_palette(len(self.names)))

    def check_model(self, backbone: Backbone) -> None:
        """Raise SlimeError if the embeddings were trained on another kind of model, or read layers it lacks."""
        if self.mode == CONCEPT:
            raise SlimeError(
                f"These embeddings ({', '.join(self.names)}) are SAM3 concepts. Connect them to SLiMe SAM3 Prompt, and "
                "its conditioning to SAM3 Detect."
            )
        if self.backbone != backbone.info.id:
            raise SlimeError(
                f'These embeddings ({", ".join(self.names)}) were trained on a "{self.backbone}" model, but the '
                f'connected model is "{backbone.info.id}". {_cure(self.backbone, backbone.info.id)}'
            )
        known = {layer.name for layer in backbone.layers}
        missing = [name for name in (*self.layers.read, *self.layers.propagate) if name not in known]
        if missing or not self.layers.read:
            raise SlimeError(
                f"These embeddings read the layers {', '.join(missing) or '(none)'}, which the connected model lacks. "
                "Train them again with this model."
            )

    def extraction_spec(self) -> ExtractionSpec:
        """Return the pass that these embeddings are decoded from.

        Raises:
            SlimeError: in the compact form.
        """
        if self.condition is None:
            raise SlimeError(
                "These embeddings were loaded from a text, which lacks the text conditioning: connect the CLIP to clip."
            )
        condition = dict(self.condition)
        if self.mode == CONTEXT:
            tokens = condition["context"].float().clone()
            tokens[1 : len(self.names) + 1] = self.vectors[SHARED].to(tokens)
            condition["context"] = tokens
        return ExtractionSpec(self.layers, condition, self.timestep, self.grouping)

    def offsets(self) -> Mapping[str, Tensor]:
        """Return the vectors [P, D] as offsets from the background's, for linear scores."""
        if self.mode != CONTEXT:
            return self.vectors
        background = self.extraction_spec().condition["context"][0].float()
        return {name: vector - background for name, vector in self.vectors.items()}

    def extraction_key(self) -> str:
        """Return a digest, equal for embeddings decoded from the same pass; a compact form goes by its prompt."""
        read = (self.backbone, self.layers, self.timestep, self.side, self.grouping, self.decoder.kind)
        complete = self.condition is not None
        digest = hashlib.sha256(repr(read if complete else (*read, self.prompt)).encode())
        for name, tensor in sorted(self.extraction_spec().condition.items() if complete else ()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def completed(self, backbone: Backbone) -> PartEmbeddings:
        """Return the compact form completed by encoding its prompt; unchanged when complete."""
        if self.condition is not None:
            return self
        condition, vectors = backbone.condition(self.prompt), self.vectors
        if self.mode == CONTEXT:
            vectors = {name: vector + condition["context"][0].float() for name, vector in vectors.items()}
        return replace(self, vectors=vectors, condition=condition)


def _cure(learned: str, connected: str) -> str:
    """Say what to connect or disconnect; ids of fused backbones are joined by :data:`TOGETHER`."""
    wanted, given = (name.split(TOGETHER) for name in (learned, connected))
    lacking = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    if lacking and not extra:
        return f"Connect {' and '.join(lacking)} as well; a vision encoder or SAM3 goes to clip_vision."
    if extra and not lacking:
        return f"Disconnect {' and '.join(extra)}."
    return "Load a model of the same family, or train on this one."
