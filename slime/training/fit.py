"""Fit part vectors to features: multinomial logistic regression, a convex problem without the backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..images import resize_maps
from .losses import balanced_weights, weighted_cross_entropy

SHRINKAGE = 1e-2  # of the whitening, relative to the mean variance
HISTORY = 20  # of L-BFGS
# Weight decay of the instant trainer, in whitened coordinates. With .001 the problem is far from solved when the steps
# end, and rounding errors choose among many half-solved fits (benchmarks/convergence.py).
L2 = 0.1

# number of the evaluation, loss terms, the vectors so far, logits of the first view [K, H, W]
OnEvaluation = Callable[[int, dict[str, float], Callable[[], dict[str, Tensor]], Tensor], None]


@dataclass(frozen=True)
class FitResult:
    """Part vectors [P, D] by feature group; losses of all evaluations, in order."""

    vectors: dict[str, Tensor]
    losses: list[float]


def whitening(maps: Tensor) -> Tensor:
    """Return the symmetric matrix [D, D] that gives features [B, D, h, w] about unit variance in every direction.

    The small matrices are decomposed in float64 on the CPU: not every device has it.
    """
    flat = maps.movedim(1, -1).reshape(-1, maps.shape[1])
    centred = flat - flat.mean(0)
    covariance = centred.T @ centred / len(flat)
    values, vectors = torch.linalg.eigh(covariance.cpu().double())
    floor = SHRINKAGE * values.clamp(min=0).mean() + 1e-12
    return (vectors * (values.clamp(min=0) + floor).rsqrt() @ vectors.T).to(maps)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix.cpu().double()).to(matrix)


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
        problem = _Problem(features, labels, L2 if l2 is None else l2, init)
        optimizer = torch.optim.LBFGS(
            problem.parameters,
            max_iter=steps,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-6,
            tolerance_change=1e-8,
        )
        losses: list[float] = []

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            logits, loss, penalty = problem.evaluate()
            (loss + penalty).backward()
            losses.append(float(loss.detach()))
            if on_step is not None:
                terms = {"loss": losses[-1], "l2": float(penalty.detach())}
                on_step(len(losses), terms, problem.vectors, logits.detach()[0])
            return loss.detach() + penalty.detach()

        optimizer.step(evaluate)
        return FitResult(problem.vectors(), losses)


class _Problem:
    """The convex problem in whitened coordinates."""

    def __init__(
        self, features: Mapping[str, Tensor], labels: Tensor, l2: float, init: Mapping[str, Tensor] | None
    ) -> None:
        self._groups, self._labels, self._l2 = list(features), labels, l2
        self._transforms = {group: whitening(maps) for group, maps in features.items()}
        # Features last: then both the scores and their gradient are one matrix product each, without a copy.
        white = {group: maps.movedim(1, -1) @ self._transforms[group] for group, maps in features.items()}
        self._joined = _join_by_size(white)
        self._weights = balanced_weights(labels)
        parts, device = labels.shape[1] - 1, labels.device
        self.parameters = []
        for group, maps in white.items():
            start = torch.zeros(parts, maps.shape[-1], device=device)
            if init is not None:
                start = init[group].to(device) @ _inverse(self._transforms[group])
            self.parameters.append(start.requires_grad_(True))

    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors [P, D] so far, in the coordinates of the features."""
        pairs = zip(self._groups, self.parameters, strict=True)
        return {group: white.detach() @ self._transforms[group] for group, white in pairs}

    def evaluate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [V, K, H, W], cross-entropy and penalty."""
        grid = (self._labels.shape[-2], self._labels.shape[-1])
        scores = [
            resize_maps(F.linear(maps, torch.cat([self.parameters[i] for i in indices], 1)).movedim(-1, 1), grid)
            for indices, maps in self._joined
        ]
        logits = F.pad(torch.stack(scores).sum(0), (0, 0, 0, 0, 1, 0))
        loss = weighted_cross_entropy(logits, self._labels, self._weights)
        penalty = self._l2 * torch.stack([white.square().sum(-1) for white in self.parameters]).mean()
        return logits, loss, penalty


def _join_by_size(white: Mapping[str, Tensor]) -> list[tuple[Sequence[int], Tensor]]:
    """Concatenate groups [V, h, w, D] of one resolution, which are scored by one product and resized once."""
    maps = list(white.values())
    sizes = [one.shape[1:3] for one in maps]
    same_size = [[i for i in range(len(maps)) if sizes[i] == size] for size in dict.fromkeys(sizes)]
    return [(indices, torch.cat([maps[i] for i in indices], -1)) for indices in same_size]
