"""The instant trainer: rows from cached features, a convex problem without the UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import join_background, resize_maps
from .losses import class_weights, weighted_cross_entropy

SHRINKAGE = 1e-2  # of the whitening, relative to the mean variance


OnEvaluation = Callable[[int, dict[str, float], Callable[[], Tensor], Tensor], None]


@dataclass(frozen=True)
class FitResult:
    """rows [G, P + E, D]; losses of the evaluations, in order."""

    rows: Tensor
    losses: list[float]


def whitening(maps: Tensor) -> Tensor:
    """[D, D] symmetric matrix that gives features [B, D, h, w] about unit variance in every direction."""
    flat = maps.movedim(1, -1).reshape(-1, maps.shape[1])
    centred = flat - flat.mean(0)
    covariance = centred.T @ centred / len(flat)
    values, vectors = torch.linalg.eigh(covariance.double())
    floor = SHRINKAGE * values.clamp(min=0).mean() + 1e-12
    return (vectors * (values.clamp(min=0) + floor).rsqrt() @ vectors.T).to(maps.dtype)


def fit_rows(
    scores: Sequence[Tensor],
    labels: Tensor,
    background: Tensor,
    *,
    steps: int,
    l2: float,
    weight_exponent: float = 1.0,
    separate_rows: bool = True,
    background_rows: int = 0,
    start: Tensor | None = None,
    on_step: OnEvaluation | None = None,
) -> FitResult:
    """Minimise the class-weighted cross-entropy of the part scores plus L2, by L-BFGS with line search.

    The scores are linear in the rows (see :class:`slime.features.Features`), so this is multinomial logistic
    regression. A row is the frozen background row plus an offset; the offsets are optimised in whitened coordinates,
    where one step size and one L2 weight suit every direction.

    Args:
        scores: one [V, D, h, w] for every resolution, of V views.
        labels: soft labels [V, K, H, W].
        background: [D].
        steps: largest number of L-BFGS iterations.
        l2: weight of the mean squared offset.
        weight_exponent: see :func:`slime.losses.class_weights`.
        separate_rows: one row a part and resolution, else one a part.
        background_rows: E further rows for the background; with them the problem is no longer convex.
        start: rows [1 or G, P + E, D] to continue from.
        on_step: called after every loss evaluation with its number, the loss terms, a function that gives the rows so
            far, and the logits of the first view [K, H, W].

    Returns:
        Rows [G, P + E, D], or [1, P + E, D] without ``separate_rows``.
    """
    with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes in inference mode
        return _fit_rows(
            scores, labels, background, steps, l2, weight_exponent, separate_rows, background_rows, start, on_step
        )


def _fit_rows(
    scores: Sequence[Tensor],
    labels: Tensor,
    background: Tensor,
    steps: int,
    l2: float,
    weight_exponent: float,
    separate_rows: bool,
    background_rows: int,
    start: Tensor | None,
    on_step: OnEvaluation | None,
) -> FitResult:
    groups, parts, device = len(scores), labels.shape[1] - 1, labels.device
    background = background.clone()
    grid = (labels.shape[-2], labels.shape[-1])
    if separate_rows:
        transforms = [whitening(maps) for maps in scores]
    else:
        joined = torch.stack([resize_maps(maps, grid) for maps in scores]).sum(0)
        transforms = [whitening(joined)] * groups
    white = [torch.einsum("bdhw,de->behw", maps, t) for maps, t in zip(scores, transforms, strict=True)]
    # Groups of one resolution are read by one product, and resized once.
    sizes = [maps.shape[-2:] for maps in white]
    same_size = [[i for i in range(groups) if sizes[i] == size] for size in dict.fromkeys(sizes)]
    joined_white = [
        (same, white[same[0]] if len(same) == 1 else torch.cat([white[i] for i in same], 1)) for same in same_size
    ]
    del white
    weights = class_weights(labels, weight_exponent)
    count = groups if separate_rows else 1
    offsets = torch.zeros(count, parts + background_rows, background.shape[0], device=device)
    # Background rows must start apart from the frozen one and from each other, or they stay one.
    generator = torch.Generator().manual_seed(0)
    offsets[:, parts:] = 0.01 * torch.randn(offsets[:, parts:].shape, generator=generator).to(device)
    if start is not None:
        given = (start.to(device) - background).expand(count, -1, -1)[:, : parts + background_rows]
        inverse = [torch.linalg.inv(t.double()).float() for t in transforms[:count]]
        offsets[:, : given.shape[1]] = torch.stack([g @ i for g, i in zip(given, inverse, strict=True)])
    offsets.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [offsets],
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-8,
    )
    losses: list[float] = []

    def rows() -> Tensor:
        found = offsets.detach()
        return torch.stack([z @ t for z, t in zip(found, transforms[:count], strict=True)]) + background

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        given = offsets.expand(groups, -1, -1)
        parts_of_score = [
            resize_maps(torch.einsum("bdhw,kd->bkhw", maps, torch.cat([given[i] for i in same], 1)), grid)
            for same, maps in joined_white
        ]
        total = torch.stack(parts_of_score).sum(0)
        logits = join_background(F.pad(total, (0, 0, 0, 0, 1, 0)), parts)
        ce = weighted_cross_entropy(logits, labels, weights)
        penalty = l2 * offsets.square().sum(-1).mean()
        (ce + penalty).backward()
        losses.append(float(ce.detach()))
        if on_step is not None:
            on_step(len(losses), {"loss": losses[-1], "l2": float(penalty.detach())}, rows, logits.detach()[0])
        return ce.detach() + penalty.detach()

    optimizer.step(evaluate)
    return FitResult(rows(), losses)
