"""Small random models: UNets in the layouts of SD1.5, SD2 and SDXL, and vision encoders.

They are made in ComfyUI's classes, and in those of diffusers and transformers with the same weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime.backbones.hf_vit import TransformersVision
from testing.inprocess import import_comfyui, load_extension
from testing.tiny.diffusers import convert_unet

from .random_models import LAYOUTS, comfy_patcher, unet_config

__all__ = ["LAYOUTS", "comfy_patcher", "diffusers_unet"]

WIDTH = 32


def diffusers_unet(layout: str, state: dict[str, torch.Tensor]) -> Any:
    """Return diffusers' UNet with the weights of a ComfyUI diffusion model."""
    return convert_unet(unet_config(layout, WIDTH), state)


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PATCH = 14


def transformers_model(kind: str) -> Any:
    """Return a small random vision encoder of transformers."""
    transformers = pytest.importorskip("transformers")
    classes = {
        "dinov2": ("Dinov2Config", "Dinov2Model", {"image_size": 98, "patch_size": PATCH, "mlp_ratio": 4}),
        "dinov2-registers": (
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersModel",
            {"image_size": 98, "patch_size": PATCH, "mlp_ratio": 4},
        ),
        "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"intermediate_size": 256, "num_register_tokens": 4}),
        "clip": ("CLIPVisionConfig", "CLIPVisionModel", {"image_size": 98, "patch_size": PATCH}),
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {"image_size": 96, "patch_size": 16}),
    }
    config, model, more = classes[kind]
    if kind in ("clip", "siglip"):
        more["intermediate_size"] = 256
    torch.manual_seed(1)
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **more))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "layer_scale" in name:  # otherwise a block contributes next to nothing
                parameter.fill_(1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.08)
    return made.eval()


def comfy_vision(kind: str) -> Any:
    """Return a CLIP_VISION as Load CLIP Vision gives it, and transformers' model with the same weights."""
    import_comfyui()
    load_extension()
    import comfy.clip_vision
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    source = transformers_model(kind)
    config = source.config.to_dict() | {"layer_norm_eps": source.config.layer_norm_eps}
    config["model_type"] = {"dinov3": "dinov3", "dinov2": "dinov2"}.get(kind, f"{kind}_vision_model")
    model_class = comfy.clip_vision.IMAGE_ENCODERS.get(config["model_type"])
    if model_class is None:
        pytest.skip(f"this ComfyUI has no {kind}")
    if kind == "dinov2":
        config["image_size"] = 518  # the only size that older versions of ComfyUI know
    model = model_class(config, torch.float32, torch.device("cpu"), comfy.ops.manual_cast)
    state = source.state_dict()
    if kind == "dinov2":
        state["embeddings.position_embeddings"] = 0.3 * torch.randn(1, 37**2 + 1, SIZES["hidden_size"])
        source = resized_dinov2(source, state)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [key for key in missing if "projection" not in key or "patch" in key], missing
    adapter = TransformersVision(source)
    loaded = SimpleNamespace(
        model=model.eval(),
        patcher=comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")),
        load_device=torch.device("cpu"),
        image_mean=adapter._mean.flatten().tolist(),
        image_std=adapter._std.flatten().tolist(),
        image_size=config.get("image_size", 224),
    )
    return loaded, source


def resized_dinov2(source: Any, state: dict[str, torch.Tensor]) -> Any:
    """Return the same model with positions for 518 pixels."""
    import transformers

    made = transformers.Dinov2Model(transformers.Dinov2Config(**{**source.config.to_dict(), "image_size": 518}))
    made.load_state_dict(state)
    return made.eval()


def small_encoder(cell: int = 0) -> TransformersVision:
    """Return a random DINOv2 at 12 x 12 tokens."""
    backbone = TransformersVision(transformers_model("dinov2"), cell)
    backbone.tokens_per_side = 12
    if not cell:
        object.__setattr__(backbone.info, "side", 12 * PATCH)
    return backbone
