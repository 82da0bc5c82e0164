"""The "instant" trainer: features of augmented views, then a convex fit."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby, islice

import torch
from torch import Tensor

from ..backbones.base import Backbone, ExtractionSpec, Features, choose_layers, seeded_noise
from ..batches import check_finite, in_batches
from ..decode.linear import LinearDecoder, calibrating_temperature, decode_features
from ..embeddings import LINEAR, PartEmbeddings
from ..examples import Example
from ..images import resize_maps
from ..settings import SHARED, InstantSettings
from .cache import CachedView, ViewCache, cache_of, example_digest
from .fit import fit_vectors
from .probe import with_probed_layers
from .progress import OnStep, StepReport, report_encoding
from .registry import Trainer
from .views import VIEW_BATCH, EncodedView, encode_all, resize_labels, view_count, view_seed, view_size


def train_instant(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: InstantSettings,
    init: PartEmbeddings | None,
    validation: Sequence[Example],
    on_step: OnStep,
) -> PartEmbeddings:
    """Fit part vectors to features of augmented views: one pass per view, then :func:`.fit.fit_vectors`."""
    del validation  # the fit is convex: there is nothing to choose among
    settings = with_probed_layers(backbone, examples, settings, settings.prompt, on_step)
    template = _template(backbone, examples[0].names, settings)
    count = view_count(examples, settings)
    views, first, first_image = _extract_views(backbone, examples, settings, template, count, on_step)
    # Examples of another aspect are resized to the first one's grid: the loss takes single positions only.
    like = views[0]
    features = {
        group: torch.stack([_resized(views[i].features[group], maps, backbone.device) for i in range(count)])
        for group, maps in like.features.items()
    }
    labels = [resize_labels(views[i].labels, _grid(like.labels)) for i in range(count)]
    truth = torch.stack(labels).to(next(iter(features.values())))
    del views
    check_finite(features.values())

    def report(step: int, losses: dict[str, float], vectors: Callable[[], dict[str, Tensor]], logits: Tensor) -> None:
        preview = (first_image, logits.softmax(0).cpu()) if step % 5 == 1 else None
        best = _with_vectors(template, vectors)
        on_step(StepReport("fit", min(step, settings.steps), settings.steps, losses, best, preview))

    result = fit_vectors(
        features,
        truth,
        steps=settings.steps,
        l2=backbone.info.l2,
        init=None
        if init is None
        else _initial_vectors(init.vectors, {name: m.shape[1] for name, m in features.items()}),
        on_step=report,
    )
    # The first views are the examples as they are; the first batch holds up to VIEW_BATCH of them.
    maps = decode_features(first, result.vectors)[: len(examples)]
    embeddings = replace(
        template,
        vectors={group: vector.cpu() for group, vector in result.vectors.items()},
        losses=tuple(result.losses),
        example_confidence=min(1.0, float(maps[:, 1:].amax((2, 3)).mean())),
        decoder=LinearDecoder(calibrating_temperature(maps, truth[: len(maps)])),
    )
    preview = (first_image, maps[0].cpu())
    final = {"loss": result.losses[-1]}
    on_step(StepReport("done", settings.steps, settings.steps, final, lambda: embeddings, preview))
    return embeddings


def _template(backbone: Backbone, names: Sequence[str], settings: InstantSettings) -> PartEmbeddings:
    """Return the embeddings without what is learned."""
    info = backbone.info
    return PartEmbeddings(
        names=tuple(names),
        vectors={SHARED: torch.zeros(len(names), 1)},
        condition=backbone.condition(settings.prompt),
        prompt=settings.prompt,
        backbone=info.id,
        layers=choose_layers(backbone, settings.read_layers, settings.propagate_layers),
        timestep=info.timestep if settings.timestep is None else settings.timestep,
        side=info.side,
        mode=LINEAR,
        grouping=info.grouping,
        settings={"preset": "instant"} | asdict(settings),
    )


def _with_vectors(template: PartEmbeddings, vectors: Callable[[], dict[str, Tensor]]) -> Callable[[], PartEmbeddings]:
    return lambda: replace(template, vectors={group: vector.cpu() for group, vector in vectors().items()})


def _extract_views(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: InstantSettings,
    template: PartEmbeddings,
    count: int,
    on_step: OnStep,
) -> tuple[dict[int, CachedView], Features, Tensor]:
    """Return all views by number, the features of the first batch, and the first view's image.

    Views of the cache are not extracted again, except to fill up batches.
    """
    cache, keys = _cache_and_keys(backbone, template, examples, settings, count)
    views = {number: view for number, key in enumerate(keys) if (view := cache.get(key)) is not None}
    same_size = len({view_size(example, backbone.info) for example in examples}) == 1
    wanted = _to_extract(count, views) if same_size else list(range(count))
    encoded = encode_all(backbone, examples, settings, wanted, report_encoding(on_step), plain=len(examples))
    first: Features | None = None
    done = 0
    spec = template.extraction_spec().to(backbone.device)
    for features in _features_of(backbone, encoded, spec, settings, len(examples)):
        first = features if first is None else first
        size = len(next(iter(features.groups.values())))
        on_cpu = {group: maps.cpu() for group, maps in features.groups.items()} if cache.limit else {}
        for index, new in enumerate(encoded[done : done + size]):
            labels = resize_labels(new.labels, features.grid)
            views[new.number] = CachedView({group: maps[index] for group, maps in features.groups.items()}, labels)
            if on_cpu:
                own = {group: maps[index].clone() for group, maps in on_cpu.items()}
                cache.put(keys[new.number], CachedView(own, labels))
        done += size
        on_step(StepReport("features", done, len(encoded), {}, lambda: None))
    if first is None:
        raise ValueError("no views")
    return views, first, encoded[0].image()


def _cache_and_keys(
    backbone: Backbone,
    template: PartEmbeddings,
    examples: Sequence[Example],
    settings: InstantSettings,
    count: int,
) -> tuple[ViewCache, list[Hashable]]:
    """Return the cache of this model and the key of every view; an empty cache where the backbone allows none."""
    known = cache_of(backbone)
    if known is None:
        return ViewCache(0), list(range(count))
    cache, state = known
    spec = template.extraction_key()
    digests = [(example_digest(example, settings), spec, state) for example in examples]
    places = [(n % len(examples), n // len(examples), _batch_size(count, n)) for n in range(count)]
    return cache, [(*digests[example], example, place, batch) for example, place, batch in places]


def _batch_size(count: int, number: int) -> int:
    """Return how many views share the pass of this one: results depend on it in the last bits."""
    return VIEW_BATCH if number < count - count % VIEW_BATCH else count % VIEW_BATCH


def _to_extract(count: int, known: Container[int]) -> list[int]:
    """Return the views that are not known, filled up so that every view is in a pass of its usual batch size.

    The first batch is always extracted: it holds the examples as they are, whose maps are decoded in the end.
    """
    full = count - count % VIEW_BATCH
    new = {number for number in range(full) if number < VIEW_BATCH or number not in known}
    others = (number for number in range(full) if number not in new)
    new |= set(islice(others, -len(new) % VIEW_BATCH))
    rest = range(full, count)
    return sorted(new) + (list(rest) if not new or any(number not in known for number in rest) else [])


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _resized(maps: Tensor, like: Tensor, device: torch.device) -> Tensor:
    return resize_maps(maps[None].to(device), _grid(like))[0]


def _features_of(
    backbone: Backbone, views: Sequence[EncodedView], spec: ExtractionSpec, settings: InstantSettings, examples: int
) -> Iterator[Features]:
    """Yield features of the views in order, in batches of neighbours of one size; every view has its own noise."""
    for _, group in groupby(views, key=lambda view: view.size):
        neighbours = list(group)
        latents = torch.cat([view.latents for view in neighbours])
        seeds = [view_seed(settings, examples, view.number) for view in neighbours]
        noise = torch.cat([seeded_noise(latents[:1].shape, seed, latents.device) for seed in seeds])

        def extract(chunk: slice, latents: Tensor = latents, noise: Tensor = noise) -> Features:
            return backbone.extract(latents[chunk], spec, noise[chunk])

        yield from in_batches(len(latents), VIEW_BATCH, extract)


def _initial_vectors(vectors: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return vectors [P, D] to continue from for groups of these widths D.

    A group without its own starts from the mean of the others of its width, or from 0.
    """
    initial = {}
    for group, width in widths.items():
        own = vectors.get(group, vectors.get(SHARED))
        if own is None or own.shape[1] != width:
            alike = [vector for vector in vectors.values() if vector.shape[1] == width]
            own = torch.stack(alike).mean(0) if alike else torch.zeros(len(next(iter(vectors.values()))), width)
        initial[group] = own
    return initial


TRAINER = Trainer("instant", InstantSettings, LINEAR, train_instant)
