"""What looks at images: the backbone that the connected models make."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..slime.backbones.base import Backbone
from ..slime.backbones.joined import Joined
from ..slime.errors import SlimeError
from .comfy_flow import ComfyFlow, family_of
from .comfy_unet import ComfyUNet
from .comfy_vision import ComfyVision
from .common import as_images


def connected(model: Any, vae: Any, clip: Any, clip_vision: Any) -> Backbone:
    """A diffusion model, a vision encoder, or both together.

    Raises:
        SlimeError: neither, or one of a kind that SLiMe cannot read.
    """
    if model is None and clip_vision is None:
        raise SlimeError("Nothing to look with: connect a model and its VAE, or a clip_vision, or all of them.")
    if model is None:
        return ComfyVision(clip_vision)
    kind = ComfyFlow if family_of(model.model) is not None else ComfyUNet
    backbone = kind(model, vae, clip)
    return backbone if clip_vision is None else Joined(backbone, ComfyVision(clip_vision, backbone.info.cell))


def shown(image: Tensor | None, latent: dict[str, Tensor] | None, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """IMAGE [B, H, W, 3], and the LATENT as the model takes it, [B, C, h, w]; an image that is not there is guessed
    from the latent, as ComfyUI's previews do it.

    Raises:
        SlimeError: neither, or a latent that the backbone cannot take.
    """
    if image is None and latent is None:
        raise SlimeError("Nothing to look at: connect an image or a latent.")
    if image is not None and (latent is None or not isinstance(backbone, ComfyUNet | ComfyFlow)):
        return as_images(image), None
    if latent is None or not isinstance(backbone, ComfyUNet | ComfyFlow):
        raise SlimeError("A vision encoder looks at pixels: decode the latent, and connect the image.")
    samples = latent["samples"].to("cpu", torch.float32)
    channels = backbone.info.channels
    samples = samples[:, :, 0] if samples.ndim == 5 and samples.shape[2] == 1 else samples
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise SlimeError(
            f"A latent of shape {list(samples.shape)} is not of this model, whose latents are [B, {channels}, h, w]."
        )
    taken = backbone.take(samples)
    return _guessed(taken, backbone) if image is None else as_images(image), taken


def _guessed(taken: Tensor, backbone: ComfyUNet | ComfyFlow) -> Tensor:
    """Pixels [B, H, W, 3], roughly, of latents in the model's own scale."""
    kind, cells = backbone.model.model.latent_format, taken.cpu()
    reshape = getattr(kind, "latent_rgb_factors_reshape", None)
    cells = cells if reshape is None else reshape(cells)
    grey = torch.ones(cells.shape[1], 3) / cells.shape[1]
    factors = torch.tensor(kind.latent_rgb_factors) if kind.latent_rgb_factors else grey
    bias = torch.tensor(kind.latent_rgb_factors_bias) if kind.latent_rgb_factors_bias else torch.zeros(3)
    colors = (torch.einsum("bchw,cr->brhw", cells, factors) + bias[:, None, None] + 1) / 2
    size = (taken.shape[2] * backbone.info.cell, taken.shape[3] * backbone.info.cell)
    pixels = torch.nn.functional.interpolate(colors, size, mode="bicubic")
    return pixels.clamp(0, 1).movedim(1, -1)


def looking_inputs(model: str) -> list[Any]:
    """Sockets for what looks; ``model`` is the tooltip of the first."""
    return [
        io.Model.Input("model", optional=True, tooltip=model),
        io.Vae.Input("vae", optional=True, tooltip="The VAE of the same checkpoint."),
    ]


def clip_vision_input() -> Any:
    return io.ClipVision.Input(
        "clip_vision",
        optional=True,
        tooltip="A vision encoder, best DINOv2 or DINOv3: looks together with the model, or alone where no model is "
        "connected.",
    )


def latent_input() -> Any:
    return io.Latent.Input(
        "latent",
        optional=True,
        tooltip="Images as latents, in place of image: nothing is encoded. With the image too, borders are sharper.",
    )
