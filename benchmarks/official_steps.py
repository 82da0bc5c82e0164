"""The steps of the official read-out one by one: each can be left out, which the product has no need of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slime import PartEmbeddings, SegmentSettings
from slime.backbones.attention import cross_scores
from slime.backbones.base import Backbone
from slime.images import resize_maps
from slime.reading.look import Seen, Tokens, read_maps
from slime.reading.official import official_maps, token_maps
from slime.segment import look


def label_maps(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings,
    settings: SegmentSettings,
    all_tokens: bool = True,
    **steps: Any,
) -> Tensor:
    """Label maps [B, H, W] of images [B, H, W, 3].

    Args:
        embeddings: learned by the preset paper.
        settings: of the look.
        all_tokens: the softmax goes over all tokens of the text; else over the parts alone.
        steps: changes of :func:`slime.reading.official.official_maps`: order, gate, subtract_mean, rescale.
    """
    size, classes = (images.shape[1], images.shape[2]), len(embeddings.names) + 1

    def read(seen: Seen, item: PartEmbeddings, index: int) -> Tensor:
        if not isinstance(seen, Tokens):
            raise TypeError("only embeddings of the preset paper are read by the official steps")
        grid = max((a.height, a.width) for a in (*seen.cross, *seen.attention))
        maps = token_maps(seen.cross, classes, grid) if all_tokens else part_maps(seen, classes, grid)
        return official_maps(maps, seen.attention, **steps)

    found = []
    for _, views in look(backbone, images, embeddings, settings).batches:
        passes = ((view, seen.to(backbone.device)) for view, seen in views)
        (maps,) = read_maps(passes, [embeddings], size, read)
        found.append(resize_maps(maps, size).argmax(1).cpu())
    return torch.cat(found)


def part_maps(seen: Tokens, classes: int, grid: tuple[int, int]) -> Tensor:
    """Softmax over the classes of their mean scores over heads and layers: [B, classes, *grid]."""
    return torch.stack([resize_maps(cross_scores(a, classes), grid) for a in seen.cross]).mean(0).softmax(1)
