"""Load models to the device, and reach the checkpoint's own modules behind what other nodes put in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import comfy.model_management
import comfy.utils
import torch

FLOW_MODELS = "Flux, Flux.2, Chroma, SD3, Qwen-Image, Lumina 2, Z-Image"  # that SLiMe can read
SUPPORTED = f"Stable Diffusion (SD1.x, SD2.x, SDXL), {FLOW_MODELS}, SAM3"
PRECISION = "manual_cast_dtype"  # the object patch of ComfyUI's ModelComputeDtype

_WITHOUT_LOADING: ContextVar[bool] = ContextVar("without_loading", default=False)


def load_on_device(patcher: Any, memory: float, whole: bool = False) -> None:
    """Call ComfyUI's ``load_models_gpu`` in inference mode, as ComfyUI does.

    Weights that were created in it and are moved outside of it become tensors that no layer accepts.
    """
    if not _WITHOUT_LOADING.get():
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([patcher], memory_required=memory, force_full_load=whole)


@contextmanager
def without_loading() -> Iterator[None]:
    """Make :func:`load_on_device` do nothing: during sampling all models are loaded, and must not move."""
    token = _WITHOUT_LOADING.set(True)
    try:
        yield
    finally:
        _WITHOUT_LOADING.reset(token)


def checkpoint_patcher(patcher: Any) -> Any:
    """Return the patcher without the modules, functions and noise schedule that other nodes put in place of the
    checkpoint's own; a clone if there are any. LoRAs stay, which are patches of weights, and so does the precision."""
    replaced = [name for name in patcher.object_patches if name != PRECISION]
    if not replaced:
        return patcher
    clone = patcher.clone()
    for name in replaced:
        del clone.object_patches[name]
    return clone


@contextmanager
def checkpoint_modules(patcher: Any) -> Iterator[None]:
    """Put the checkpoint's own modules and noise schedule into the live model, which all clones share.

    The live model may hold what was patched in for another clone: one that sampled last, or one that is sampling now.
    """
    model, backup = patcher.model, patcher.object_patches_backup
    names = sorted((name for name in backup if name != PRECISION), key=len)  # a module before what lies inside it
    patched: dict[str, Any] = {}
    try:
        for name in names:
            patched[name] = comfy.utils.set_attr(model, name, backup[name])
        yield
    finally:
        for name in reversed(patched):
            comfy.utils.set_attr(model, name, patched[name])
