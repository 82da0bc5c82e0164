"""The "instant" trainer: features of augmented views, then a convex fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from .attention import resize_maps
from .batches import in_batches
from .denoiser import Denoiser, seeded_noise
from .embeddings import PartEmbeddings
from .examples import Example
from .features import FeaturePlan, Features, check_finite, extract_features, key_projections
from .fit import fit_rows
from .layers import LayerKey
from .losses import balance_views
from .read import calibrating_exponent, read
from .recipe import OnStep, StepReport, make_template
from .settings import TrainSettings
from .views import VIEW_BATCH, EncodedView, encode_views, resize_labels, view_count

DRAW = 1_000_003  # between the seeds of two noise draws of a view


def train_instant(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    """Rows from cached features: one UNet pass a view on the base prompt, then :func:`slime.fit.fit_rows`."""
    template = make_template(denoiser, examples, settings, "keys")
    plan = template.plan().to(denoiser.device)
    # All encoding comes first: on a small card VAE and UNet take turns in memory.
    count = view_count(examples, settings)
    views = list(encode_views(denoiser, examples, settings, template.working_side, count, plain=len(examples)))
    first_image = views[0].picture()
    scores: list[list[Tensor]] = []
    labels: list[Tensor] = []
    first: Features | None = None
    for features in _view_features(denoiser, views, plan, settings.seed, settings.draws):
        first = features if first is None else first
        # Examples of another aspect come to the first one's grid: the loss looks at single positions only.
        like = [(maps.shape[-2], maps.shape[-1]) for maps in (scores[0] if scores else features.scores)]
        grid = (labels[0].shape[-2], labels[0].shape[-1]) if labels else features.grid
        scores.append([resize_maps(maps, size) for maps, size in zip(features.scores, like, strict=True)])
        seen = views[len(labels) : len(labels) + len(features.scores[0])]
        labels += [resize_labels(view.labels, grid) for view in seen]
        on_step(StepReport("features", len(labels), len(views), {}, lambda: None))
    stacked = [torch.cat(group) for group in zip(*scores, strict=True)]
    del scores
    check_finite(stacked)

    def report(step: int, losses: dict[str, float], rows: Callable[[], Tensor], logits: Tensor) -> None:
        preview = (first_image, logits.softmax(0).cpu()) if step % 5 == 1 else None
        on_step(
            StepReport(
                "fit",
                min(step, settings.steps),
                settings.steps,
                losses,
                lambda: replace(template, rows=rows().cpu()),
                preview,
            )
        )

    truth = torch.stack(labels).to(stacked[0])
    result = fit_rows(
        stacked,
        balance_views(truth) if settings.balance else truth,
        template.background.to(stacked[0]),
        steps=settings.steps,
        l2=settings.l2,
        weight_exponent=settings.class_weights,
        separate_rows=settings.row_groups != "shared",
        background_rows=settings.background_rows,
        start=_starting_rows(start, settings.row_groups, len(stacked)),
        on_step=report,
    )
    if first is None:
        raise ValueError("no views")
    # The first views are examples as they are; the first batch holds up to VIEW_BATCH of them.
    maps = read(first, result.rows, template.background, len(template.names), template.read_out)[: len(examples)]
    embeddings = replace(
        template,
        rows=result.rows.cpu(),
        losses=tuple(result.losses),
        sureness=float(maps[:, 1:].amax((2, 3)).mean()),
        read_out=replace(template.read_out, sharpen=calibrating_exponent(maps, truth[: len(maps)])),
    )
    losses = {"loss": result.losses[-1]}
    preview = (first_image, maps[0].cpu())
    on_step(StepReport("done", settings.steps, settings.steps, losses, lambda: embeddings, preview))
    return embeddings


def _view_features(
    denoiser: Denoiser, views: Sequence[EncodedView], plan: FeaturePlan, seed: int, draws: int
) -> Iterator[Features]:
    """Features of the views in order, in batches of neighbours of one size; every view has noise of its own.

    The score features are the mean over the noise draws, the self-attention is the first draw's.
    """
    projections = key_projections(denoiser, plan.layers, plan.context.pooled)
    first = 0
    for size, neighbours in groupby(views, key=lambda view: view.size):
        latents = torch.cat([view.latents for view in neighbours])
        seeds = range(seed + first, seed + first + len(latents))
        noises = [
            torch.cat([seeded_noise(latents[:1].shape, one + DRAW * draw, latents.device) for one in seeds])
            for draw in range(draws)
        ]
        look = partial(_look, denoiser, latents, noises, plan, size, projections)
        yield from in_batches(len(latents), VIEW_BATCH, look)
        first += len(latents)


def _look(
    denoiser: Denoiser,
    latents: Tensor,
    noises: Sequence[Tensor],
    plan: FeaturePlan,
    size: tuple[int, int],
    projections: Mapping[LayerKey, Tensor],
    part: slice,
) -> Features:
    drawn = [extract_features(denoiser, latents[part], plan, noise[part], size, projections) for noise in noises]
    if len(drawn) == 1:
        return drawn[0]
    scores = zip(*(features.scores for features in drawn), strict=True)
    return replace(drawn[0], scores=tuple(torch.stack(group).mean(0) for group in scores))


def _starting_rows(start: PartEmbeddings | None, row_groups: str, groups: int) -> Tensor | None:
    """Rows to continue from; those of another grouping give their mean."""
    if start is None:
        return None
    return start.rows if len(start.rows) in (1, groups if row_groups != "shared" else 1) else start.rows.mean(0)[None]
