"""Load Stable Diffusion 1, 2 or XL from one checkpoint file, without a network. Needs diffusers.

The shapes of the weights say which model it is; diffusers translates their names. Such a file has no tokenizer, so that
only the empty text can be encoded, which is the prompt that parts are trained with unless another one is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SlimeError
from .hf_unet import DiffusersUNet

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST, LABELS = UNET + "input_blocks.0.0.weight", UNET + "label_emb."
ACROSS = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
START, END, LENGTH = 49406, 49407, 77  # of CLIP's vocabulary
# SD2 that predicts v spreads these weights out; the limit is ComfyUI's.
V_NORM = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09
BLOCKS = {False: (1, 2, 4, 4), True: (1, 2, 4)}  # widths of a UNet's levels, of SDXL (True) and others
DEPTHS = [1, 2, 10]  # transformer blocks of SDXL's levels
SCALE = {False: 0.18215, True: 0.13025}  # of latents
SCALES = (".scale_weight", ".weight_scale")  # of fp8 weights, as ComfyUI names them
UNUSED = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant", "position_ids", "logit_scale")
ELSEWHERE = "Use a diffusers folder of it, or --comfyui, which loads what ComfyUI loads."
LIGHTNING = ("pytorch_lightning", "lightning.pytorch")  # packages of a callback that is pickled beside weights
Architecture = Literal["sd1", "sd2", "sdxl"]


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
    """Load SD1.x, SD2.x, SDXL, or a model of their shapes (Turbo, Lightning, merges, fp8).

    Raises:
        SlimeError: another model, a part of one, or a file that cannot be read.
    """
    state = standard_weights(_read(path), path.name)
    architecture = _architecture(state, path.name)
    large = architecture == "sdxl"
    try:
        unet, vae, texts = _unet(state, large), _vae(state, large), _texts(state, architecture)
    except (RuntimeError, KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        first = str(error).strip().splitlines()
        raise SlimeError(
            f"{path.name} looks like {architecture.upper()}, but its weights are not that model's "
            f"({' '.join(first[:2])[:200]}). {ELSEWHERE}"
        ) from error
    paddings = {"sd1": (END,), "sd2": (0,), "sdxl": (END, 0)}[architecture]
    return DiffusersUNet(
        _moved(unet, device, dtype),
        _moved(vae, device, torch.float32 if large else dtype),  # SDXL's overflows in half precision
        [EmptyText(padding) for padding in paddings],
        [_moved(text, device, dtype) for text in texts],
        _schedule_of(state, architecture),
    )


def _moved(module: torch.nn.Module, device: str, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(module, device, dtype)  # diffusers' own warns for nothing


# ------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by its content, whatever its ending."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise SlimeError(f"{path} cannot be opened: {error.strerror}.") from error
    if start.startswith(b"version https://git-lfs"):
        raise SlimeError(f"{path.name} is a pointer of Git LFS, not the model. Download the model itself.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise SlimeError(f"{path.name} is a web page, not a model. Download the model again.")
    if start.startswith(b"GGUF"):
        raise SlimeError(f"{path.name} is a GGUF file. Use the model as .safetensors.")
    try:
        loaded = _unpickled(path) if start.startswith((b"PK", b"\x80")) else _safetensors(path)
    except Exception as error:  # torch and safetensors raise whatever the bytes lead to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SlimeError(f"{path.name} cannot be read as a checkpoint; it may be truncated: {reason}") from error
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise SlimeError(f"{path.name} holds a {type(loaded).__name__}, not the weights of a checkpoint.")
    return {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


def _unpickled(path: Path) -> Any:
    """Unpickle tensors; other objects in Stable Diffusion's own files get harmless stand-ins, as in ComfyUI."""
    from _codecs import encode

    import numpy as np
    from numpy.dtypes import Float64DType, Int64DType

    class ModelCheckpoint:
        """Stands for the callback of pytorch_lightning."""

    def scalar(*_: Any) -> float:
        return 0.0

    allowed: list[Any] = [
        *((ModelCheckpoint, f"{package}.callbacks.model_checkpoint.ModelCheckpoint") for package in LIGHTNING),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        np.dtype,
        Float64DType,
        Int64DType,
        encode,
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)


