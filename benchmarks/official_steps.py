"""The official decoder with changes: each of its steps can be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slime import PartEmbeddings, SegmentSettings
from slime.backbones.attention import cross_scores
from slime.backbones.base import Backbone
from slime.batches import in_batches
from slime.embeddings import CONTEXT
from slime.extraction import encode_crops, merge_passes
from slime.images import resize_maps
from slime.paper.decoder import AttentionMaps, PaperDecoder, official_maps, token_maps


@dataclass(frozen=True)
class ChangedDecoder(PaperDecoder):
    """The official decoder with changes; see :func:`label_maps`."""

    all_tokens: bool = True
    steps: dict[str, Any] = field(default_factory=dict)

    def decode(self, extracted: AttentionMaps, embeddings: PartEmbeddings, index: int) -> Tensor:
        classes = len(embeddings.names) + 1
        grid = max((a.height, a.width) for a in (*extracted.cross, *extracted.attention))
        if self.all_tokens:
            maps = token_maps(extracted.cross, classes, grid)
        else:
            scores = [resize_maps(cross_scores(a, classes), grid) for a in extracted.cross]
            maps = torch.stack(scores).mean(0).softmax(1)
        return official_maps(maps, extracted.attention, **self.steps)


def label_maps(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings,
    settings: SegmentSettings,
    all_tokens: bool = True,
    **steps: Any,
) -> Tensor:
    """Return label maps [B, H, W] of images [B, H, W, 3].

    Args:
        backbone: the model.
        images: in [0, 1].
        embeddings: trained with the preset paper.
        settings: of the extraction.
        all_tokens: apply the softmax over all tokens of the text, else over the parts alone.
        steps: changes to :func:`slime.paper.decoder.official_maps`: order, gate, subtract_mean, rescale.
    """
    if embeddings.mode != CONTEXT:
        raise TypeError("only embeddings of the preset paper are decoded by the official steps")
    items: Sequence[PartEmbeddings] = [replace(embeddings, decoder=ChangedDecoder(all_tokens, steps))]
    size = (images.shape[1], images.shape[2])
    encoded = encode_crops(backbone, images, items[0], settings)

    def run(chunk: slice) -> Tensor:
        (maps,) = merge_passes(encoded.passes(chunk, items), items, size)
        return resize_maps(maps, size).argmax(1).cpu()

    return torch.cat(list(in_batches(len(images), encoded.batch, run)))
