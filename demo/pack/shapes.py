"""Shapes of the bundled tiny model: SD1.5's block layout at a tenth of its width."""

from __future__ import annotations

from typing import Any

CONTEXT_DIM = 96
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 3],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": CONTEXT_DIM,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_checkpoint": False,
    "legacy": False,
}
# A flow transformer of SD3's shape on the same latents and text.
FLOW_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "patch_size": 2,
    "depth": 3,  # heads, each of 64 channels
    "num_blocks": 8,
    "input_size": None,
    "mlp_ratio": 2.0,
    "num_patches": 32 * 32,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
}
CLIP_CONFIG = {
    "_name_or_path": "tiny",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": CONTEXT_DIM,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4 * CONTEXT_DIM,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "projection_dim": CONTEXT_DIM,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
# Arguments of SLiMe's Family for the tiny model; its layers were chosen on validation scenes.
SLIME_FAMILY = {"name": "tiny", "context_dim": CONTEXT_DIM, "side": 256, "cross": "output.3-11", "self_": "output.9-10"}
# Arguments of SLiMe's FlowFamily for the flow transformer.
SLIME_FLOW = {
    "name": "tiny-flow",
    "base": (),
    "noise": 100,
    "read": ("joint.2", "joint.3", "joint.4", "joint.5"),
    "propagate": ("joint.4",),
    "side": 256,
    "views": 24,
}
