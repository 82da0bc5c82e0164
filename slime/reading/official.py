"""The official code's read-out, for the "paper" preset and for official files.

Differs from :mod:`.read` in all but WAS: a softmax over all tokens of the context per head and layer, a gate, a
threshold on the first class, and a rescaling of every WAS map. Source: src/stable_difusion.py and src/slime.py of the
official repository, which the paper does not describe in this detail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..backbones.attention import Attention, was_maps
from ..images import resize_maps

CELL = 8  # pixels of the picture that the official code brings its maps to, a cell


def token_maps(attentions: Sequence[Attention], count: int, grid: tuple[int, int]) -> Tensor:
    """Attention probabilities of the first ``count`` tokens, mean over heads and layers: [B, count, *grid]."""
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
    """Class maps [B, K, h, w] to take the argmax of, from attention maps [B, K, h, w]; they are not probabilities.

    Args:
        maps: of :func:`token_maps`; class 0 is the background.
        self_attention: layers to propagate by.
        order: how often.
        gate: a class counts where its map reaches this somewhere; the others get zeros.
        subtract_mean: among the classes that count the first one (usually the background) keeps only what lies above
            its mean.
        rescale: every WAS map is stretched, by its range at full size, to the range of its own attention map.
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
    return torch.where(passed, was, 0 * maps)  # zeros, but NaN stays NaN, to be noticed later
