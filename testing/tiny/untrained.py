"""The tiny checkpoint with its UNet as it was before training: shows what the attention alone, unlearned, is worth."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from .weights import load_weights

PREFIX = "model.diffusion_model."
ZERO_LAYERS = ("out_layers.3.", "proj_out.", "out.2.")  # latent diffusion starts these at zero


def write_untrained(trained: Path, target: Path, seed: int = 0) -> Path:
    """Copy a checkpoint with the UNet's weights drawn anew as PyTorch initialises them."""
    generator = torch.Generator().manual_seed(seed)
    state = load_weights(trained)
    for name, weight in state.items():
        if not name.startswith(PREFIX):
            continue
        short = name.removeprefix(PREFIX)
        if any(part in short for part in ZERO_LAYERS):
            fresh = torch.zeros_like(weight)
        elif weight.ndim >= 2:
            bound = 1 / math.sqrt(weight[0].numel())
            fresh = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
        else:
            norm = (
                "norm" in short or ".in_layers.0." in short or ".out_layers.0." in short or short.startswith("out.0.")
            )
            fresh = torch.full_like(weight, 1.0 if norm and short.endswith("weight") else 0.0)
        state[name] = fresh.to(weight.dtype).contiguous()
    save_file(state, str(target))
    return target
