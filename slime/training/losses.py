"""The paper's loss terms, for soft labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

WEIGHT_EXPONENT = 0.8  # of balanced_weights


def class_weights(labels: Tensor) -> Tensor:
    """[K] weights from label maps [B, K, h, w]: background 1, part k (all part pixels / pixels of k), absent 0.

    The official code's rule (src/slime.py).
    """
    counts = labels.sum((0, 2, 3))
    parts = counts[1:]
    weights = torch.where(parts > 0, parts.sum() / parts.clamp(min=1e-6), torch.zeros_like(parts))
    return torch.cat([torch.ones_like(counts[:1]), weights])


def balanced_weights(labels: Tensor, exponent: float = WEIGHT_EXPONENT) -> Tensor:
    """[K] weights from label maps [B, K, h, w]: background 1, part k (background pixels / pixels of k), absent 0.

    Beside the official rule, :func:`class_weights`, which gives a part that is taught alone no weight against the
    background, however small it is (``benchmark one_part``).
    """
    counts = labels.sum((0, 2, 3))
    parts = counts[1:]
    ratio = (counts[0].clamp(min=1) / parts.clamp(min=1e-6)) ** exponent
    return torch.cat([torch.ones_like(counts[:1]), torch.where(parts > 0, ratio, torch.zeros_like(parts))])


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K, h, w] against soft labels [B, K, h, w], weighted mean over pixels."""
    weighted = labels * weights[:, None, None]
    return -(weighted * F.log_softmax(logits, 1)).sum() / weighted.sum().clamp(min=1e-8)


def guard_loss(conditional: Tensor, unconditional: Tensor, noise: Tensor, guidance: float = 100.0) -> Tensor:
    """ "SD loss": MSE of the guided prediction and the noise; keeps the rows from disturbing the UNet.

    The official code uses guidance 100 (src/stable_difusion.py), which this reproduces.
    """
    guided = unconditional + guidance * (conditional.float() - unconditional)
    return F.mse_loss(guided, noise)
