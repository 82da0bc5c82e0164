"""The official code's read-out, for the "paper" preset and for official files.

Differs from :mod:`slime.read` in all but WAS: a softmax over all tokens of the context per head and layer, a gate, a
threshold on the first class, and a rescaling of every WAS map. Source: src/stable_difusion.py and src/slime.py of the
official repository, which the paper does not describe in this detail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import resize_maps, was_maps
from .denoiser import Attention

GATE = 0.2  # a class counts where its map reaches this somewhere


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
    cross: Sequence[Attention], self_attention: Sequence[Attention], parts: int, grid: tuple[int, int]
) -> Tensor:
    """Class maps [B, parts + 1, *grid] to take the argmax of; they are not probabilities.

    Classes that miss the gate get zeros. Among those that pass, the first one (usually the background) keeps only what
    lies above its mean; every WAS map is stretched to the range of its own cross-attention map.
    """
    maps = token_maps(cross, parts + 1, grid)
    result = torch.zeros_like(maps)
    for index, image_maps in enumerate(maps):
        low, high = image_maps.amin((1, 2)), image_maps.amax((1, 2))
        passed = torch.nonzero(high >= GATE).flatten()
        if len(passed) == 0:
            continue
        kept = image_maps[passed].clone()
        kept[0] = torch.where(kept[0] > kept[0].mean(), kept[0], 0.0)
        one = [a._replace(query=a.query[index : index + 1], key=a.key[index : index + 1]) for a in self_attention]
        was = was_maps(one, kept[None])[0]
        was_low, was_high = was.amin((1, 2)), was.amax((1, 2))
        stretch = (high[passed] - low[passed]) / (was_high - was_low).clamp(min=1e-12)
        result[index, passed] = (was - was_low[:, None, None]) * stretch[:, None, None] + low[passed][:, None, None]
    return result
