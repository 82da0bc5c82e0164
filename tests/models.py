"""Small random UNets in the layouts of SD1.5, SD2 and SDXL: ComfyUI's class and diffusers' with the same weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

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
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = LAYOUTS[layout]
    channels = [CHANNELS * mult for mult in config["channel_mult"]]
    levels = len(channels)
    if layout == "sdxl":
        down = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config["adm_in_channels"],
            "transformer_layers_per_block": [1, 2, 10],
        }
    else:
        down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
        extra = {}
    if config["num_heads"] == -1:
        heads: Any = [c // config["num_head_channels"] for c in channels]
    else:
        heads = config["num_heads"]
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        cross_attention_dim=config["context_dim"],
        attention_head_dim=heads,
        use_linear_projection=config["use_linear_in_transformer"],
        **extra,
    )
    prefixed = {f"model.diffusion_model.{key}": value.clone() for key, value in state.items()}
    names = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": extra.get("addition_embed_type")}
    converted = convert_ldm_unet_checkpoint(prefixed, names)
    unet.load_state_dict(converted)
    return unet.eval()


def scheduler(prediction: str = "eps") -> Any:
    """Stable Diffusion's schedule as diffusers has it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kind = "v_prediction" if prediction == "v" else "epsilon"
    return SimpleNamespace(config=SimpleNamespace(prediction_type=kind), alphas_cumprod=torch.cumprod(1 - betas, 0))
