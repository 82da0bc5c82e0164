"""Read-out: an observation and rows, or scores at hand, become part maps. No model runs here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..backbones.attention import Attention, was_maps
from ..backbones.base import Observation
from ..errors import SlimeError
from ..images import resize_maps
from ..read_out import Propagated


def part_logits(observation: Observation, rows: Tensor) -> Tensor:
    """Scores of the background, which is 0, and of every part: [B, K, h, w] on the observation's grid.

    Args:
        observation: of B images.
        rows: [1, P, D] shared by all groups of features, or [G, P, D] one set a group.
    """
    if len(rows) not in (1, len(observation.features)):
        raise SlimeError(
            f"There are rows for {len(rows)} groups of layers, but the model shows {len(observation.features)}."
        )
    total: Tensor | None = None
    for maps, group in zip(observation.features, rows.expand(len(observation.features), -1, -1), strict=True):
        scores = resize_maps(torch.einsum("bdhw,kd->bkhw", maps, group.to(maps)), observation.grid)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("nothing was observed")
    return F.pad(total, (0, 0, 0, 0, 1, 0))


def read(observation: Observation, rows: Tensor, read_out: Propagated) -> Tensor:
    """Part probabilities [B, K, h, w], summing to 1 over K."""
    return propagate_maps(F.softmax(part_logits(observation, rows), 1), observation.attention, read_out)


def propagate_maps(
    maps: Tensor, attention: Sequence[Attention], read_out: Propagated, propagated: Tensor | None = None
) -> Tensor:
    """Blend maps [B, K, h, w] with their WAS maps, which the pass may have made already (``propagated``)."""
    if not attention or read_out.order == 0 or read_out.mix == 0:
        return maps
    if propagated is None:
        propagated = was_maps(attention, maps, read_out.order)
    else:
        propagated = was_maps(attention, propagated, read_out.order - 1)
    return (1 - read_out.mix) * maps + read_out.mix * propagated


def calibrate(maps: Tensor, exponent: float) -> Tensor:
    """Probabilities [B, K, H, W] raised to ``exponent`` and normalised."""
    if exponent == 1:
        return maps
    sharp = maps.clamp(min=0) ** exponent
    return sharp / sharp.sum(1, keepdim=True).clamp(min=1e-12)


def calibrating_exponent(maps: Tensor, labels: Tensor) -> float:
    """``sharpen`` for maps like these [B, K, h, w] of the examples, by their labels [B, K, h, w].

    Averaging over layers and neighbours leaves maps less sure than they are right; the exponent with the lowest
    cross-entropy makes up for it, on images that were not seen too (``benchmark confidence``).
    """
    exponents = 2 ** torch.linspace(0, 4, 17)
    logs = maps.clamp(min=1e-6).log()
    losses = [-(labels * (exponent * logs).log_softmax(1)).sum() for exponent in exponents.tolist()]
    return float(exponents[torch.stack(losses).argmin().cpu()])
