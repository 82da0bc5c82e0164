"""Define what a trainer is; the list of them is in :mod:`slime.train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..backbones.base import Backbone
from ..embeddings import PartEmbeddings
from ..examples import Example
from ..settings import TrainSettings
from .progress import OnStep

# backbone, examples, settings, init_embeddings, validation, on_step
Train = Callable[[Backbone, Sequence[Example], Any, PartEmbeddings | None, Sequence[Example], OnStep], PartEmbeddings]


@dataclass(frozen=True)
class Trainer:
    """A way to learn part embeddings.

    Attributes:
        name: of its preset.
        settings: its settings class; an instance without arguments is the preset.
        mode: of the embeddings it learns, see :class:`slime.PartEmbeddings`.
        train: learns part embeddings from examples that were checked.
    """

    name: str
    settings: type[TrainSettings]
    mode: str
    train: Train
