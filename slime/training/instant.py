"""The "instant" trainer: features of augmented views, then a convex fit."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

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
from .reuse import SeenView, Store, digest, store_of
from .template import instant_template
from .views import VIEW_BATCH, EncodedView, encode_all, resize_labels, view_count, view_seed, view_size


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
    store, keys = _memory(backbone, template, examples, settings, count)
    seen_views = {number: view for number, key in enumerate(keys) if (view := store.get(key)) is not None}
    same_size = len({view_size(example, backbone.info) for example in examples}) == 1
    wanted = _to_look_at(count, seen_views) if same_size else list(range(count))
    views = encode_all(backbone, examples, settings, wanted, encoding(on_step), plain=len(examples))
    first_image = views[0].picture()
    first: Observation | None = None
    looked_at = 0
    for seen in _observed(backbone, views, template.plan().to(backbone.device), settings, len(examples)):
        first = seen if first is None else first
        batch = views[looked_at : looked_at + len(seen.features[0])]
        kept = [maps.cpu() for maps in seen.features] if store.limit else []
        for place, encoded in enumerate(batch):
            labels = resize_labels(encoded.labels, seen.grid)
            seen_views[encoded.number] = SeenView(tuple(maps[place] for maps in seen.features), labels)
            if kept:
                store.put(keys[encoded.number], SeenView(tuple(maps[place].clone() for maps in kept), labels))
        looked_at += len(batch)
        on_step(StepReport("features", looked_at, len(views), {}, lambda: None))
    # Examples of another aspect come to the first one's grid: the loss looks at single positions only.
    like = seen_views[0]
    stacked = [
        torch.stack([_to_size(seen_views[i].features[group], maps, backbone.device) for i in range(count)])
        for group, maps in enumerate(like.features)
    ]
    truth = torch.stack([resize_labels(seen_views[i].labels, _grid(like.labels)) for i in range(count)]).to(stacked[0])
    del seen_views
    check_finite(stacked)

    def report(step: int, losses: dict[str, float], rows: Callable[[], Tensor], logits: Tensor) -> None:
        preview = (first_image, logits.softmax(0).cpu()) if step % 5 == 1 else None

        def best() -> PartEmbeddings:
            return replace(template, rows=rows().cpu())

        on_step(StepReport("fit", min(step, settings.steps), settings.steps, losses, best, preview))

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


def _memory(
    backbone: Backbone,
    template: PartEmbeddings,
    examples: Sequence[Example],
    settings: InstantSettings,
    count: int,
) -> tuple[Store, list[Hashable]]:
    """Where views of this model are kept, and every view's key; a backbone that cannot say what it is keeps none."""
    kept = store_of(backbone)
    if kept is None:
        return Store(0), list(range(count))
    store, state = kept
    looked = template.pass_digest()
    shown = [(digest(example, settings), looked, state) for example in examples]
    places = [(n % len(examples), n // len(examples), _batch(count, n)) for n in range(count)]
    return store, [(*shown[example], example, place, batch) for example, place, batch in places]


def _batch(count: int, number: int) -> int:
    """How many views share the pass of this one: results depend on it in the last bits."""
    return VIEW_BATCH if number < count - count % VIEW_BATCH else count % VIEW_BATCH


def _to_look_at(count: int, known: Container[int]) -> list[int]:
    """Views that are not known, filled up so that all stand in passes of the size that they always have.

    The first batch is looked at in any case: it holds examples as they are, whose maps are read in the end.
    """
    full = count - count % VIEW_BATCH
    new = {number for number in range(full) if number < VIEW_BATCH or number not in known}
    others = (number for number in range(full) if number not in new)
    new |= set(islice(others, -len(new) % VIEW_BATCH))
    rest = range(full, count)
    return sorted(new) + (list(rest) if not new or any(number not in known for number in rest) else [])


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
        seeds = [view_seed(settings, examples, view.number) for view in neighbours]
        noise = torch.cat([seeded_noise(latents[:1].shape, one, latents.device) for one in seeds])

        def observe(part: slice, latents: Tensor = latents, noise: Tensor = noise) -> Observation:
            return backbone.observe(latents[part], plan, noise[part])

        yield from in_batches(len(latents), VIEW_BATCH, observe)


def _starting_rows(rows: Tensor, groups: int) -> Tensor:
    """Rows [1 or G, P, D] to continue from; those of another grouping give their mean."""
    return rows if len(rows) in (1, groups) else rows.mean(0)[None]
