"""Cache the features of views while their model lives: training again extracts only views that are new.

Views as they are do not depend on the labels, so that training after a correction extracts nothing.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..backbones.attention import Attention, tensor_bytes
from ..backbones.base import Backbone, Cacheable, Features

LIMIT = 2**30  # bytes of main memory per model
MOST_VIEWS = 256  # those of ten examples


class CachedView(NamedTuple):
    """Features of one view: maps [D, h, w] by group, the attention of an example as it is, and the maps' grid."""

    groups: Mapping[str, Tensor]
    attention: tuple[Attention, ...]
    grid: tuple[int, int]

    @property
    def size(self) -> int:
        return tensor_bytes(*self.groups.values()) + sum(layer.size for layer in self.attention)

    def features(self) -> Features:
        """Return the features of a batch of one."""
        return Features({name: maps[None] for name, maps in self.groups.items()}, self.attention, self.grid)

    def on_cpu(self) -> CachedView:
        """Return the view with tensors of its own in main memory."""
        groups = {name: maps.detach().to("cpu", copy=True) for name, maps in self.groups.items()}
        layers = (layer._replace(query=layer.query.detach().to("cpu", copy=True),
                                 key=layer.key.detach().to("cpu", copy=True)) for layer in self.attention)  # fmt: skip
        return CachedView(groups, tuple(layers), self.grid)

    def to(self, device: torch.device) -> CachedView:
        """Return the view on a device."""
        groups = {name: maps.to(device) for name, maps in self.groups.items()}
        return CachedView(groups, tuple(layer.to(device) for layer in self.attention), self.grid)


class ViewCache:
    """The views used last, at most 256, within ``limit`` bytes."""

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
        while self._size > self.limit or len(self._views) > MOST_VIEWS:
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


def digest_of(*values: object) -> str:
    """Return a digest of tensors and of other values by their text."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(repr((value.shape, value.dtype)).encode())
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
