"""Read-out: features + rows -> part maps. No UNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import resize_maps, was_maps
from .features import Features
from .official import official_maps


@dataclass(frozen=True)
class ReadOut:
    """How scores become part maps.

    Attributes:
        order: times the maps are propagated by self-attention (1 as in the paper, 2 as in GoCA, 0 not at all).
        mix: share of the propagated (WAS) map in the result; the rest is the plain cross-attention map.
        official: read as the official code does (see :mod:`slime.official`); the other fields do not count then.
    """

    order: int = 1
    mix: float = 0.5
    official: bool = False


def part_logits(features: Features, rows: Tensor, background: Tensor) -> Tensor:
    """Scores of the background and of every part, [B, K, h, w] on the features' grid.

    Args:
        features: of B images.
        rows: [1, P, D] shared by all groups of the features, or [G, P, D] one set a group.
        background: the frozen start-token row [D].
    """
    total: Tensor | None = None
    groups = rows.expand(len(features.scores), -1, -1)
    for maps, group in zip(features.scores, groups, strict=True):
        classes = torch.cat([background[None], group]).to(maps)
        scores = resize_maps(torch.einsum("bdhw,kd->bkhw", maps, classes), features.grid)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("features hold no cross-attention layer")
    return total


def read(features: Features, rows: Tensor, background: Tensor, read_out: ReadOut) -> Tensor:
    """Part probabilities [B, K, h, w], summing to 1 over K (class maps for the argmax with the official read-out)."""
    if read_out.official:
        return official_maps(features.cross_attention, features.self_attention, rows.shape[1], features.grid)
    return propagate_maps(features, F.softmax(part_logits(features, rows, background), 1), read_out)


def propagate_maps(features: Features, maps: Tensor, read_out: ReadOut) -> Tensor:
    """Blend cross-attention maps [B, K, h, w] with their WAS maps."""
    if not features.self_attention or read_out.order == 0 or read_out.mix == 0:
        return maps
    propagated = was_maps(features.self_attention, maps, read_out.order)
    return (1 - read_out.mix) * maps + read_out.mix * propagated
