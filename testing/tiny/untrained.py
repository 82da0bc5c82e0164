"""The tiny checkpoint with its UNet as it was before training, to measure what untrained attention alone achieves."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from .weights import DIFFUSION, load_weights

NORMS = ("norm", ".ln_", ".in_layers.0.", ".out_layers.0.")
ZERO_LAYERS = ("out_layers.3.", "proj_out.", "out.2.")  # latent diffusion initialises these with zeros


def write_untrained(trained: Path, target: Path, seed: int = 0, prefix: str = DIFFUSION) -> Path:
    """Copy a checkpoint, with the weights of its diffusion model initialised anew as PyTorch does."""
    generator = torch.Generator().manual_seed(seed)
    state = load_weights(trained)
    for name, weight in state.items():
        if not name.startswith(prefix) or name.endswith("pos_embed"):
            continue
        short = name.removeprefix(prefix)
        if any(part in short for part in ZERO_LAYERS):
            fresh = torch.zeros_like(weight)
        elif weight.ndim >= 2:
            bound = 1 / math.sqrt(weight[0].numel())
            fresh = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
        else:
            norm = any(part in short for part in NORMS) or short.startswith("out.0.")
            fresh = torch.full_like(weight, 1.0 if norm and short.endswith("weight") else 0.0)
        state[name] = fresh.to(weight.dtype).contiguous()
    save_file(state, str(target))
    return target
