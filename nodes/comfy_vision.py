"""Adapt ComfyUI's CLIP_VISION to :class:`slime.backbones.vit.VisionTransformer`."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ..slime.backbones.vit import BYTES, Normalization, VisionTransformer, interpolated
from ..slime.errors import SlimeError
from .loading import checkpoint_modules, checkpoint_patcher, load_on_device

_KINDS = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "siglip2_vision_model": "siglip2",
    "dinov2": "dinov2",
    "dinov3": "dinov3",
}


class ComfyVision(VisionTransformer):
    """A model of the node Load CLIP Vision, at any size and aspect: ComfyUI itself runs some of them at one size.

    Raises:
        SlimeError: a model that is not one of ComfyUI's own.
    """

    def __init__(self, clip_vision: Any, cell: int = 0) -> None:
        patcher: Any = getattr(clip_vision, "patcher", None)
        if patcher is None or not isinstance(getattr(clip_vision, "model", None), nn.Module):
            raise SlimeError(
                "This CLIP_VISION comes from another pack, and SLiMe cannot read it. Use the node Load CLIP Vision."
            )
        self.patcher = checkpoint_patcher(patcher)
        with checkpoint_modules(self.patcher):
            self._read_model(clip_vision, cell)

    def _read_model(self, clip_vision: Any, cell: int) -> None:
        kind = _kind(clip_vision.model)
        normalization = Normalization(tuple(clip_vision.image_mean), tuple(clip_vision.image_std))
        side = 0 if kind == "dinov3" else int(clip_vision.image_size)
        if kind == "siglip2":  # its positions tell how many patches it was trained with
            embeddings = clip_vision.model.vision_model.embeddings
            side = math.isqrt(len(embeddings.position_embedding.weight)) * int(embeddings.patch_size)
        super().__init__(clip_vision.model, kind, side, normalization, clip_vision.load_device, cell)

    def run(self, pixels: Tensor) -> None:
        memory = len(pixels) * BYTES * self.width * (pixels.shape[2] // self.patch) * (pixels.shape[3] // self.patch)
        load_on_device(self.patcher, memory)
        with checkpoint_modules(self.patcher):
            self._run(pixels)

    def _run(self, pixels: Tensor) -> None:
        if self.kind in ("dinov3", "siglip2"):
            getattr(self.module, "vision_model", self.module)(pixels)
        elif self.kind == "dinov2":
            embeddings = self.module.embeddings
            tokens = embeddings.patch_embeddings(pixels)
            tokens = self._with_positions(tokens, pixels, embeddings.cls_token[0], embeddings.position_embeddings[0])
            self.module.encoder(tokens)
        else:
            vision = self.module.vision_model
            tokens = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
            first = vision.embeddings.class_embedding
            first = first if first is None else first[None]
            tokens = self._with_positions(tokens, pixels, first, vision.embeddings.position_embedding.weight)
            vision.encoder(vision.pre_layrnorm(tokens))

    def _with_positions(self, tokens: Tensor, pixels: Tensor, first: Tensor | None, positions: Tensor) -> Tensor:
        """Prepend the class token [1, D] to patches [B, N, D], and add positions [P, D] resized to their grid."""
        grid = (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch)
        if first is not None:
            tokens = torch.cat([comfy.ops.cast_to_input(first, tokens).expand(len(tokens), 1, -1), tokens], 1)
        positions = interpolated(comfy.ops.cast_to_input(positions, tokens)[None], int(first is not None), grid)
        return tokens + positions

    def free_memory(self) -> float:
        return float(comfy.model_management.get_free_memory(self.device))

    def cache_key(self) -> tuple[object, Hashable] | None:
        """Return the model and a key of its state."""
        return self.module, str(self.patcher.patches_uuid)


def _kind(model: nn.Module) -> str:
    """Return the kind by ComfyUI's class; SigLIP differs from CLIP by its lack of a class token."""
    for name, encoder in comfy.clip_vision.IMAGE_ENCODERS.items():
        if isinstance(model, encoder):
            if _KINDS.get(name) != "clip":
                return _KINDS.get(name, name)
            embeddings = model.vision_model.embeddings
            if not hasattr(embeddings, "class_embedding"):
                return "siglip2"
            return "clip" if embeddings.class_embedding is not None else "siglip"
    raise SlimeError(
        f"{type(model).__name__} is not a vision encoder that SLiMe supports. Load DINOv2, DINOv3, CLIP or SigLIP."
    )
