"""Stable Diffusion from one checkpoint file, without a hub: shapes say which model it is. Needs diffusers.

The names of the weights are translated by diffusers. There is no tokenizer in such a file, so that only the empty text
can be encoded, which is the prompt that parts are learned with unless another one is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import SlimeError
from .hf_unet import DiffusersUNet

UNET, VAE = "model.diffusion_model.", "first_stage_model."
START, END, LENGTH = 49406, 49407, 77  # of CLIP's vocabulary
V_NORM = (
    UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
)  # spread out in SD2 that predicts v, as ComfyUI has it
V_SPREAD = 0.09
BLOCKS = {False: (1, 2, 4, 4), True: (1, 2, 4)}  # widths of a UNet's levels, of SDXL (True) and others
SCALE = {False: 0.18215, True: 0.13025}  # of latents


class EmptyText:
    """A tokenizer that knows the empty text alone."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, prompt: str, **_: Any) -> Any:
        if prompt:
            raise SlimeError(
                "A checkpoint file has no tokenizer: only the empty prompt can be used. Give a diffusers folder, or "
                "ComfyUI's folder by --comfyui."
            )
        ids = torch.tensor([[START, END] + [self.padding] * (LENGTH - 2)])
        return SimpleNamespace(input_ids=ids)


def load_checkpoint(path: Path, device: str, dtype: torch.dtype) -> DiffusersUNet:
    """SD1.x, SD2.x or SDXL.

    Raises:
        SlimeError: another model, or a file that cannot be read.
    """
    state = _read(path)
    first = state.get(UNET + "input_blocks.0.0.weight")
    if first is None or VAE + "encoder.conv_in.weight" not in state:
        raise SlimeError(
            f"{path.name} is no whole checkpoint of Stable Diffusion 1, 2 or XL. ComfyUI loads others: give its folder "
            "by --comfyui."
        )
    large = UNET + "label_emb.0.0.weight" in state
    unet, vae = _unet(state, large), _vae(state, large)
    texts = _texts(state, large)
    second = not large and "cond_stage_model.model.ln_final.weight" in state
    spread = float(state[V_NORM].float().std()) if second and V_NORM in state else 0.0
    paddings = (END, 0) if large else ((0,) if second else (END,))
    return DiffusersUNet(
        unet.to(device, dtype),
        vae.to(device, torch.float32 if large else dtype),  # SDXL's overflows in half precision
        [EmptyText(padding) for padding in paddings],
        [text.to(device, dtype) for text in texts],
        schedule("v_prediction" if spread > V_SPREAD else "epsilon"),
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
        return found.get("state_dict", found)  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001  torch and safetensors raise whatever the bytes lead to
        raise SlimeError(f"{path.name} is no checkpoint that can be read: {error}") from error


def _unet(state: Mapping[str, Tensor], large: bool) -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    width = len(state[UNET + "input_blocks.0.0.weight"])
    channels = [width * factor for factor in BLOCKS[large]]
    across = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    linear = state[UNET + "middle_block.1.proj_in.weight"].ndim == 2
    extra: dict[str, Any] = {}
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    if large:
        down = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": state[UNET + "label_emb.0.0.weight"].shape[1],
            "transformer_layers_per_block": [1, 2, 10],
        }
    unet = UNet2DConditionModel(
        sample_size=128 if large else 64,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        cross_attention_dim=state[across].shape[1],
        attention_head_dim=[count // 64 for count in channels] if linear else 8,
        use_linear_projection=linear,
        **extra,
    )
    names = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": extra.get("addition_embed_type")}
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(state), names))
    return unet.eval()


def _vae(state: Mapping[str, Tensor], large: bool) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    width = len(state[VAE + "encoder.conv_in.weight"])
    channels = [width * factor for factor in (1, 2, 4, 4)]
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=SCALE[large],
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(state), vae.config))
    return vae.eval()


def _texts(state: Mapping[str, Tensor], large: bool) -> list[Any]:
    """CLIP-L of SD1.x, OpenCLIP-H of SD2.x, both CLIP-L and OpenCLIP-G of SDXL."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if large:
        prefix = "conditioner.embedders.0.transformer."
        small = _text(CLIPTextModel, state, prefix + "text_model.", "quick_gelu")
        small.load_state_dict(convert_ldm_clip_checkpoint(dict(state), prefix), strict=False)
        open_prefix = "conditioner.embedders.1.model."
        big = _text(CLIPTextModelWithProjection, state, open_prefix, "gelu")
        big.load_state_dict(convert_open_clip_checkpoint(big, dict(state), open_prefix), strict=False)
        return [small.eval(), big.eval()]
    if "cond_stage_model.model.ln_final.weight" in state:
        open_prefix = "cond_stage_model.model."
        text = _text(CLIPTextModel, state, open_prefix, "gelu", left_out=1)  # SD2 reads the last layer but one
        text.load_state_dict(convert_open_clip_checkpoint(text, dict(state), open_prefix), strict=False)
        return [text.eval()]
    text = _text(CLIPTextModel, state, "cond_stage_model.transformer.text_model.", "quick_gelu")
    text.load_state_dict(convert_ldm_clip_checkpoint(dict(state)), strict=False)
    return [text.eval()]


def _text(kind: Any, state: Mapping[str, Tensor], prefix: str, act: str, left_out: int = 0) -> Any:
    from transformers import CLIPTextConfig

    is_open = prefix + "ln_final.weight" in state
    tokens = state[prefix + ("token_embedding.weight" if is_open else "embeddings.token_embedding.weight")]
    inner = "transformer.resblocks.0.mlp.c_fc.weight" if is_open else "encoder.layers.0.mlp.fc1.weight"
    stem = prefix + inner.split(".0.")[0] + "."
    layers = {name[len(stem) :].split(".")[0] for name in state if name.startswith(stem)}
    width = tokens.shape[1]
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=len(state[prefix + inner]),
            num_hidden_layers=len(layers) - left_out,
            num_attention_heads=width // 64,
            projection_dim=width,
            hidden_act=act,
            eos_token_id=END,
        )
    )


def schedule(prediction: str) -> Any:
    """What is needed of a scheduler: Stable Diffusion's noise levels, and "epsilon" or "v_prediction"."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return SimpleNamespace(
        config=SimpleNamespace(prediction_type=prediction), alphas_cumprod=torch.cumprod(1 - betas, 0)
    )
