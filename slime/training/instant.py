"""The "instant" trainer: features of augmented views, then a convex fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ..backbones.base import Backbone, Observation, Plan, seeded_noise
from ..batches import check_finite, in_batches
from ..embeddings import PartEmbeddings
from ..examples import Example
from ..images import resize_maps
from ..read_out import Propagated
from ..reading.read import calibrating_exponent, read
from ..settings import InstantSettings
from .fit import fit_rows
from .progress import OnStep, StepReport
from .template import instant_template
from .views import VIEW_BATCH, EncodedView, encode_all, resize_labels


def train_instant(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: InstantSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    """Rows from cached features: one pass a view on the base prompt, then :func:`slime.training.fit.fit_rows`."""
    template = instant_template(backbone, examples[0].names, settings)
    views = encode_all(backbone, examples, settings, on_step, plain=len(examples))
    first_image = views[0].picture()
    features: list[list[Tensor]] = []
    labels: list[Tensor] = []
    first: Observation | None = None
    for seen in _observed(backbone, views, template.plan().to(backbone.device), settings.seed):
        first = seen if first is None else first
        # Examples of another aspect come to the first one's grid: the loss looks at single positions only.
        like = [(maps.shape[-2], maps.shape[-1]) for maps in (features[0] if features else seen.features)]
        grid = (labels[0].shape[-2], labels[0].shape[-1]) if labels else seen.grid
        features.append([resize_maps(maps, size) for maps, size in zip(seen.features, like, strict=True)])
        labels += [resize_labels(view.labels, grid) for view in views[len(labels) :][: len(seen.features[0])]]
        on_step(StepReport("features", len(labels), len(views), {}, lambda: None))
    stacked = [torch.cat(group) for group in zip(*features, strict=True)]
    del features
    check_finite(stacked)

    def report(step: int, losses: dict[str, float], rows: Callable[[], Tensor], logits: Tensor) -> None:
        preview = (first_image, logits.softmax(0).cpu()) if step % 5 == 1 else None

        def best() -> PartEmbeddings:
            return replace(template, rows=rows().cpu())

        on_step(StepReport("fit", min(step, settings.steps), settings.steps, losses, best, preview))

    truth = torch.stack(labels).to(stacked[0])
    result = fit_rows(
        stacked,
        truth,
        steps=settings.steps,
        l2=settings.l2,
        weight_exponent=settings.class_weights,
        start=None if start is None else _starting_rows(start.rows, len(stacked)),
        on_step=report,
    )
    if first is None:
        raise ValueError("no views")
    # The first views are examples as they are; the first batch holds up to VIEW_BATCH of them.
    maps = read(first, result.rows, Propagated())[: len(examples)]
    embeddings = replace(
        template,
        rows=result.rows.cpu(),
        losses=tuple(result.losses),
        sureness=float(maps[:, 1:].amax((2, 3)).mean()),
        read_out=Propagated(sharpen=calibrating_exponent(maps, truth[: len(maps)])),
    )
    preview = (first_image, maps[0].cpu())
    done = {"loss": result.losses[-1]}
    on_step(StepReport("done", settings.steps, settings.steps, done, lambda: embeddings, preview))
    return embeddings


def _observed(backbone: Backbone, views: Sequence[EncodedView], plan: Plan, seed: int) -> Iterator[Observation]:
    """What the views show, in order, in batches of neighbours of one size; every view has noise of its own."""
    first = 0
    for _, neighbours in groupby(views, key=lambda view: view.size):
        latents = torch.cat([view.latents for view in neighbours])
        seeds = range(seed + first, seed + first + len(latents))
        noise = torch.cat([seeded_noise(latents[:1].shape, one, latents.device) for one in seeds])

        def observe(part: slice, latents: Tensor = latents, noise: Tensor = noise) -> Observation:
            return backbone.observe(latents[part], plan, noise[part])

        yield from in_batches(len(latents), VIEW_BATCH, observe)
        first += len(latents)


def _starting_rows(rows: Tensor, groups: int) -> Tensor:
    """Rows [1 or G, P, D] to continue from; those of another grouping give their mean."""
    return rows if len(rows) in (1, groups) else rows.mean(0)[None]
