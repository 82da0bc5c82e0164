"""Cache the features of views while their model lives: training again extracts only views that are new."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..backbones.attention import tensor_bytes
from ..backbones.base import Backbone, Cacheable
from ..examples import Example
from ..settings import ViewSettings

LIMIT = 2**30  # bytes of main memory per model


class CachedView(NamedTuple):
    """Features [D, h, w] by group, and soft labels [K, h, w] on the grid."""

    features: Mapping[str, Tensor]
    labels: Tensor

    @property
    def size(self) -> int:
        return tensor_bytes(*self.features.values(), self.labels)


class ViewCache:
    """The views used last, within ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._views: OrderedDict[Hashable, CachedView] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> CachedView | None:
        if key in self._views:
            self._views.move_to_end(key)
        return self._views.get(key)

    def put(self, key: Hashable, view: CachedView) -> None:
        """Keep a view whose tensors belong to it alone and are on the CPU."""
        if key in self._views or view.size > self.limit:
            return
        self._views[key] = view
        self._size += view.size
        while self._size > self.limit:
            self._size -= self._views.popitem(last=False)[1].size


_caches: WeakKeyDictionary[object, ViewCache] = WeakKeyDictionary()


def cache_of(backbone: Backbone) -> tuple[ViewCache, Hashable] | None:
    """Return the cache of a backbone's model and a key of its state, or None where it allows no caching."""
    key = backbone.cache_key() if isinstance(backbone, Cacheable) else None
    if key is None:
        return None
    owner, state = key
    return _caches.setdefault(owner, ViewCache(LIMIT)), state


def clear_caches() -> None:
    """Drop everything, for measurements."""
    _caches.clear()


def example_digest(example: Example, settings: ViewSettings) -> str:
    """Return a digest of everything that the views of an example depend on, besides their number."""
    values = [getattr(settings, item.name) for item in fields(ViewSettings) if item.name != "views"]
    digest = hashlib.sha256(repr((example.names, example.image.shape, values)).encode())
    for tensor in (example.image, example.labels.to(torch.uint8)):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
