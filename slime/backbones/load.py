"""Models by a path: diffusers folders, vision encoders, single checkpoint files without a hub, or ComfyUI's loader."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..errors import SlimeError
from .base import Backbone

CHUNK = 1 << 24


def load_model(path: str, device: str = "", dtype: str = "float32", comfyui: str = "") -> Backbone:
    """Load a model from a file or folder as a backbone.

    Args:
        path: a diffusers folder, a folder of a vision encoder as transformers saves it, or a checkpoint file.
        device: "cuda", "mps", "cpu"; empty for the best there is.
        dtype: "float32", "float16" or "bfloat16".
        comfyui: ComfyUI's folder: checkpoint files are loaded by it, as its nodes do.

    Raises:
        SlimeError: nothing there, or nothing that is known.
    """
    place = _existing(path)
    device = device or _best_device()
    torch_dtype = getattr(torch, dtype)
    if comfyui:
        from .comfyui import load_checkpoint as through_comfyui

        return through_comfyui(place, Path(comfyui))
    if (place / "model_index.json").is_file():
        return _pipeline(place, device, torch_dtype)
    if (place / "config.json").is_file():
        return _encoder(place, device, torch_dtype)
    if place.is_dir():
        raise SlimeError(f"{path} has neither a model_index.json (diffusers) nor a config.json (transformers).")
    from .single_file import load_checkpoint

    return load_checkpoint(place, device, torch_dtype)


def fingerprint(path: str) -> str:
    """Return the SHA-256 of a file, or of a folder's files and their names; raise SlimeError if it does not exist."""
    place, digest = _existing(path), hashlib.sha256()
    for file in sorted(one for one in place.rglob("*") if one.is_file()) if place.is_dir() else [place]:
        if file != place:
            digest.update(file.relative_to(place).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _existing(path: str) -> Path:
    place = Path(path)
    if not place.exists():
        raise SlimeError(
            f"There is no model at {path}: give a checkpoint file, a diffusers folder or an encoder's folder."
        )
    return place


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _pipeline(folder: Path, device: str, dtype: torch.dtype) -> Backbone:
    from diffusers import DiffusionPipeline

    from .hf_unet import DiffusersUNet

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return DiffusersUNet.from_pipeline(pipeline.to(device))


def _encoder(folder: Path, device: str, dtype: torch.dtype) -> Backbone:
    from transformers import AutoConfig, AutoModel, CLIPVisionModel, SiglipVisionModel

    from .hf_vit import TransformersVision

    model_type = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    towers = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    loader = towers.get(model_type, AutoModel)
    return TransformersVision(loader.from_pretrained(folder, local_files_only=True).to(device, dtype))
