"""Model-config classes of the bundled tiny models for ComfyUI's stock checkpoint loader."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.supported_models
from comfy import sd1_clip
from comfy.model_base import ModelType
from comfy.supported_models_base import ClipTarget

from .shapes import CLIP_CONFIG, CONTEXT_DIM, FLOW_CONFIG, SLIME_FAMILY, SLIME_FLOW, UNET_CONFIG


class TinyTokenizer(sd1_clip.SD1Tokenizer):
    """CLIP's tokenizer for a text encoder of the tiny width."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        data = {"clip_l_tokenizer_class": _TinySDTokenizer} | (tokenizer_data or {})
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=data)


class _TinySDTokenizer(sd1_clip.SDTokenizer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "embedding_size": CONTEXT_DIM})


class _TinyClip(sd1_clip.SDClipModel):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "textmodel_json_config": CLIP_CONFIG})


class TinyTextEncoder(sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=_TinyClip)


class TinySD(comfy.supported_models.SD15):
    """SD1.5's layout at a tenth of its width, v-prediction."""

    unet_config = {
        "context_dim": CONTEXT_DIM,
        "model_channels": UNET_CONFIG["model_channels"],
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    slime_family = SLIME_FAMILY
    unet_extra_config = {"num_heads": -1, "num_head_channels": UNET_CONFIG["num_head_channels"]}

    def model_type(self, state_dict: Any, prefix: str = "") -> ModelType:
        return ModelType.V_PREDICTION

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        return ClipTarget(TinyTokenizer, TinyTextEncoder)


class TinyFlow(comfy.supported_models.SD3):
    """SD3's layout on the tiny model's latents and text; the stock loader detects only the width of the blocks."""

    unet_config = {"in_channels": FLOW_CONFIG["in_channels"], "pos_embed_scaling_factor": None}
    unet_extra_config = {name: FLOW_CONFIG[name] for name in ("num_blocks", "mlp_ratio")}
    sampling_settings = {"shift": 1.0}
    latent_format = comfy.latent_formats.SD15
    slime_flow = SLIME_FLOW
    text_encoder_key_prefix = comfy.supported_models.SD15.text_encoder_key_prefix
    process_clip_state_dict = comfy.supported_models.SD15.process_clip_state_dict

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        return ClipTarget(TinyTokenizer, TinyTextEncoder)


def register() -> None:
    """Let the stock loaders recognise the tiny models."""
    for kind in (TinySD, TinyFlow):
        if kind not in comfy.supported_models.models:
            comfy.supported_models.models.append(kind)
