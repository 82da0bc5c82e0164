"""Vision encoders loaded by Hugging Face transformers; needs the extra ``diffusers``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import SlimeError
from .vit import HALF, IMAGENET, OPENAI, Normalization, VisionTransformer

_KINDS: dict[str, tuple[str, Normalization]] = {
    "dinov2": ("dinov2", IMAGENET),
    "dinov2_with_registers": ("dinov2-registers", IMAGENET),
    "dinov3_vit": ("dinov3", IMAGENET),
    "clip_vision_model": ("clip", OPENAI),
    "siglip_vision_model": ("siglip", HALF),
}


class TransformersVision(VisionTransformer):
    """Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, CLIPVisionModel or SiglipVisionModel.

    Args:
        model: the model, on its device and in its precision.
        cell: see :class:`.vit.VisionTransformer`.

    Raises:
        SlimeError: another kind of model.
    """

    def __init__(self, model: Any, cell: int = 0) -> None:
        known = _KINDS.get(model.config.model_type)
        if known is None:
            raise SlimeError(f'"{model.config.model_type}" is not supported; SLiMe supports {", ".join(_KINDS)}.')
        kind, normalization = known
        self._options = {"interpolate_pos_encoding": True} if kind in ("clip", "siglip") else {}
        super().__init__(model.eval(), kind, model.config.image_size, normalization, model.device, cell)

    def run(self, pixels: Tensor) -> None:
        self.module(pixels.to(next(self.module.parameters()).dtype), **self._options)
