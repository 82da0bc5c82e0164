"""Lend ComfyUI's weights to autograd.

ComfyUI runs nodes under ``inference_mode``; its weights are inference tensors, which autograd refuses to save. Inside
:func:`trainable` every parameter and buffer is replaced by an ordinary tensor over the same storage (no copy) where the
weight is resident, or by one copy on the compute device where it is offloaded, quantised or patched on the fly. No
weight is trained: all stay frozen, and gradients flow through them to the token embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_MISSING = object()


@contextmanager
def trainable(patcher: Any, checkpointing: bool = False) -> Iterator[None]:
    """Make the patcher's loaded model differentiable for the duration, then restore it exactly.

    Load the patcher with :func:`.loading.load_on_device` first, and call neither that nor a VAE or CLIP inside: they
    may move the lent weights. Restores on success, error and interrupt alike.

    Args:
        patcher: ComfyUI's ModelPatcher.
        checkpointing: recompute residual and transformer blocks in the backward pass.
    """
    undo: list[Callable[[], None]] = []
    model = patcher.model
    device = patcher.load_device
    dtype = model.manual_cast_dtype or model.get_dtype()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for module in model.modules():
                _lend_module(module, device, dtype, undo)
            if hasattr(comfy.model_management, "in_training"):
                _set(comfy.model_management, "in_training", True, undo)
            if checkpointing:
                for module in model.modules():
                    if isinstance(module, ResBlock | BasicTransformerBlock):
                        _set(module, "forward", partial(_checkpointed, module.forward), undo)
            yield
    finally:
        for restore in reversed(undo):
            restore()


def _lend_module(module: nn.Module, device: torch.device, dtype: torch.dtype, undo: list[Callable[[], None]]) -> None:
    functions = {name: list(getattr(module, f"{name}_function", None) or []) for name in ("weight", "bias")}
    lowvram = {name: getattr(module, f"{name}_lowvram_function", None) for name in ("weight", "bias")}
    # comfy-aimdo pages weights in and out behind autograd's back (`_v`): these need a copy of their own.
    paged = getattr(module, "_v", None) is not None
    touched = False
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        patched = bool(functions.get(name)) or lowvram.get(name) is not None
        if parameter.device == device and type(parameter.data) is Tensor and not patched and not paged:
            lent = _alias(parameter)
        else:
            touched = True
            lent = _resident_copy(parameter, device, dtype, functions.get(name, []), lowvram.get(name))
        _swap(module._parameters, name, nn.Parameter(lent, requires_grad=False), undo)
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            _swap(module._buffers, name, _alias(buffer) if buffer.device == device else buffer.to(device).clone(), undo)
    if touched:
        for name in ("weight", "bias"):
            for suffix, empty in (("function", []), ("lowvram_function", None)):
                if hasattr(module, f"{name}_{suffix}"):
                    _set(module, f"{name}_{suffix}", empty, undo)
        if hasattr(module, "comfy_cast_weights"):
            _set(module, "comfy_cast_weights", True, undo)


def _alias(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor over the storage of an inference tensor."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _resident_copy(
    parameter: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    functions: list[Callable[[Tensor], Tensor]],
    lowvram: Any,
) -> Tensor:
    with torch.no_grad():
        weight = (
            parameter.dequantize()
            if hasattr(parameter, "dequantize") and type(parameter.data) is not Tensor
            else parameter
        )
        weight = weight.to(device, dtype, copy=True)
        if lowvram is not None:
            weight = lowvram(weight)
        for function in functions:
            weight = function(weight)
        return weight.clone()


def _swap(table: dict[str, Any], name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    undo.append(partial(table.__setitem__, name, table[name]))
    table[name] = value


def _set(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    """Set an attribute, and add what restores it to ``undo``; an attribute new on the instance is deleted again."""
    before = vars(owner).get(name, _MISSING)
    undo.append(partial(delattr, owner, name) if before is _MISSING else partial(setattr, owner, name, before))
    setattr(owner, name, value)


def _checkpointed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    # The UNet rewrites transformer_options from block to block; the recomputation must see this block's.
    if isinstance(kwargs.get("transformer_options"), dict):
        kwargs["transformer_options"] = dict(kwargs["transformer_options"])
    args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
    result: Tensor = checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return result
