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
from .progress import OnStep, StepReport, encoding
from .reuse import SeenView, digest, store_of
from .template import instant_template
from .views import VIEW_BATCH, EncodedView, encode_all, resize_labels, view_count, view_seed


def train_instant(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: InstantSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    """Rows from cached features: one pass a view on the base prompt, then :func:`slime.training.fit.fit_rows`."""
    template = instant_template(backbone, examples[0].names, settings)
    count = view_count(examples, settings)
    kept, keys = store_of(backbone), [""] * count
    if kept is not None:
        pass_digest = template.pass_digest()
        digests = [(digest(example, settings), pass_digest, kept[1]) for example in examples]
        keys = [(*digests[i % len(examples)], i % len(examples), i // len(examples)) for i in range(count)]
    known = {i: view for i, key in enumerate(keys) if kept is not None and (view := kept[0].get(key)) is not None}
    # The first batch is looked at in any case: it holds examples as they are, whose maps are read in the end.
    wanted = [index for index in range(count) if index < VIEW_BATCH or index not in known]
    views = encode_all(backbone, examples, settings, wanted, encoding(on_step), plain=len(examples))
    first_image = views[0].picture()
    first: Observation | None = None
    seen_views: dict[int, SeenView] = dict(known)
    done = 0
    for seen in _observed(backbone, views, template.plan().to(backbone.device), settings, len(examples)):
        first = seen if first is None else first
        for place, view in enumerate(views[done : done + len(seen.features[0])]):
            features = tuple(maps[place] for maps in seen.features)
            seen_views[view.index] = SeenView(features, resize_labels(view.labels, seen.grid))
            if kept is not None:
                kept[0].put(keys[view.index], *seen_views[view.index])
        done += len(seen.features[0])
        on_step(StepReport("features", done, len(views), {}, lambda: None))
    # Examples of another aspect come to the first one's grid: the loss looks at single positions only.
    like = seen_views[0]
    stacked = [
        torch.stack([_to_size(seen_views[i].features[group], maps, backbone.device) for i in range(count)])
        for group, maps in enumerate(like.features)
    ]
    labels = [resize_labels(seen_views[i].labels.cpu(), _grid(like.labels)) for i in range(count)]
    del seen_views, known
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


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _to_size(maps: Tensor, like: Tensor, device: torch.device) -> Tensor:
    return resize_maps(maps[None].to(device), _grid(like))[0]


def _observed(
    backbone: Backbone, views: Sequence[EncodedView], plan: Plan, settings: InstantSettings, examples: int
) -> Iterator[Observation]:
    """What the views show, in order, in batches of neighbours of one size; every view has noise of its own."""
    for _, group in groupby(views, key=lambda view: view.size):
        neighbours = list(group)
        latents = torch.cat([view.latents for view in neighbours])
        seeds = [view_seed(settings, examples, view.index) for view in neighbours]
        noise = torch.cat([seeded_noise(latents[:1].shape, one, latents.device) for one in seeds])

        def observe(part: slice, latents: Tensor = latents, noise: Tensor = noise) -> Observation:
            return backbone.observe(latents[part], plan, noise[part])

        yield from in_batches(len(latents), VIEW_BATCH, observe)


def _starting_rows(rows: Tensor, groups: int) -> Tensor:
    """Rows [1 or G, P, D] to continue from; those of another grouping give their mean."""
    return rows if len(rows) in (1, groups) else rows.mean(0)[None]
