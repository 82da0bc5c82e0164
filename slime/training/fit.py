"""Fit part vectors to features: multinomial logistic regression, a convex problem without the backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize_maps
from .lbfgs import minimize
from .losses import balanced_weights, weighted_cross_entropy

SHRINKAGE = 1e-2  # of the whitening, relative to the mean variance
# Weight decay of the instant trainer, in whitened coordinates. With .001 the problem is far from solved when the steps
# end, and rounding errors choose among many half-solved fits (benchmarks/convergence.py).
L2 = 0.1

# number of the evaluation, loss terms, the vectors so far, logits of the first view [K, H, W]
OnEvaluation = Callable[[int, dict[str, float], Callable[[], dict[str, Tensor]], Tensor], None]


@dataclass(frozen=True)
class FitResult:
    """Part vectors [P, D] by feature group; losses of all evaluations, in order, the last one that of the vectors."""

    vectors: dict[str, Tensor]
    losses: list[float]


def whitening(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix [D, D] that gives features [B, D, h, w] about unit variance in every direction, and its inverse.

    It is a Cholesky factor of the inverse covariance; another factor would differ by a rotation, on which neither the
    optimum nor L-BFGS depends. Computed in float64 on the CPU: not every device has that type.
    """
    flat = maps.movedim(1, -1).reshape(-1, maps.shape[1])
    centred = flat - flat.mean(0)
    covariance = (centred.T @ centred / len(flat)).cpu().double()
    # The second term is above rounding errors, where a group hardly varies beside its mean.
    floor = SHRINKAGE * covariance.diagonal().mean() + 1e-9 * float(flat.square().mean()) + 1e-30
    identity = torch.eye(len(covariance), dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance + floor * identity).T
    return torch.linalg.solve_triangular(factor, identity, upper=True).to(maps), factor.to(maps)


def fit_vectors(
    features: Mapping[str, Tensor],
    labels: Tensor,
    *,
    steps: int,
    l2: float | None = None,
    init: Mapping[str, Tensor] | None = None,
    on_step: OnEvaluation | None = None,
) -> FitResult:
    """Minimise the class-weighted cross-entropy of the part logits plus L2, by L-BFGS with line search.

    Vectors are optimised in whitened coordinates, where one step size and one weight decay suit every direction.

    Args:
        features: [V, D, h, w] of V views by feature group; D may differ.
        labels: soft labels [V, K, H, W].
        steps: largest number of L-BFGS iterations.
        l2: weight of the mean squared vector; None for ``L2``.
        init: vectors [P, D] by group to continue from.
        on_step: called after every evaluation of the loss.
    """
    with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes in inference mode
        problem = _Problem(features, labels, L2 if l2 is None else l2)
        losses: list[float] = []

        def report(terms: list[float], point: Tensor) -> None:
            losses.append(terms[0])
            if on_step is not None:
                named = dict(zip(("loss", "l2"), terms, strict=True))
                on_step(len(losses), named, lambda: problem.vectors(point), problem.first_logits)

        best, terms = minimize(problem.evaluate, problem.start(init), steps, report)
        return FitResult(problem.vectors(best), [*losses, terms[0]] if losses[-1] != terms[0] else losses)


class _Problem:
    """The convex problem; a point [N] holds the vectors of all groups, whitened and divided along the features' mean.

    Whitening leaves the mean of the features, along which the loss bends up to thousands of times as much as across it.
    Points are scaled down in that one direction: the optimum is the same, and L-BFGS needs a fifth of the steps.
    """

    def __init__(self, features: Mapping[str, Tensor], labels: Tensor, l2: float) -> None:
        self._labels, self._weights = labels, balanced_weights(labels)
        self._parts = labels.shape[1] - 1
        self._l2 = l2 / (self._parts * len(features))
        self._whitenings = {group: whitening(maps) for group, maps in features.items()}
        # Features last: then both the scores and their gradient are one matrix product each, without a copy.
        white = {group: maps.movedim(1, -1) @ self._whitenings[group][0] for group, maps in features.items()}
        # Groups of one resolution are scored by one product and resized once.
        sizes = {group: maps.shape[1:3] for group, maps in white.items()}
        by_size = [[group for group in white if sizes[group] == size] for size in dict.fromkeys(sizes.values())]
        self._maps = [torch.cat([white[group] for group in groups], -1) for groups in by_size]
        self._widths = {group: white[group].shape[-1] for groups in by_size for group in groups}
        mean = torch.cat([maps.flatten(0, 2).mean(0) for maps in self._maps])
        self._scale = (1 + mean.square().sum()).rsqrt()
        self._direction = mean / mean.norm().clamp(min=1e-12)

    def start(self, init: Mapping[str, Tensor] | None) -> Tensor:
        """Return the point of vectors [P, D] by group; zeros for none."""
        if init is None:
            return torch.zeros(self._parts * sum(self._widths.values()), device=self._labels.device)
        white = [init[group].to(self._labels) @ self._whitenings[group][1].T for group in self._widths]
        return self._scaled(torch.cat(white, 1), 1 / self._scale).flatten()

    def vectors(self, point: Tensor) -> dict[str, Tensor]:
        """Return the vectors [P, D] of a point, in the coordinates of the features."""
        white = self._scaled(point.detach().view(self._parts, -1), self._scale)
        by_group = dict(zip(self._widths, white.split(list(self._widths.values()), 1), strict=True))
        return {group: by_group[group] @ matrix.T for group, (matrix, _) in self._whitenings.items()}

    def _scaled(self, vectors: Tensor, scale: Tensor) -> Tensor:
        """Multiply vectors [P, D] along the features' mean."""
        return vectors + (scale - 1) * torch.outer(vectors @ self._direction, self._direction)

    def evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and penalty [2], and the gradient of their sum; keeps the logits of the first view."""
        point = point.detach().requires_grad_(True)
        grid = (self._labels.shape[-2], self._labels.shape[-1])
        white = self._scaled(point.view(self._parts, -1), self._scale)
        by_size = white.split([maps.shape[-1] for maps in self._maps], 1)
        scores = [
            resize_maps(F.linear(maps, vectors).movedim(-1, 1), grid)
            for maps, vectors in zip(self._maps, by_size, strict=True)
        ]
        logits = F.pad(torch.stack(scores).sum(0), (0, 0, 0, 0, 1, 0))
        terms = torch.stack(
            [weighted_cross_entropy(logits, self._labels, self._weights), self._l2 * white.square().sum()]
        )
        (gradient,) = torch.autograd.grad(terms.sum(), point)
        self.first_logits = logits.detach()[0]
        return terms.detach(), gradient
