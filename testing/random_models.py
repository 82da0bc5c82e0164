"""Models with random weights in the shapes of SD1.5, SD2.1 and SDXL, full or narrow, made of ComfyUI's own classes.

They serve to test shapes, memory and speed: random weights segment nothing.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FULL_WIDTH = 320
COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
FOUR_LEVELS = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd1": FOUR_LEVELS
    | {"num_heads": 8, "num_head_channels": -1, "use_linear_in_transformer": False, "context_dim": 768},
    "sd2": FOUR_LEVELS
    | {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024},
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_heads": -1,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_classes": "sequential",
    },
}
POOLED = {FULL_WIDTH: 1280}  # width of SDXL's pooled text; narrow models use 32
VAE: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def unet_config(layout: str, width: int = FULL_WIDTH) -> dict[str, Any]:
    """Return ComfyUI's configuration of a UNet whose first level has ``width`` channels (320 in the real ones)."""
    config = COMMON | LAYOUTS[layout] | {"model_channels": width}
    if config["num_head_channels"] > 0:
        config["num_head_channels"] = 64 if width == FULL_WIDTH else width // 2
    if layout == "sdxl":
        config["adm_in_channels"] = POOLED.get(width, 32) + 6 * 256
    return config


FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 40,
    "hidden_size": 96,
    "mlp_ratio": 2.0,
    "num_heads": 3,
    "depth": 3,
    "depth_single_blocks": 4,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
