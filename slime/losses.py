"""The paper's loss terms, for soft labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def class_weights(labels: Tensor, exponent: float = 1.0) -> Tensor:
    """[K] weights from label maps [B, K, h, w]: background 1, part k (all part pixels / pixels of k), absent 0.

    ``exponent`` 1 is the official code's rule (src/slime.py); 0 weighs every present class alike.
    """
    counts = labels.sum((0, 2, 3))
    parts = counts[1:]
    weights = torch.where(parts > 0, (parts.sum() / parts.clamp(min=1e-6)) ** exponent, torch.zeros_like(parts))
    return torch.cat([torch.ones_like(counts[:1]), weights])


def balance_views(labels: Tensor) -> Tensor:
    """Labels [V, K, h, w] scaled so that views that hold a part weigh alike for it, by 4 at most either way."""
    counts = labels.sum((2, 3))
    held = counts > 0
    mean = counts.sum(0) / held.sum(0).clamp(min=1)
    factors = torch.where(held, mean / counts.clamp(min=1e-6), torch.ones_like(counts)).clamp(0.25, 4)
    factors[:, 0] = 1
    return labels * factors[:, :, None, None]


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, focal: float = 0.0) -> Tensor:
    """Cross-entropy of logits [B, K, h, w] against soft labels [B, K, h, w], weighted mean over pixels.

    ``focal`` is gamma of the focal loss (Lin et al. 2017): pixels that are right already count less.
    """
    weighted = labels * weights[:, None, None]
    log_probabilities = F.log_softmax(logits, 1)
    terms = weighted * log_probabilities
    if focal:
        terms = terms * (1 - log_probabilities.exp()) ** focal
    return -terms.sum() / weighted.sum().clamp(min=1e-8)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - soft Dice coefficient of the softmax of logits [B, K, h, w], mean over the classes present."""
    probabilities = F.softmax(logits, 1) * labels.sum(1, keepdim=True)  # ignored pixels have no label at all
    inter = (probabilities * labels).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + labels.sum((0, 2, 3))
    present = (labels.sum((0, 2, 3)) > 0).float()
    return 1 - (2 * inter / total.clamp(min=1e-6) * present).sum() / present.sum().clamp(min=1)


def guard_loss(conditional: Tensor, unconditional: Tensor, noise: Tensor, guidance: float = 100.0) -> Tensor:
    """ "SD loss": MSE of the guided prediction and the noise; keeps the rows from disturbing the UNet.

    The official code uses guidance 100 (src/stable_difusion.py), which this reproduces.
    """
    guided = unconditional + guidance * (conditional.float() - unconditional)
    return F.mse_loss(guided, noise)
