"""Build the backbone of the connected models, and resolve the images and latents that it runs on."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..slime.backbones.base import Backbone
from ..slime.backbones.fused import FusedBackbone
from ..slime.errors import SlimeError
from .comfy_flow import ComfyFlow
from .comfy_sam3 import ComfySam3, is_sam3
from .comfy_unet import ComfyUNet
from .comfy_vision import ComfyVision
from .common import as_images

# Adapters of MODEL, tried in turn: the first that accepts the model takes it, the last one says what is supported. A
# new kind of model is one file with such a class, and its name here.
ADAPTERS: list[Any] = [ComfySam3, ComfyFlow, ComfyUNet]


def build_backbone(model: Any, vae: Any, clip: Any, clip_vision: Any) -> Backbone:
    """Return the backbone of a diffusion model, a vision encoder, or both.

    Raises:
        SlimeError: neither, or one of an unsupported kind.
    """
    if model is None and clip_vision is None:
        raise SlimeError("No model is connected: connect a model and its VAE, or a clip_vision, or all of them.")
    if model is None:
        return _encoder(clip_vision)
    adapter = next((one for one in ADAPTERS if one.accepts(model)), ADAPTERS[-1])
    backbone: Backbone = adapter(model, vae, clip)
    if clip_vision is None:
        return backbone
    return FusedBackbone(backbone, _encoder(clip_vision, backbone.info.cell))


def _encoder(clip_vision: Any, cell: int = 0) -> Backbone:
    """Return the backbone of what is connected to the socket of a vision encoder: CLIP_VISION, or a SAM3 MODEL."""
    return ComfySam3(clip_vision, cell=cell) if is_sam3(clip_vision) else ComfyVision(clip_vision, cell)


def takes_latents(backbone: Backbone) -> bool:
    """Return whether the backbone is a diffusion model alone, whose encoded images are ComfyUI's latents."""
    return hasattr(backbone, "process_latents")


def resolve_inputs(
    image: Tensor | None, latent: dict[str, Tensor] | None, backbone: Backbone
) -> tuple[Tensor, Tensor | None]:
    """Return IMAGE [B, H, W, 3], and the LATENT in the model's scale [B, C, h, w].

    A missing image is estimated from the latent, as ComfyUI's previews do.

    Raises:
        SlimeError: neither, or a latent that the backbone cannot take.
    """
    if image is None and latent is None:
        raise SlimeError("Connect an image or a latent.")
    if image is not None and (latent is None or not takes_latents(backbone)):
        return as_images(image), None
    if latent is None or not takes_latents(backbone):
        raise SlimeError("A vision encoder needs pixels: decode the latent with VAE Decode, and connect the image.")
    samples = latent["samples"].to("cpu", torch.float32)
    channels = backbone.info.channels
    samples = samples[:, :, 0] if samples.ndim == 5 and samples.shape[2] == 1 else samples
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise SlimeError(
            f"A latent of shape {list(samples.shape)} does not belong to this model, whose latents have {channels} "
            "channels. Encode the image with the model's own VAE."
        )
    latents: Tensor = backbone.process_latents(samples)  # type: ignore[attr-defined]
    return _estimated_image(latents, backbone) if image is None else as_images(image), latents


def _estimated_image(latents: Tensor, backbone: Any) -> Tensor:
    """Return rough pixels [B, H, W, 3] of latents in the model's own scale."""
    latent_format, samples = backbone.model.model.latent_format, latents.cpu()
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    samples = samples if reshape is None else reshape(samples)
    grey = torch.ones(samples.shape[1], 3) / samples.shape[1]
    factors = torch.tensor(latent_format.latent_rgb_factors) if latent_format.latent_rgb_factors else grey
    bias = (
        torch.tensor(latent_format.latent_rgb_factors_bias) if latent_format.latent_rgb_factors_bias else torch.zeros(3)
    )
    colors = (torch.einsum("bchw,cr->brhw", samples, factors) + bias[:, None, None] + 1) / 2
    size = (latents.shape[2] * backbone.info.cell, latents.shape[3] * backbone.info.cell)
    pixels = torch.nn.functional.interpolate(colors, size, mode="bicubic")
    return pixels.clamp(0, 1).movedim(1, -1)


def model_inputs(tooltip: str) -> list[Any]:
    """Return the sockets of a model and its VAE; ``tooltip`` is the model's."""
    return [
        io.Model.Input("model", optional=True, tooltip=tooltip),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="The VAE of the same checkpoint. Needed to encode images; SAM3 and vision encoders need none.",
        ),
    ]


BESIDE_OR_ALONE = (
    "A vision encoder (preferably DINOv2 or DINOv3) or a SAM3 MODEL. It is used together with the model, or alone if "
    "no model is connected. Connect the same one for training and for segmenting."
)


def clip_vision_input(tooltip: str = BESIDE_OR_ALONE) -> Any:
    return io.MultiType.Input("clip_vision", types=[io.ClipVision, io.Model], optional=True, tooltip=tooltip)
