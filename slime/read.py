"""Read-out: features + rows -> part maps. No UNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import join_background, resize_maps, was_maps
from .features import Features
from .official import official_maps, token_maps


@dataclass(frozen=True)
class ReadOut:
    """How scores become part maps.

    Attributes:
        order: times the maps are propagated by self-attention (1 as in the paper, 2 as in GoCA, 0 not at all).
        mix: share of the propagated (WAS) map in the result; the rest is the plain cross-attention map.
        sharpen: exponent that calibrates the final probabilities, see :func:`calibrating_exponent`; it moves no border.
        official: read as the official code does (see :mod:`slime.official`); ``mix`` does not count then.
        all_tokens, gate, subtract_mean, rescale: steps of the official read-out, see :func:`official_maps`; without
            ``all_tokens`` the softmax goes over the parts alone.
    """

    order: int = 1
    mix: float = 0.5
    sharpen: float = 1.0
    official: bool = False
    all_tokens: bool = True
    gate: float = 0.2
    subtract_mean: bool = True
    rescale: bool = True


def part_logits(features: Features, rows: Tensor, background: Tensor, parts: int) -> Tensor:
    """Scores of the background and of every part, [B, K, h, w] on the features' grid.

    Args:
        features: of B images.
        rows: [1, R, D] shared by all groups of the features, or [G, R, D] one set a group.
        background: the frozen start-token row [D].
        parts: the first so many rows are parts, the others stand for the background too.
    """
    total: Tensor | None = None
    groups = rows.expand(len(features.scores), -1, -1)
    for maps, group in zip(features.scores, groups, strict=True):
        classes = torch.cat([background[None].to(maps), group.to(maps)])
        scores = resize_maps(torch.einsum("bdhw,kd->bkhw", maps, classes), features.grid)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("features hold no cross-attention layer")
    return join_background(total, parts)


def read(features: Features, rows: Tensor, background: Tensor, parts: int, read_out: ReadOut) -> Tensor:
    """Part probabilities [B, K, h, w], summing to 1 over K (class maps for the argmax with the official read-out)."""
    if read_out.official and read_out.all_tokens:
        maps = token_maps(features.cross_attention, parts + 1, features.grid)
        return _official(features, maps, read_out)
    return read_logits(features, part_logits(features, rows, background, parts), read_out)


def read_logits(features: Features, logits: Tensor, read_out: ReadOut, propagated: Tensor | None = None) -> Tensor:
    """The same from scores [B, K, h, w] of the background and of every part; ``propagated`` are WAS maps at hand."""
    maps = F.softmax(logits, 1)
    if read_out.official:
        return _official(features, maps, read_out)
    return propagate_maps(features, maps, read_out, propagated)


def _official(features: Features, maps: Tensor, read_out: ReadOut) -> Tensor:
    return official_maps(
        maps,
        features.self_attention,
        order=read_out.order,
        gate=read_out.gate,
        subtract_mean=read_out.subtract_mean,
        rescale=read_out.rescale,
    )


def calibrate(maps: Tensor, read_out: ReadOut) -> Tensor:
    """Probabilities [B, K, H, W] raised to ``sharpen`` and normalised."""
    if read_out.official or read_out.sharpen == 1:
        return maps
    sharp = maps.clamp(min=0) ** read_out.sharpen
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


def propagate_maps(features: Features, maps: Tensor, read_out: ReadOut, propagated: Tensor | None = None) -> Tensor:
    """Blend cross-attention maps [B, K, h, w] with their WAS maps, which the pass may have made already."""
    if not features.self_attention or read_out.order == 0 or read_out.mix == 0:
        return maps
    if propagated is None:
        propagated = was_maps(features.self_attention, maps, read_out.order)
    else:
        propagated = was_maps(features.self_attention, propagated, read_out.order - 1)
    return (1 - read_out.mix) * maps + read_out.mix * propagated
