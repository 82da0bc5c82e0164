"""Load ComfyUI and the extension into this process, without a server: for tests, benchmarks and tuning."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from slime.backbones import comfyui

from .server import MODEL
from .tiny.weights import checkpoint_of

ROOT = Path(__file__).resolve().parent.parent
NAME = comfyui.NAME  # name of the extension as a package


def import_comfyui(folder: str | None = None) -> str:
    """Make ComfyUI importable (COMFYUI_DIR by default), on the CPU if there is no CUDA; return its folder.

    With SLIME_FLOAT32 set, a GPU computes as a CPU does: everything in float32, without TF32.
    """
    folder = folder or os.environ.get("COMFYUI_DIR")
    if not folder:
        raise SystemExit("COMFYUI_DIR is not set; start this through dev.py.")
    comfyui.import_comfyui(Path(folder))
    if os.environ.get("SLIME_FLOAT32"):
        from comfy.cli_args import args

        args.force_fp32 = args.fp32_unet = args.fp32_vae = args.fp32_text_enc = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return folder


def load_extension() -> ModuleType:
    """Load the extension as a package, as ComfyUI imports it; its ``slime`` is this process's ``slime``."""
    return comfyui.load_extension(ROOT)


def load_backbone(checkpoint: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint file, or the test bed's, with ComfyUI's stock loader, as the nodes take it.

    For Stable Diffusion the result is a :class:`nodes.comfy_unet.ComfyUNet`. It computes in ``dtype``, or as ComfyUI
    decides.
    """
    import_comfyui()
    load_extension()
    import comfy.sd

    from demo.pack.tiny_config import register

    register()
    build_backbone = importlib.import_module(f"{NAME}.nodes.backbones").build_backbone
    with torch.inference_mode(), _computing_in(dtype) as options, checkpoint_of(checkpoint) as whole:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(whole), output_vae=True, output_clip=True, model_options=options
        )
        return build_backbone(model, vae, clip, None)


def load_encoder(path: Path, cell: int = 0) -> Any:
    """Load a vision encoder with ComfyUI's stock loader, as a :class:`nodes.comfy_vision.ComfyVision`."""
    import_comfyui()
    load_extension()
    import comfy.clip_vision

    with torch.inference_mode():
        loaded = comfy.clip_vision.load(str(path))
        return importlib.import_module(f"{NAME}.nodes.comfy_vision").ComfyVision(loaded, cell)


def load_flow(path: Path, checkpoint: Path = MODEL) -> Any:
    """Load a flow transformer with ComfyUI's stock loader, and the VAE and CLIP of a checkpoint.

    The result is a :class:`nodes.comfy_flow.ComfyFlow`.
    """
    beside = load_backbone(checkpoint)
    import comfy.sd

    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path))
    return importlib.import_module(f"{NAME}.nodes.comfy_flow").ComfyFlow(model, beside.vae, beside.clip)


@contextmanager
def _computing_in(dtype: torch.dtype | None) -> Iterator[dict[str, torch.dtype]]:
    """Provide options of the stock loader for this precision.

    On CPUs ComfyUI would only store the weights in it, and compute in float32.
    """
    if dtype is None:
        yield {}
        return
    import comfy.model_management as management

    decide = management.unet_manual_cast
    management.unet_manual_cast = lambda *args, **kwargs: None
    try:
        yield {"dtype": dtype}
    finally:
        management.unet_manual_cast = decide