def standard_weights(state: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Return the weights under the names of Stable Diffusion's own files, with scaled fp8 weights multiplied out.

    Raises:
        SlimeError: weights in a packed form.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("model_ema.") or name.endswith((*UNUSED, *SCALES)):
            continue
        scale = next((state[key] for end in SCALES if (key := name.removesuffix(".weight") + end) in state), None)
        if name.endswith(".weight") and not value.is_floating_point() and (scale is None or value.dtype != torch.int8):
            raise SlimeError(f"{file} holds quantised weights ({_quantisation(state, name)}). {ELSEWHERE}")
        if scale is not None and (scale.numel() not in (1, len(value)) if value.ndim else scale.numel() != 1):
            raise SlimeError(
                f"{file} holds weights that are scaled in blocks ({_quantisation(state, name)}). {ELSEWHERE}"
            )
        if name.endswith(".weight") and scale is not None:
            value = value.float() * scale.float().reshape(-1, *[1] * (value.ndim - 1))
        found[_standard_name(name)] = value
    if not any(name.startswith(("conditioner.embedders.1.", LABELS)) for name in found):  # SD-Turbo
        found = {name.replace("conditioner.embedders.0.model.", OPEN_CLIP): value for name, value in found.items()}
    return found


def _standard_name(name: str) -> str:
    """Return the name that a text encoder's weight has today: merges of 2022 have no "text_model"."""
    return re.sub(
        r"^(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?!text_)", r"\1.transformer.text_model.", name
    )


def _quantisation(state: Mapping[str, Tensor], name: str) -> str:
    about = state.get(name.removesuffix(".weight") + ".comfy_quant")
    try:
        return str(json.loads(bytes(about.tolist()))["format"]) if about is not None else str(state[name].dtype)
    except (ValueError, KeyError, TypeError):
        return str(state[name].dtype)


# ------------------------------------------------------------------------------------------------------------ the model


def _architecture(state: Mapping[str, Tensor], file: str) -> Architecture:
    """Return which model the weights are of; raise SlimeError for another one, or if something is missing."""

    def has(stem: str) -> bool:
        return any(name.startswith(stem) for name in state)

    if FIRST not in state or state[FIRST].ndim != 4 or ACROSS not in state:
        raise SlimeError(
            f"{file} is not a complete checkpoint of Stable Diffusion 1, 2 or XL (it has no {UNET}input_blocks; a UNet "
            f"or LoRA alone is not enough). {ELSEWHERE}"
        )
    channels = state[FIRST].shape[1]
    if channels != 4:
        raise SlimeError(
            f"The UNet of {file} takes {channels} input channels, as inpainting and editing checkpoints do. Use the "
            "text-to-image checkpoint that it was made from: SLiMe needs 4 channels."
        )
    added, first_level = has(LABELS), has(UNET + "input_blocks.1.1.")
    missing = [what for stem, what in ((VAE + "encoder.", "a VAE"), ("cond", "a text encoder")) if not has(stem)]
    if missing:
        raise SlimeError(
            f"{file} has no {' and no '.join(what[2:] for what in missing)}. Use a whole checkpoint with UNet, VAE and "
            "text encoder; ComfyUI's Save Checkpoint node writes one."
        )
    if added and first_level:
        raise SlimeError(f"{file} is an unCLIP checkpoint, which is prompted by images. Use its base model.")
    if added and not (has(XL_CLIP) and has(XL_OPEN_CLIP)):
        raise SlimeError(f"{file} lacks one of SDXL's two text encoders. Use the base model, not the refiner.")
    if has("edm_"):
        raise SlimeError(f"{file} has another noise schedule (EDM), as Playground 2.5, which SLiMe does not support.")
    deepest = ("input_blocks.8.1.", "middle_block.1.", "output_blocks.0.1.")
    if added and any(_depth(state, block) != DEPTHS[-1] for block in deepest):
        raise SlimeError(f"{file} is a distilled SDXL with fewer layers, such as SSD-1B or Vega. {ELSEWHERE}")
    architecture: Architecture = "sdxl" if added else "sd2" if has(OPEN_CLIP) else "sd1"
    stems = {"sd1": (CLIP,), "sd2": (OPEN_CLIP,), "sdxl": (XL_CLIP, XL_OPEN_CLIP)}[architecture]
    if any(_embedding(state, stem) is None for stem in stems):
        raise SlimeError(f"The text encoder of {file} is incomplete. Use a whole checkpoint.")
    return architecture


def _depth(state: Mapping[str, Tensor], block: str) -> int:
    stem = f"{UNET}{block}transformer_blocks."
    return len({name[len(stem) :].partition(".")[0] for name in state if name.startswith(stem)})


def _embedding(state: Mapping[str, Tensor], stem: str) -> Tensor | None:
    """Return the token embeddings of a text encoder."""
    names = ("token_embedding.weight", "embeddings.token_embedding.weight")
    return next((state[stem + name] for name in names if stem + name in state), None)


def _unet(state: Mapping[str, Tensor], large: bool) -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    width = len(state[FIRST])
    channels = [width * factor for factor in BLOCKS[large]]
    linear = state[UNET + "middle_block.1.proj_in.weight"].ndim == 2
    extra: dict[str, Any] = {}
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    if large:
        down = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": state[LABELS + "0.0.weight"].shape[1],
            "transformer_layers_per_block": DEPTHS,
        }
    unet = UNet2DConditionModel(
        sample_size=128 if large else 64,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        cross_attention_dim=state[ACROSS].shape[1],
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
    vae = AutoencoderKL(
        block_out_channels=[width * factor for factor in (1, 2, 4, 4)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=SCALE[large],
    )
    known = set(vae.state_dict())
    converted = convert_ldm_vae_checkpoint(dict(state), vae.config)
    vae.load_state_dict({name: value for name, value in converted.items() if name in known})
    return vae.eval()


def _texts(state: Mapping[str, Tensor], architecture: Architecture) -> list[Any]:
    """Return CLIP-L of SD1.x, OpenCLIP-H of SD2.x, or both CLIP-L and OpenCLIP-G of SDXL."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    match architecture:
        case "sd1":
            return [_text(CLIPTextModel, state, CLIP, "quick_gelu")]
        case "sd2":
            return [_text(CLIPTextModel, state, OPEN_CLIP, "gelu", left_out=1)]  # SD2 reads the last layer but one
        case "sdxl":
            projected = _text(CLIPTextModelWithProjection, state, XL_OPEN_CLIP, "gelu")
            return [_text(CLIPTextModel, state, XL_CLIP, "quick_gelu"), projected]


def _text(kind: Any, state: Mapping[str, Tensor], prefix: str, act: str, left_out: int = 0) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig

    is_open = prefix + "ln_final.weight" in state
    tokens = _embedding(state, prefix)
    assert tokens is not None
    inner = "transformer.resblocks.0.mlp.c_fc.weight" if is_open else "encoder.layers.0.mlp.fc1.weight"
    stem = prefix + inner.split(".0.")[0] + "."
    layers = {name[len(stem) :].split(".")[0] for name in state if name.startswith(stem)}
    width = tokens.shape[1]
    text = kind(
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
    named = (
        convert_open_clip_checkpoint(text, dict(state), prefix)
        if is_open
        else convert_ldm_clip_checkpoint(dict(state), prefix.removesuffix("text_model."))
    )
    missing = [name for name in text.load_state_dict(named, strict=False).missing_keys if "position_ids" not in name]
    if missing:
        raise ValueError(f"its text encoder lacks {missing[0]}")
    return text.eval()


def _schedule_of(state: Mapping[str, Tensor], architecture: Architecture) -> Any:
    """Return the noise schedule; v-prediction is told by weights (SD2) or by a key (SDXL), as in ComfyUI."""
    spread = float(state[V_NORM].float().std()) if architecture == "sd2" and V_NORM in state else 0.0
    predicts_v = spread > V_SPREAD or (architecture == "sdxl" and "v_pred" in state)
    return schedule("v_prediction" if predicts_v else "epsilon", zero_terminal="ztsnr" in state)


def schedule(prediction: str, zero_terminal: bool = False) -> Any:
    """Return what is needed of a scheduler: Stable Diffusion's noise levels, and "epsilon" or "v_prediction".

    Args:
        prediction: what the UNet predicts.
        zero_terminal: whether the last level is noise alone, arXiv 2305.08891.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    if zero_terminal:
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

        betas = rescale_zero_terminal_snr(betas)
    return SimpleNamespace(
        config=SimpleNamespace(prediction_type=prediction), alphas_cumprod=torch.cumprod(1 - betas, 0)
    )
