"""Decode part maps from features: softmax of linear part logits, half of it propagated along self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.attention import Attention, was_maps
from ..backbones.base import Backbone, ExtractionSpec, Features, PartLogits, ScoresParts
from ..errors import SlimeError
from ..images import resize_maps
from ..settings import SHARED

if TYPE_CHECKING:
    from ..embeddings import PartEmbeddings

PROPAGATION_STEPS = 1  # as in the paper; 2 as in GoCA
PROPAGATED_SHARE = 0.5  # of the propagated (WAS) maps in the result


@dataclass(frozen=True)
class LinearDecoder:
    """Decoder of part vectors that are weights of a linear probe.

    ``kind`` is stored in embeddings files.

    Attributes:
        temperature: softmax temperature that calibrates the final probabilities; it moves no border, see
            :func:`calibrating_temperature`.
    """

    kind: ClassVar[str] = "linear"

    temperature: float = 1.0

    def extract(
        self,
        backbone: Backbone,
        encoded: Tensor,
        spec: ExtractionSpec,
        noise: Tensor,
        embeddings: Sequence[PartEmbeddings] | None,
    ) -> Features | PartLogits:
        """Run one pass over encoded images: logits of these embeddings where the backbone can compute them, else
        features for any of the same spec."""
        if embeddings is None or not isinstance(backbone, ScoresParts):
            return backbone.extract(encoded, spec, noise)
        return backbone.score_parts(encoded, spec, noise, [item.offsets() for item in embeddings])

    def decode(self, extracted: Features | PartLogits, embeddings: PartEmbeddings, index: int) -> Tensor:
        """Return part probabilities [B, K, h, w] that sum to 1 over K.

        The embeddings are number ``index`` of those given to :meth:`extract`.
        """
        if isinstance(extracted, Features):
            return decode_features(extracted, embeddings.offsets())
        propagated = extracted.propagated[index] if extracted.propagated else None
        return propagate_maps(extracted.logits[index].softmax(1), extracted.attention, propagated)

    def weights(self, maps: Tensor) -> Tensor:
        """Return the weight of these maps in the average over crops and noise samples: 1 everywhere."""
        return torch.ones_like(maps[:, :1])


def part_logits(features: Features, vectors: Mapping[str, Tensor]) -> Tensor:
    """Return logits of the background, which are 0, and of every part: [B, K, h, w] on the features' grid.

    Args:
        features: of B images.
        vectors: part vectors [P, D] by feature group, or one [P, D] named "shared" for all groups.

    Raises:
        SlimeError: a feature group without vectors.
    """
    total: Tensor | None = None
    for name, maps in features.groups.items():
        vector = vectors.get(name, vectors.get(SHARED))
        if vector is None or vector.shape[1] != maps.shape[1]:
            raise SlimeError(
                f"These embeddings have vectors for {', '.join(vectors)}, but the model gives features "
                f"{', '.join(features.groups)}. Train them again with this model."
            )
        scores = resize_maps(torch.einsum("bdhw,kd->bkhw", maps, vector.to(maps)), features.grid)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("there are no features")
    return F.pad(total, (0, 0, 0, 0, 1, 0))


def decode_features(features: Features, vectors: Mapping[str, Tensor]) -> Tensor:
    """Return part probabilities [B, K, h, w] that sum to 1 over K."""
    return propagate_maps(F.softmax(part_logits(features, vectors), 1), features.attention)


def propagate_maps(maps: Tensor, attention: Sequence[Attention], propagated: Tensor | None = None) -> Tensor:
    """Blend maps [B, K, h, w] with their WAS maps, which the pass may have computed already (``propagated``)."""
    if not attention or PROPAGATION_STEPS == 0 or PROPAGATED_SHARE == 0:
        return maps
    if propagated is None:
        propagated = was_maps(attention, maps, PROPAGATION_STEPS)
    else:
        propagated = was_maps(attention, propagated, PROPAGATION_STEPS - 1)
    return (1 - PROPAGATED_SHARE) * maps + PROPAGATED_SHARE * propagated


def apply_temperature(maps: Tensor, temperature: float) -> Tensor:
    """Raise probabilities [B, K, H, W] to 1 / ``temperature`` and normalise them."""
    if temperature == 1:
        return maps
    sharp = maps.clamp(min=0) ** (1 / temperature)
    return sharp / sharp.sum(1, keepdim=True).clamp(min=1e-12)


def calibrating_temperature(maps: Tensor, labels: Tensor) -> float:
    """Return the temperature in [1/16, 1] with the lowest cross-entropy on the examples.

    Averaging over layers and neighbours makes maps less confident than they are accurate; the temperature corrects
    that, on unseen images too (``benchmark confidence``).

    Args:
        maps: part probabilities [B, K, h, w] of the examples.
        labels: their soft labels [B, K, h, w].
    """
    exponents = 2 ** torch.linspace(0, 4, 17)
    logs = maps.clamp(min=1e-6).log()
    losses = [-(labels * (exponent * logs).log_softmax(1)).sum() for exponent in exponents.tolist()]
    return 1 / float(exponents[torch.stack(losses).argmin().cpu()])
