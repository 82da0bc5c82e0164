"""Loss terms for soft labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_EXPONENT = 0.8  # of balanced_weights


def balanced_weights(labels: Tensor) -> Tensor:
    """Return class weights [K] from label maps [B, K, h, w]: background 1, part k (background pixels / pixels of k) to
    the power of ``WEIGHT_EXPONENT``, absent parts 0.

    The official rule, :func:`slime.paper.losses.class_weights`, gives a part that is learned alone no weight against
    the background, however small it is (``benchmark one_part``).
    """
    counts = labels.sum((0, 2, 3))
    parts = counts[1:]
    ratio = (counts[0].clamp(min=1) / parts.clamp(min=1e-6)) ** WEIGHT_EXPONENT
    return torch.cat([torch.ones_like(counts[:1]), torch.where(parts > 0, ratio, torch.zeros_like(parts))])


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the cross-entropy of logits [B, K, h, w] with soft labels [B, K, h, w], weighted mean over pixels."""
    weighted = labels * weights[:, None, None]
    return -(weighted * F.log_softmax(logits, 1)).sum() / weighted.sum().clamp(min=1e-8)
