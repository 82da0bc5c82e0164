"""Bring models to the device; while sampling runs they are used as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import comfy.model_management
import torch

_AS_THEY_LIE: ContextVar[bool] = ContextVar("as_they_lie", default=False)


def load_model(patcher: Any, memory: float, whole: bool = False) -> None:
    """ComfyUI's ``load_models_gpu``, in inference mode, as ComfyUI itself: weights that were made in it and are moved
    outside of it become tensors that no layer takes."""
    if not _AS_THEY_LIE.get():
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([patcher], memory_required=memory, force_full_load=whole)


@contextmanager
def as_they_lie() -> Iterator[None]:
    """Inside sampling, which has loaded what it needs: no weights are moved."""
    token = _AS_THEY_LIE.set(True)
    try:
        yield
    finally:
        _AS_THEY_LIE.reset(token)
