"""Loss terms of the official code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_weights(labels: Tensor) -> Tensor:
    """Return class weights [K] from label maps [B, K, h, w]: background 1, part k (all part pixels / pixels of k),
    absent parts 0.

    The official code's rule (src/slime.py).
    """
    counts = labels.sum((0, 2, 3))
    parts = counts[1:]
    weights = torch.where(parts > 0, parts.sum() / parts.clamp(min=1e-6), torch.zeros_like(parts))
    return torch.cat([torch.ones_like(counts[:1]), weights])


def sd_loss(conditional: Tensor, unconditional: Tensor, noise: Tensor, guidance: float = 100.0) -> Tensor:
    """Return the "SD loss", MSE of the guided prediction and the noise: keeps the tokens from disturbing the UNet.

    The official code uses guidance 100 (src/stable_difusion.py), which this reproduces.
    """
    guided = unconditional + guidance * (conditional.float() - unconditional)
    return F.mse_loss(guided, noise)
