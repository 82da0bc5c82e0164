"""Small random UNets in the layouts of SD1.5, SD2 and SDXL: ComfyUI's class and diffusers' with the same weights."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.random_models import LAYOUTS, comfy_patcher, unet_config
from testing.tiny.diffusers import convert_unet

__all__ = ["LAYOUTS", "comfy_patcher", "diffusers_unet"]

WIDTH = 32


def diffusers_unet(layout: str, state: dict[str, torch.Tensor]) -> Any:
    """diffusers' UNet with a ComfyUI diffusion model's weights."""
    return convert_unet(unet_config(layout, WIDTH), state)
