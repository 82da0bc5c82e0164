"""Minimise a smooth function by L-BFGS, with few waits for the device.

``torch.optim.LBFGS`` fetches many single numbers an iteration, and runs its recursion vector by vector. Here the
recursion works on coefficients: all inner products of the remembered vectors are one matrix product and one fetch, the
direction is another product. An evaluation is one fetch more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HISTORY = 20  # remembered steps
DECREASE, CURVATURE = 1e-4, 0.9  # of the Wolfe conditions
TRIALS = 25  # evaluations of one line search
NARROWEST = 0.1  # share of a bracket that a trial keeps from its ends
EVALUATIONS = 1.25  # in all, for each iteration allowed
# The search ends when a step promises less than this: about twice the distance to the minimum, if the remembered steps
# describe the curvature well.
TOLERANCE = 1e-5

# from a point [N] to terms [T] whose sum is minimised, and the gradient [N]
Function = Callable[[Tensor], tuple[Tensor, Tensor]]
OnEvaluation = Callable[[list[float], Tensor], None]


class _Evaluation(NamedTuple):
    point: Tensor
    terms: list[float]
    value: float  # their sum
    gradient: Tensor
    slope: float  # along the direction of the search


def minimize(function: Function, start: Tensor, steps: int, on_evaluation: OnEvaluation) -> tuple[Tensor, list[float]]:
    """Return the best point [N] that was found, and its terms.

    Args:
        function: returns terms and gradient at a point, on its device.
        start: point [N] to start from.
        steps: largest number of iterations.
        on_evaluation: called after every evaluation with the terms and the point.
    """
    left = math.ceil(steps * EVALUATIONS)
    best: _Evaluation | None = None  # the last trial of a line search need not be

    def evaluate(point: Tensor, direction: Tensor) -> _Evaluation:
        nonlocal left, best
        left -= 1
        terms, gradient = function(point)
        found = torch.cat([terms, (gradient @ direction)[None]]).cpu().tolist()
        on_evaluation(found[:-1], point)
        evaluation = _Evaluation(point, found[:-1], sum(found[:-1]), gradient, found[-1])
        if best is None or evaluation.value < best.value:
            best = evaluation
        return evaluation

    past: list[tuple[Tensor, Tensor]] = []  # steps and changes of the gradient
    here = evaluate(start, torch.zeros_like(start))
    for _ in range(steps):
        if left <= 0:
            break
        direction, slope = _direction(past, here.gradient)
        if -slope <= TOLERANCE:
            break
        size = 1.0 if past else min(1.0, (-slope) ** -0.5)
        there = _line_search(evaluate, here, direction, slope, size, lambda: left)
        if not there.value < here.value:
            break
        if there.slope > slope:  # curvature must be positive
            past = [*past, (there.point - here.point, there.gradient - here.gradient)][-HISTORY:]
        here = there
    assert best is not None
    return best.point, best.terms


def _direction(past: list[tuple[Tensor, Tensor]], gradient: Tensor) -> tuple[Tensor, float]:
    """Return the direction [N] of the next step, and the slope along it."""
    vectors = torch.stack([*(step for step, _ in past), *(change for _, change in past), gradient])
    products = (vectors @ vectors.T).cpu().double().numpy()
    count = len(past)
    weights, alphas = np.zeros(2 * count + 1), np.zeros(count)  # of the vectors, in the direction
    weights[-1] = -1.0
    for i in reversed(range(count)):
        alphas[i] = products[i] @ weights / products[i, count + i]
        weights[count + i] -= alphas[i]
    if count:
        weights *= products[count - 1, 2 * count - 1] / products[2 * count - 1, 2 * count - 1]
    for i in range(count):
        weights[i] += alphas[i] - products[count + i] @ weights / products[i, count + i]
    direction = (torch.from_numpy(weights).to(vectors)[None] @ vectors)[0]
    return direction, float(products[-1] @ weights)


def _line_search(
    evaluate: Callable[[Tensor, Tensor], _Evaluation],
    here: _Evaluation,
    direction: Tensor,
    slope: float,
    size: float,
    left: Callable[[], int],
) -> _Evaluation:
    """Return a point along the direction that meets the weak Wolfe conditions, or the last one tried."""
    low, high = here, None  # with the sizes of their steps
    size_low = size_high = 0.0
    for _ in range(TRIALS):
        there = evaluate(here.point + size * direction, direction)
        if not there.value <= here.value + DECREASE * size * slope:
            high, size_high = there, size
        elif there.slope < CURVATURE * slope:
            low, size_low = there, size
        else:
            break
        if left() <= 0 or -slope * size <= TOLERANCE / 100:
            break
        if high is None:
            size *= 2
        else:
            width, low_slope = size_high - size_low, slope if low is here else low.slope
            size = size_low + width * _lowest(low.value, low_slope * width, high.value, high.slope * width)
    return there


def _lowest(value: float, slope: float, other: float, other_slope: float) -> float:
    """Return where in [0, 1], not too near the ends, the cubic with these values and slopes at 0 and 1 is lowest."""
    bend = slope + other_slope - 3 * (other - value)
    root = bend**2 - slope * other_slope
    if not root >= 0:
        return 0.5
    share = 1 - (other_slope + root**0.5 - bend) / (other_slope - slope + 2 * root**0.5)
    return min(max(share, NARROWEST), 1 - NARROWEST)
