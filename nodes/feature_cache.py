"""Keep the features of the last images, so that other embeddings or decode settings need no pass."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakKeyDictionary

from torch import Tensor

from ..slime.backbones.base import Backbone
from ..slime.embeddings import PartEmbeddings
from ..slime.parts.maps import PartMaps
from ..slime.segment import ExtractedImages, OnBatch, decode, extract, segment
from ..slime.settings import SegmentSettings

LIMIT = 2**30  # bytes of main memory per model
MOST_BATCHES = 8  # kept
MOST_IMAGES = 4  # of a batch; larger ones are segmented without keeping their features

_caches: WeakKeyDictionary[object, OrderedDict[Hashable, ExtractedImages]] = WeakKeyDictionary()


def segment_cached(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings,
    settings: SegmentSettings,
    on_batch: OnBatch,
    latents: Tensor | None = None,
) -> PartMaps:
    """Segment as :func:`slime.segment.segment`, with features of the cache where it has them.

    Close-ups, crops, latents and large batches are not cached.
    """
    key = backbone.cache_key()
    plain = settings.tiles == 1 and not settings.closeups and latents is None and len(images) <= MOST_IMAGES
    if key is None or not plain:
        return segment(backbone, images, embeddings, settings, on_batch=on_batch, latents=latents)[0]
    owner, state = key
    embeddings.check_model(backbone)
    embeddings = embeddings.completed(backbone)
    cache = _caches.setdefault(owner, OrderedDict())
    asked = (settings.seed, settings.average_flip, settings.noise_samples, settings.batch_size)
    entry = (state, embeddings.extraction_key(), asked, _digest(images))
    extracted = cache.pop(entry, None)
    if extracted is None:
        extracted = extract(backbone, images, embeddings, settings, on_batch=on_batch)
    cache[entry] = extracted
    while len(cache) > MOST_BATCHES or sum(item.nbytes for item in cache.values()) > LIMIT:
        cache.popitem(last=False)
    return decode(extracted, embeddings, settings, backbone.device)


def _digest(images: Tensor) -> tuple[object, str]:
    return tuple(images.shape), hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
