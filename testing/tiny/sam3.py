"""A tiny SAM3: the detector of ComfyUI's own classes in a narrow configuration, trained on scenes with part names.

A table of tokens, one entry per part name, stands in for the text encoder; demo/README.md says how it was trained.
Needs a ComfyUI with SAM3 (COMFYUI_DIR). Its tracker is left untrained.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..inprocess import import_comfyui
from ..server import MODEL

FILE = MODEL.parent / "tiny_sam3.safetensors"
SIDE, PATCH, MASKS = 1008, 63, 64  # pixels of an image and of a patch, cells of a mask
WIDTH, MODEL_WIDTH, TOKENS = 128, 64, 4
TEXTS = "texts."  # begins the names of the tokens


def build(seed: int = 0) -> Any:
    """Return a SAM3 model with random weights."""
    trunk = {"patch_size": PATCH, "depth": 4, "global_att_blocks": (1, 3), "pretrain_img_size": SIDE}
    return _build(seed, "SAM3", MODEL_WIDTH, **trunk)


def build_tracker(seed: int = 0) -> Any:
    """Return a SAM3.1 model with random weights and the grid and width for which ComfyUI's tracker is made."""
    return _build(seed, "SAM31", 256, depth=1, global_att_blocks=(0,))


def _build(seed: int, kind: str, width: int, **trunk: Any) -> Any:
    import_comfyui()
    import comfy.ops
    from comfy.ldm.sam3.detector import GeometryEncoder, SAM3Model, Transformer

    torch.manual_seed(seed)
    sizes = {"d_model": width, "operations": comfy.ops.manual_cast}
    model = SAM3Model(image_model=kind, embed_dim=WIDTH, num_queries=8, mlp_ratio=2.0, window_size=8, **sizes, **trunk)
    model.detector.transformer = Transformer(dim_ff=256, enc_layers=2, dec_layers=2, num_queries=8, **sizes)
    model.detector.geometry_encoder = GeometryEncoder(num_layers=1, **sizes)
    initialise(model)
    return model


def as_model(sam3: Any) -> Any:
    """Return a MODEL of a SAM3 model, as ComfyUI's Load Checkpoint gives it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SAM3({"image_model": "SAM3", "embed_dim": 64, "d_model": 16, "depth": 1})
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=torch.device("cpu"))
    base.diffusion_model = sam3
    sam3.dtype = torch.float32
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initialise weights, which ComfyUI's layers leave undefined, as PyTorch does."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if "Norm" in type(module).__name__:
                nn.init.ones_(weight) if name == "weight" else nn.init.zeros_(weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(weight, std=1.0)
            elif weight.ndim >= 2:
                nn.init.xavier_uniform_(weight) if name == "weight" else nn.init.normal_(weight, std=0.02)
            else:
                nn.init.zeros_(weight)


def load() -> tuple[Any, dict[str, Tensor]]:
    """Return the trained model, and the tokens [TOKENS, WIDTH] of every part name it knows."""
    model, state = build(), load_file(str(FILE))
    texts = {name.removeprefix(TEXTS): state.pop(name).float() for name in list(state) if name.startswith(TEXTS)}
    model.detector.load_state_dict({name: weight.float() for name, weight in state.items()})
    return model.eval(), texts
