"""Cache the features of views while their model lives: training again extracts only views that are new.

Views as they are do not depend on the labels, so that training after a correction extracts nothing.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakKeyDictionary

from torch import Tensor

from ..backbones.base import Backbone, Features

LIMIT = 2**30  # bytes of main memory per model
MOST_VIEWS = 256  # those of ten examples


class ViewCache:
    """Features of the views used last, each a batch of one: at most 256, within ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._views: OrderedDict[Hashable, Features] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> Features | None:
        if key in self._views:
            self._views.move_to_end(key)
        return self._views.get(key)

    def put(self, key: Hashable, view: Features) -> None:
        """Keep a copy of a view on the CPU."""
        if key in self._views or view.nbytes > self.limit:
            return
        self._views[key] = view.to("cpu", copy=True)
        self._size += view.nbytes
        while self._size > self.limit or len(self._views) > MOST_VIEWS:
            self._size -= self._views.popitem(last=False)[1].nbytes


_caches: WeakKeyDictionary[object, ViewCache] = WeakKeyDictionary()


def cache_of(backbone: Backbone) -> tuple[ViewCache, Hashable] | None:
    """Return the cache of a backbone's model and a key of its state, or None where it allows no caching."""
    key = backbone.cache_key()
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
