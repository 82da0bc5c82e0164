"""ComfyUI's UNets and the whole tiny model in diffusers, for parity tests and for use without ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from demo.pack.shapes import CLIP_CONFIG, SLIME_FAMILY, UNET_CONFIG
from slime.backbones.hf_unet import DiffusersUNet
from slime.backbones.sd_unet import Family
from slime.backbones.single_file import END, EmptyText, schedule


def convert_unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """Return a UNet2DConditionModel with the weights of a ComfyUI diffusion model.

    Args:
        config: arguments of ComfyUI's UNetModel; attention in all levels but the last (SD1.x, SD2.x), or with pooled
            text conditioning in all but the first (SDXL).
        state: its state dict.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    channels = [config["model_channels"] * mult for mult in config["channel_mult"]]
    extra: dict[str, Any] = {}
    if config["adm_in_channels"]:
        down = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(channels) - 1)
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config["adm_in_channels"],
            "transformer_layers_per_block": [max(1, depth) for depth in config["transformer_depth"][::2]],
        }
    else:
        down = ["CrossAttnDownBlock2D"] * (len(channels) - 1) + ["DownBlock2D"]
    per_head = config["num_head_channels"]
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=config["num_res_blocks"][0],
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        cross_attention_dim=config["context_dim"],
        attention_head_dim=config["num_heads"] if per_head == -1 else [c // per_head for c in channels],
        use_linear_projection=config["use_linear_in_transformer"],
        **extra,
    )
    prefixed = {f"model.diffusion_model.{key}": value.clone() for key, value in state.items()}
    names = {"layers_per_block": config["num_res_blocks"][0], "class_embed_type": None}
    names["addition_embed_type"] = extra.get("addition_embed_type")
    unet.load_state_dict(convert_ldm_unet_checkpoint(prefixed, names))
    return unet.eval()


def load_tiny(checkpoint: Path, tokenizer_folder: Path | None = None) -> DiffusersUNet:
    """Load the tiny checkpoint into the classes of diffusers and transformers.

    Args:
        checkpoint: slime_tiny.safetensors.
        tokenizer_folder: CLIP's tokenizer, for example ComfyUI's comfy/sd1_tokenizer; without one only the empty text
            can be encoded.
    """
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    state = {name: weight.float() for name, weight in load_file(str(checkpoint)).items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}

    unet = convert_unet(UNET_CONFIG, part("model.diffusion_model."))
    vae = AutoencoderTiny()
    encoder = {f"encoder.layers.{name}": w for name, w in part("first_stage_model.taesd_encoder.").items()}
    decoder = {}
    for name, weight in part("first_stage_model.taesd_decoder.").items():
        index, _, rest = name.partition(".")  # diffusers has TAESD's first layer, the clamp, in its forward
        decoder[f"decoder.layers.{int(index) - 1}.{rest}"] = weight
    vae.load_state_dict(encoder | decoder)
    known = {key: CLIP_CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    text = CLIPTextModel(
        CLIPTextConfig(**known, num_hidden_layers=CLIP_CONFIG["num_hidden_layers"], eos_token_id=49407)
    )
    text.load_state_dict(part("cond_stage_model.transformer."), strict=False)
    tokenizer = EmptyText(END) if tokenizer_folder is None else CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    kind = schedule("v_prediction")
    return DiffusersUNet(unet, vae.eval(), [tokenizer], [text.eval()], kind, Family(**dict[str, Any](SLIME_FAMILY)))
