"""The official code's decoder, for the "paper" preset and for official files.

It differs from :mod:`slime.decode.linear` in everything but WAS: a softmax over all tokens of the context per head and
layer, a gate, a threshold on the first class, and a rescaling of every WAS map. Source: src/stable_difusion.py and
src/slime.py of the official repository, which the paper does not describe in this detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.attention import Attention, was_maps
from ..backbones.base import Backbone, ExtractionSpec
from ..backbones.text import Context, capture_attention, text_conditioned
from ..images import resize_maps

if TYPE_CHECKING:
    from ..embeddings import PartEmbeddings

CELL = 8  # pixels per side of a latent pixel


@dataclass(frozen=True)
class AttentionMaps:
    """Inputs of the cross-attention layers to read, with all tokens, and of the self-attention to propagate along."""

    cross: tuple[Attention, ...]
    attention: tuple[Attention, ...]

    def to(self, device: torch.device | str) -> AttentionMaps:
        """Return the same on another device."""
        return AttentionMaps(tuple(a.to(device) for a in self.cross), tuple(a.to(device) for a in self.attention))

    @property
    def nbytes(self) -> int:
        """Bytes of queries and keys."""
        return sum(a.nbytes for a in (*self.cross, *self.attention))


@dataclass(frozen=True)
class PaperDecoder:
    """Decoder of token embeddings in the text context, as in the official code; its maps are not probabilities."""

    kind: ClassVar[str] = "paper"
    temperature: ClassVar[float] = 1.0

    def extract(
        self,
        backbone: Backbone,
        encoded: Tensor,
        spec: ExtractionSpec,
        noise: Tensor,
        embeddings: Sequence[PartEmbeddings] | None,
    ) -> AttentionMaps:
        """Run one pass with the learned tokens in its context."""
        del embeddings
        denoiser = text_conditioned(backbone, "The preset paper")
        context = Context.of(spec.condition)
        capture = capture_attention(denoiser, encoded, spec.timestep, noise, context, spec.layers)
        cross = tuple(capture.cross[name] for name in spec.layers.read)
        return AttentionMaps(cross, tuple(capture.self_[name] for name in spec.layers.propagate))

    def decode(self, extracted: AttentionMaps, embeddings: PartEmbeddings, index: int) -> Tensor:
        """Return class maps [B, K, h, w]."""
        del index
        grid = max((a.height, a.width) for a in (*extracted.cross, *extracted.attention))
        return official_maps(token_maps(extracted.cross, len(embeddings.names) + 1, grid), extracted.attention)

    def weights(self, maps: Tensor) -> Tensor:
        """Return 1 where a class passed the gate: the official code averages every class over these crops alone."""
        return (maps.amax((2, 3), keepdim=True) > 0).to(maps).expand_as(maps)


def token_maps(attentions: Sequence[Attention], count: int, grid: tuple[int, int]) -> Tensor:
    """Return attention probabilities of the first ``count`` tokens, mean over heads and layers: [B, count, *grid]."""
    maps = []
    for attention in attentions:
        heads = attention.heads
        query, key = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (attention.query, attention.key))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        probabilities = scores.softmax(-1)[..., :count].mean(1).transpose(1, 2)
        maps.append(resize_maps(probabilities.unflatten(2, (attention.height, attention.width)), grid))
    return torch.stack(maps).mean(0)


def official_maps(
    maps: Tensor,
    self_attention: Sequence[Attention],
    *,
    order: int = 1,
    gate: float = 0.2,
    subtract_mean: bool = True,
    rescale: bool = True,
) -> Tensor:
    """Return class maps [B, K, h, w] to take the argmax of, from attention maps [B, K, h, w].

    Args:
        maps: of :func:`token_maps`; class 0 is the background.
        self_attention: layers to propagate along.
        order: number of propagations.
        gate: a class passes if its map reaches this anywhere; the others get zeros.
        subtract_mean: of the classes that pass, the first one (usually the background) keeps only values above its
            mean.
        rescale: stretch every WAS map, by its range at full size, to the range of its own attention map.
    """
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    passed = high >= gate
    kept = torch.where(passed, maps, 0.0)
    if subtract_mean:
        first = F.one_hot(passed.flatten(1).int().argmax(1), maps.shape[1]).bool()[..., None, None]
        kept = torch.where(first & (maps <= maps.mean((2, 3), keepdim=True)), 0.0, kept)
    was = was_maps(self_attention, kept, order)
    if rescale:
        full = resize_maps(was, (CELL * was.shape[2], CELL * was.shape[3]))
        was_low, was_high = full.amin((2, 3), keepdim=True), full.amax((2, 3), keepdim=True)
        was = (was - was_low) * ((high - low) / (was_high - was_low).clamp(min=1e-12)) + low
    return torch.where(passed, was, 0 * maps)  # zeros, but NaN stays NaN, for check_finite
