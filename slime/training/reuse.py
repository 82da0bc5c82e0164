"""What views of the examples showed, kept while their model lives: training again looks only at views that are new."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..backbones.base import Backbone, Identified
from ..examples import Example
from ..settings import ViewSettings

LIMIT = 2**30  # bytes of main memory for each model


class SeenView(NamedTuple):
    """Features [D, h, w] of every group, and soft labels [K, h, w] on the grid."""

    features: tuple[Tensor, ...]
    labels: Tensor

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.features, self.labels))


class Store:
    """The views seen last, within ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._views: OrderedDict[Hashable, SeenView] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> SeenView | None:
        if key in self._views:
            self._views.move_to_end(key)
        return self._views.get(key)

    def put(self, key: Hashable, view: SeenView) -> None:
        """Keep a view whose tensors are its own and on the CPU."""
        if key in self._views or view.size > self.limit:
            return
        self._views[key] = view
        self._size += view.size
        while self._size > self.limit:
            self._size -= self._views.popitem(last=False)[1].size


_stores: WeakKeyDictionary[object, Store] = WeakKeyDictionary()


def store_of(backbone: Backbone) -> tuple[Store, Hashable] | None:
    """The store of a backbone's model with what tells its state, or None where it cannot say."""
    identity = backbone.identity() if isinstance(backbone, Identified) else None
    if identity is None:
        return None
    owner, state = identity
    return _stores.setdefault(owner, Store(LIMIT)), state


def forget() -> None:
    """Drop all of it: for measurements."""
    _stores.clear()


def digest(example: Example, settings: ViewSettings) -> str:
    """What the views of an example depend on, beside their place."""
    shown = [getattr(settings, item.name) for item in fields(ViewSettings) if item.name != "views"]
    found = hashlib.sha256(repr((example.names, example.image.shape, shown)).encode())
    for tensor in (example.image, example.labels.to(torch.uint8)):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
