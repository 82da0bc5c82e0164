"""The instant trainer: rows from cached features, a convex problem without the UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..images import resize_maps
from .losses import WEIGHT_EXPONENT, balanced_weights, weighted_cross_entropy

SHRINKAGE = 1e-2  # of the whitening, relative to the mean variance


OnEvaluation = Callable[[int, dict[str, float], Callable[[], Tensor], Tensor], None]


@dataclass(frozen=True)
class FitResult:
    """rows [G, P, D]; losses of the evaluations, in order."""

    rows: Tensor
    losses: list[float]


def whitening(maps: Tensor) -> Tensor:
    """[D, D] symmetric matrix that gives features [B, D, h, w] about unit variance in every direction.

    The small matrices are worked on in float64 on the CPU: not every device knows it.
    """
    flat = maps.movedim(1, -1).reshape(-1, maps.shape[1])
    centred = flat - flat.mean(0)
    covariance = centred.T @ centred / len(flat)
    values, vectors = torch.linalg.eigh(covariance.cpu().double())
    floor = SHRINKAGE * values.clamp(min=0).mean() + 1e-12
    return (vectors * (values.clamp(min=0) + floor).rsqrt() @ vectors.T).to(maps)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix.cpu().double()).to(matrix)


def fit_rows(
    features: Sequence[Tensor],
    labels: Tensor,
    *,
    steps: int,
    l2: float,
    weight_exponent: float = WEIGHT_EXPONENT,
    start: Tensor | None = None,
    on_step: OnEvaluation | None = None,
) -> FitResult:
    """Minimise the class-weighted cross-entropy of the part scores plus L2, by L-BFGS with line search.

    The scores are linear in the rows (see :class:`slime.backbones.base.Observation`), so this is multinomial logistic
    regression. Rows are optimised in whitened coordinates, where one step size and one L2 weight suit every direction.

    Args:
        features: one [V, D, h, w] for every group, of V views.
        labels: soft labels [V, K, H, W].
        steps: largest number of L-BFGS iterations.
        l2: weight of the mean squared row.
        weight_exponent: see :func:`slime.training.losses.balanced_weights`.
        start: rows [1 or G, P, D] to continue from.
        on_step: called after every loss evaluation with its number, the loss terms, a function that gives the rows so
            far, and the logits of the first view [K, H, W].

    Returns:
        Rows [G, P, D].
    """
    with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes in inference mode
        return _fit_rows(features, labels, steps, l2, weight_exponent, start, on_step)


def _fit_rows(
    features: Sequence[Tensor],
    labels: Tensor,
    steps: int,
    l2: float,
    weight_exponent: float,
    start: Tensor | None,
    on_step: OnEvaluation | None,
) -> FitResult:
    groups, parts, device = len(features), labels.shape[1] - 1, labels.device
    grid = (labels.shape[-2], labels.shape[-1])
    transforms = [whitening(maps) for maps in features]
    # Features last: then both the scores and their gradient are one matrix product each, without a copy.
    white = [maps.movedim(1, -1) @ t for maps, t in zip(features, transforms, strict=True)]
    # Groups of one resolution are read by one product, and resized once.
    sizes = [maps.shape[1:3] for maps in white]
    same_size = [[i for i in range(groups) if sizes[i] == size] for size in dict.fromkeys(sizes)]
    joined = [(same, torch.cat([white[i] for i in same], -1)) for same in same_size]
    del white
    weights = balanced_weights(labels, weight_exponent)
    whitened = torch.zeros(groups, parts, transforms[0].shape[0], device=device)
    if start is not None:
        given = start.to(device).expand(groups, -1, -1)
        whitened = torch.stack([rows @ _inverse(t) for rows, t in zip(given, transforms, strict=True)])
    whitened.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [whitened],
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-8,
    )
    losses: list[float] = []

    def rows() -> Tensor:
        return torch.stack([z @ t for z, t in zip(whitened.detach(), transforms, strict=True)])

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        parts_of_score = [
            resize_maps(F.linear(maps, torch.cat([whitened[i] for i in same], 1)).movedim(-1, 1), grid)
            for same, maps in joined
        ]
        logits = F.pad(torch.stack(parts_of_score).sum(0), (0, 0, 0, 0, 1, 0))
        ce = weighted_cross_entropy(logits, labels, weights)
        penalty = l2 * whitened.square().sum(-1).mean()
        (ce + penalty).backward()
        losses.append(float(ce.detach()))
        if on_step is not None:
            on_step(len(losses), {"loss": losses[-1], "l2": float(penalty.detach())}, rows, logits.detach()[0])
        return ce.detach() + penalty.detach()

    optimizer.step(evaluate)
    return FitResult(rows(), losses)
