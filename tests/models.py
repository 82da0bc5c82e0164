"""Small random UNets in the layouts of SD1.5, SD2 and SDXL: ComfyUI's class and diffusers' with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from demo.tiny_diffusers import convert_unet

CHANNELS = 32
COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": CHANNELS,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd1": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "num_heads": 8,
        "num_head_channels": -1,
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "adm_in_channels": None,
    },
    "sd2": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "num_heads": -1,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "context_dim": 1024,
        "adm_in_channels": None,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_heads": -1,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "adm_in_channels": 32 + 6 * 256,
        "num_classes": "sequential",
    },
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights that keep activations of order one; ComfyUI's layers come uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                bound = parameter[0].numel() ** -0.5
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * 1.7 * bound)
            else:
                parameter.copy_(torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter))


def comfy_patcher(layout: str, prediction: str = "eps", seed: int = 0) -> Any:
    """ComfyUI's ModelPatcher of a random UNet."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = COMMON | LAYOUTS[layout]
    classes = {
        "sd1": comfy.supported_models.SD15,
        "sd2": comfy.supported_models.SD20,
        "sdxl": comfy.supported_models.SDXL,
    }
    model_config = classes[layout](dict(config))
    # The class's own extras describe full-size models.
    model_config.unet_config = dict(config)
    kind = comfy.model_base.ModelType.V_PREDICTION if prediction == "v" else comfy.model_base.ModelType.EPS
    base = comfy.model_base.SDXL if layout == "sdxl" else comfy.model_base.BaseModel
    with torch.inference_mode():  # as ComfyUI loads models: every weight is an inference tensor
        model = base(model_config, kind, device="cpu")
        randomise(model.diffusion_model, seed)
        return comfy.model_patcher.ModelPatcher(
            model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
        )


def diffusers_unet(layout: str, state: dict[str, torch.Tensor]) -> Any:
    """diffusers' UNet with a ComfyUI diffusion model's weights."""
    return convert_unet(COMMON | LAYOUTS[layout], state)
