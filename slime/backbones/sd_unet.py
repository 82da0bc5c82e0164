"""Stable Diffusion UNets in any runtime: which layers are read, and how attention becomes features.

The paper's attention score is linear in the token embedding: the queries times the layer's key projection are a feature
map (:func:`.attention.score_features`). Part vectors are offsets from the start token, which stands for the background.

A layer is named by its place in the UNet as ComfyUI numbers it: ``output.3.0`` is the first transformer block of output
block 3.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SlimeError
from ..images import resize_maps
from ..settings import LAYER, SHARED
from .attention import cross_scores, score_features
from .base import BackboneInfo, ExtractionSpec, Features, PartLogits, halved
from .layers import Layer, LayerChoice, select_layers
from .text import Capture, Context, capture_attention

PROBE_LATENT = 8  # side of the smallest latent that three halvings accept
PAPER_CROSS = "output.3-5, output.6-7"
PAPER_SELF = "output.9-11"
PAPER_LAYERS = LayerChoice(
    tuple(f"output.{block}.0" for block in range(3, 8)), tuple(f"output.{block}.0" for block in range(9, 12))
)


@dataclass(frozen=True)
class Family:
    """A kind of UNet.

    Attributes:
        name: the backbone's id.
        context_dim: width of a token embedding.
        side: pixels of the square whose area it works on.
        cross, self_: layer patterns; empty for the automatic rule.
        timestep: noise level of the features.
        views: of the examples for the instant trainer, by default.
    """

    name: str
    context_dim: int
    side: int
    cross: str = ""
    self_: str = ""
    timestep: int = 100
    views: int = 24


# The paper's layers (diffusers' up_blocks[1..2] and [3]); SDXL by resolution: its up_blocks[1] is the 64x64 level.
FAMILIES = (
    Family("sd1", 768, 512, PAPER_CROSS, PAPER_SELF),
    Family("sd2", 1024, 512, PAPER_CROSS, PAPER_SELF),
    Family("sd2-768", 1024, 768, PAPER_CROSS, PAPER_SELF),
    # Features of one SDXL view take 40 MB: fewer views than elsewhere.
    Family("sdxl", 2048, 1024, "output.0-5", "output.3-5", views=16),
)


def family_for(context_dim: int, prediction: str) -> Family:
    """Return the known family with this width of token embeddings, or a generic one with the automatic layer rule.

    SD2.x comes in two: eps at 512 pixels (base) and v at 768.
    """
    known = [family for family in FAMILIES if family.context_dim == context_dim]
    if not known:
        return Family(f"unet-{context_dim}", context_dim, 512)
    return known[-1 if prediction == "v" else 0]


class SDUNet:
    """Base class of Stable Diffusion adapters. A subclass adds ``encode_images``, ``encode_prompt``, ``predict_noise``,
    ``differentiable`` and ``fitting_batch``, see :class:`.base.Backbone` and :class:`.text.TextConditioned`.

    Args:
        family: kind of UNet.
        prediction: "eps" or "v".
        layers: every transformer block in the order it runs.
        alphas_cumprod: [T].
        device: the UNet's.
        channels: of the latents.
        cell: pixels per side of a latent pixel.
    """

    def __init__(
        self,
        family: Family,
        prediction: str,
        layers: Sequence[Layer],
        alphas_cumprod: Tensor,
        device: torch.device,
        channels: int,
        cell: int,
    ) -> None:
        self.family, self.prediction, self.layers = family, prediction, tuple(layers)
        self.alphas_cumprod = alphas_cumprod.cpu().double()
        self.device, self.channels = device, channels
        self._projections: dict[str, Tensor] = {}
        if not self.layers:
            raise SlimeError("This UNet has no cross-attention layers; load an SD1.x, SD2.x or SDXL checkpoint.")
        # Every halving must come out even.
        multiple = cell * max(PROBE_LATENT, *(layer.stride for layer in self.layers))
        self.info = BackboneInfo(family.name, family.side, cell, multiple, channels, family.timestep, family.views)

    @property
    def context_dim(self) -> int:
        return self.family.context_dim

    # Added by a subclass.

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_prompt(self, prompt: str) -> Context:
        raise NotImplementedError

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        raise NotImplementedError

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        raise NotImplementedError

    def cache_key(self) -> tuple[object, Hashable] | None:
        return None

    def fitting_batch(self, size: tuple[int, int]) -> int:
        raise NotImplementedError

    # Shared.

    def default_layers(self) -> LayerChoice:
        """Return the layers of the family's table, else those of :func:`automatic_layers`."""
        automatic = automatic_layers(self.layers)
        cross, self_ = self.family.cross, self.family.self_
        read = select_layers(cross, self.layers) if cross else automatic.read
        return LayerChoice(read, select_layers(self_, self.layers) if self_ else automatic.propagate)

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """Return "context" [T, D] in half precision, and SDXL's "pooled" [P]."""
        context = self.encode_prompt(prompt)
        width = context.tokens.shape[-1]
        if width != self.context_dim:
            raise SlimeError(
                f"The CLIP gives token embeddings {width} wide, but the model needs {self.context_dim}: connect the "
                "CLIP of the same checkpoint as the model."
            )
        pooled = {} if context.pooled is None else {"pooled": halved(context.pooled)}
        return {"context": halved(context.tokens)} | pooled

    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        context = Context.of(spec.condition)
        projections = self._key_projections(spec.layers, context.pooled)
        capture = capture_attention(self, encoded, spec.timestep, noise, context, spec.layers)
        groups: dict[str, Tensor] = {}
        share = 1 / len(spec.layers.read) if spec.layers.read else 0.0
        for group, names in self._groups(spec).items():
            for name in names:
                attention = capture.cross[name]
                maps = score_features(attention, projections[name]) * share
                groups[group] = groups[group] + maps if group in groups else maps
        propagating = tuple(capture.self_[name] for name in spec.layers.propagate)
        grid = max((a.height, a.width) for a in (*propagating, *capture.cross.values()))
        return Features(groups, propagating, grid)

    def score_parts(
        self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor, vectors: Sequence[Mapping[str, Tensor]]
    ) -> PartLogits:
        """Compute the logits of sets of part vectors, which are appended to the context as extra tokens.

        The layers compute the keys of these tokens themselves, so no other pass is needed. A key projection has no
        bias, so the key of an offset scores a part against the background.
        """
        tokens = [vector for item in vectors for vector in item.values()]
        context = replace(Context.of(spec.condition), extra=torch.cat(tokens))
        chosen = {*spec.layers.read, *spec.layers.propagate}
        stride = min(layer.stride for layer in self.layers if layer.name in chosen)
        grid = (-(-encoded.shape[-2] // stride), -(-encoded.shape[-1] // stride))
        logits: list[Tensor] = []

        def make_maps(capture: Capture) -> Tensor:
            first = len(context)
            for item in vectors:
                logits.append(self._logits(capture, spec, item, first, grid))
                first += sum(len(vector) for vector in item.values())
            return torch.cat([F.softmax(one, 1) for one in logits], 1)

        capture = capture_attention(self, encoded, spec.timestep, noise, context, spec.layers, make_maps)
        if not logits:
            make_maps(capture)
        propagated: tuple[Tensor, ...] = ()
        if spec.layers.propagate and len(capture.propagated) == len(spec.layers.propagate):
            was = torch.stack([resize_maps(one, grid) for one in capture.propagated.values()]).mean(0)
            propagated = was.split([one.shape[1] for one in logits], 1)
        return PartLogits(tuple(logits), tuple(capture.self_[name] for name in spec.layers.propagate), propagated)

    def _logits(
        self, capture: Capture, spec: ExtractionSpec, vectors: Mapping[str, Tensor], first: int, grid: tuple[int, int]
    ) -> Tensor:
        """Return logits [B, K, *grid] of one set of part vectors, whose keys begin at token ``first``."""
        starts, position = {}, first
        for group, vector in vectors.items():
            starts[group], position = position, position + len(vector)
        count = len(next(iter(vectors.values())))
        groups = {name: group for group, names in self._groups(spec).items() for name in names}
        scores = []
        for name in spec.layers.read:
            start = starts.get(groups[name], starts.get(SHARED))
            if start is None:
                raise SlimeError(f"These embeddings have no vectors for the features {groups[name]}. Train them again.")
            maps = cross_scores(capture.cross[name], count, start)
            scores.append(1 / len(spec.layers.read) * resize_maps(maps, grid))
        return F.pad(torch.stack(scores).sum(0), (0, 0, 0, 0, 1, 0))

    def _groups(self, spec: ExtractionSpec) -> dict[str, list[str]]:
        """Return the names of the layers of every feature group, coarse to fine."""
        read = [layer for layer in self.layers if layer.name in spec.layers.read]
        groups: dict[str, list[str]] = {}
        for layer in sorted(read, key=lambda layer: -layer.stride):
            group = layer.name if spec.grouping == LAYER else f"stride{layer.stride}"
            groups.setdefault(group, []).append(layer.name)
        return groups

    @torch.no_grad()
    def _key_projections(self, choice: LayerChoice, pooled: Tensor | None) -> dict[str, Tensor]:
        """Return W_K^T [D, heads*d] of every chosen cross-attention layer.

        A key projection has no bias, so the keys of the identity matrix are the projection itself. Going through the
        model's own layers includes LoRA, quantised and offloaded weights. Costs one pass over a tiny latent per
        backbone, whose weights do not change; ``pooled`` is SDXL's, of any prompt.
        """
        if not set(choice.read) <= self._projections.keys():
            probe = Capture(LayerChoice(choice.read, ()), stop_early=True)
            latent = torch.zeros(1, self.channels, PROBE_LATENT, PROBE_LATENT, device=self.device)
            self.predict_noise(latent, 0, Context(torch.eye(self.context_dim), pooled), probe)
            self._projections.update({name: attention.key[0] for name, attention in probe.cross.items()})
        return self._projections


def automatic_layers(layers: Sequence[Layer]) -> LayerChoice:
    """Return the paper's choice expressed by resolution, for a UNet that has no table.

    Cross-attention of the decoder at a half and a quarter of the latent's side, self-attention of the decoder at its
    finest side.
    """
    decoder = [layer for layer in layers if layer.name.startswith("output.")] or list(layers)
    finest = min(layer.stride for layer in decoder)
    cross = tuple(layer.name for layer in decoder if layer.stride in (2, 4)) or tuple(layer.name for layer in decoder)
    return LayerChoice(cross, tuple(layer.name for layer in decoder if layer.stride == finest))