NEXT_DIT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "axes_dims": [4, 6, 6],
    "axes_lens": [300, 64, 64],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 40,
}
MMDIT = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 4,
    "input_size": None,
    "mlp_ratio": 2.0,
    "adm_in_channels": 24,
    "num_patches": 36 * 36,
    "pos_embed_max_size": 36,
    "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 256}},
}
# Small models of the real classes of flow transformers: ComfyUI's configuration, and the name of the class.
FLOWS: dict[str, tuple[dict[str, Any], str]] = {
    "flux": ({"image_model": "flux"} | FLUX, "Flux"),
    "flux2": (
        {"image_model": "flux2"}
        | FLUX
        | {
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "vec_in_dim": None,
            "axes_dim": [8, 8, 8, 8],
            "qkv_bias": False,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
        },
        "Flux2",
    ),
    "chroma": (
        {"image_model": "chroma", "in_dim": 64, "out_dim": 96, "hidden_dim": 96, "n_layers": 2}
        | FLUX
        | {"in_channels": 64, "out_channels": 64, "guidance_embed": False},
        "Chroma",
    ),
    "sd3": (MMDIT, "SD3"),
    "sd3.5": (MMDIT | {"qk_norm": "rms", "x_block_self_attn_layers": [0, 1, 2]}, "SD3"),
    "qwen-image": (
        {
            "image_model": "qwen_image",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 5,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (8, 12, 12),
        },
        "QwenImage",
    ),
    "lumina": (NEXT_DIT, "Lumina2"),
    "z-image": (
        NEXT_DIT
        | {"dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "qk_norm": True}
        | {"z_image_modulation": True, "pad_tokens_multiple": 32, "time_scale": 1000.0},
        "Lumina2",
    ),
}


def flow_patcher(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return ComfyUI's ModelPatcher of a small random flow transformer.

    Its weights are kept in ``dtype`` and used in float32.

    Raises:
        AttributeError: this ComfyUI does not have the model.
    """
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config, name = FLOWS[kind]
    supported = getattr(comfy.supported_models, name)
    model_config = supported(dict(config))
    model_config.unet_config = _known(name, config) | {"dtype": dtype}
    if dtype != torch.float32:
        model_config.set_inference_dtype(dtype, torch.float32)
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode():
        model = getattr(comfy.model_base, name)(model_config, device="cpu")
        randomise(model.diffusion_model, seed)
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def _known(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without the fields that older versions of ComfyUI do not know."""
    import comfy.ldm.chroma.model
    import comfy.ldm.flux.model

    kinds = {
        "Flux": comfy.ldm.flux.model.FluxParams,
        "Flux2": comfy.ldm.flux.model.FluxParams,
        "Chroma": comfy.ldm.chroma.model.ChromaParams,
    }
    fields = getattr(kinds.get(name), "__dataclass_fields__", None)
    return {key: value for key, value in config.items() if fields is None or key in fields or key == "image_model"}


def flow_text(kind: str, seed: int = 1) -> dict[str, Tensor]:
    """Return random text features of that model, as :meth:`nodes.comfy_flow.ComfyFlow.condition` keeps them."""
    generator = torch.Generator().manual_seed(seed)
    found = {"text": torch.randn(13, 40, generator=generator)}
    if kind in ("flux", "sd3", "sd3.5"):
        found["pooled_output"] = torch.randn(24, generator=generator)
    return found


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw weights that keep activations of order one; ComfyUI's layers come uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(random_weight(name, tensor, generator))
        for name, buffer in model.named_buffers():
            if "pos_embed" in name:  # SD3's, which is part of its weights
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def random_weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform weights scaled by the fan-in if there is one, else 1 for weights and 0 for biases."""
    if like.ndim >= 2:
        bound = like[0].numel() ** -0.5
        return (torch.rand(like.shape, generator=generator) * 2 - 1) * 1.7 * bound
    return torch.ones(like.shape) if name.endswith(("weight", "scale")) else torch.zeros(like.shape)


def comfy_patcher(
    layout: str, prediction: str = "eps", seed: int = 0, width: int = 32, dtype: torch.dtype = torch.float32
) -> Any:
    """Return ComfyUI's ModelPatcher of a random UNet."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = unet_config(layout, width)
    classes = {
        "sd1": comfy.supported_models.SD15,
        "sd2": comfy.supported_models.SD20,
        "sdxl": comfy.supported_models.SDXL,
    }
    model_config = classes[layout](dict(config))
    # The extra settings of the class describe full-size models.
    model_config.unet_config = config | {"dtype": dtype}
    kind = comfy.model_base.ModelType.V_PREDICTION if prediction == "v" else comfy.model_base.ModelType.EPS
    base = comfy.model_base.SDXL if layout == "sdxl" else comfy.model_base.BaseModel
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode():  # as ComfyUI loads models: every weight is an inference tensor
        model = base(model_config, kind, device="cpu")
        randomise(model.diffusion_model, seed)
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def random_backbone(layout: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a full-size random UNet and VAE in the extension's adapter; the text encoder gives random embeddings."""
    from .inprocess import NAME, import_comfyui, load_extension

    import_comfyui()
    load_extension()
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    patcher = comfy_patcher(layout, "v" if layout == "sd2" else "eps", width=FULL_WIDTH, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        shapes = AutoencoderKL(embed_dim=4, ddconfig=VAE)
        vae = comfy.sd.VAE(
            sd={name: random_weight(name, tensor, generator) for name, tensor in shapes.state_dict().items()},
            dtype=dtype,
        )
    config = patcher.model.model_config.unet_config
    rows = torch.randn(1, 77, config["context_dim"], generator=generator) * 0.3
    pooled = torch.randn(1, POOLED[FULL_WIDTH], generator=generator)
    clip = SimpleNamespace(tokenize=str, encode_from_tokens=lambda tokens, return_pooled: (rows, pooled))
    adapter = importlib.import_module(f"{NAME}.nodes.comfy_unet")
    return adapter.ComfyUNet(patcher, vae, clip)


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return random half-precision weights in the shapes of a model that was created without memory."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_weight(name, one, generator).half() for name, one in module.state_dict().items()}


def random_dinov2() -> Any:
    """Return a CLIP_VISION of DINOv2-L's full size, loaded by ComfyUI's stock loader."""
    import comfy.clip_vision
    import comfy.ops
    from comfy.image_encoders import dino2

    config = json.loads(Path(dino2.__file__).with_name("dino2_large.json").read_text(encoding="utf-8"))
    shapes = dino2.Dinov2Model(config, torch.float16, torch.device("meta"), comfy.ops.disable_weight_init)
    return comfy.clip_vision.load_clipvision_from_sd(random_state(shapes))
