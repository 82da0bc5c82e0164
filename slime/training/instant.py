"""The "instant" trainer: features of augmented views, then a convex fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ..backbones.base import Backbone, choose_layers
from ..decode.linear import LinearDecoder, calibrating_temperature, decode_features
from ..embeddings import LINEAR, PartEmbeddings
from ..examples import Example
from ..settings import SHARED, InstantSettings
from .colors import ColorCheck, check_colors, extra_views
from .features import ViewFeatures
from .fit import fit_vectors
from .probe import with_probed_layers
from .progress import OnStep, StepReport
from .views import VIEW_BATCH, view_count

STEPS = 100  # most L-BFGS iterations; a fit ends after about thirty


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
    further = extra_views(count) if settings.recolor is None else 0
    views = ViewFeatures(backbone, examples, settings, template, on_step, count + further)
    check: ColorCheck | None = None
    if settings.recolor is None:
        check = check_colors(views, template.names, len(examples), count)
        found_out = asdict(check) | {"found": check.said()}
        template = replace(template, settings={**template.settings, "color_check": found_out})
    strength = float(settings.recolor or 0.0) if check is None else float(check.recolor)
    wanted = [(number, strength) for number in range(count)]
    found = views.get(wanted)
    features, truth = views.stacked(wanted)
    alike = [i for i, view in enumerate(found[: min(len(examples), VIEW_BATCH)]) if view.grid == found[0].grid]
    as_they_are = [found[i] for i in alike]
    first_image = views.first_image()
    del views, found

    def report(step: int, losses: dict[str, float], vectors: Callable[[], dict[str, Tensor]], logits: Tensor) -> None:
        preview = (first_image, logits.softmax(0).cpu()) if step % 5 == 1 else None
        best = _with_vectors(template, vectors)
        on_step(StepReport("fit", min(step, STEPS), STEPS, losses, best, preview))

    result = fit_vectors(
        features,
        truth,
        steps=STEPS,
        init=None
        if init is None
        else _initial_vectors(init.vectors, {name: m.shape[1] for name, m in features.items()}),
        on_step=report,
    )
    maps = torch.cat([decode_features(view, result.vectors) for view in as_they_are])
    embeddings = replace(
        template,
        vectors={group: vector.cpu() for group, vector in result.vectors.items()},
        losses=tuple(result.losses),
        example_confidence=min(1.0, float(maps[:, 1:].amax((2, 3)).mean())),
        decoder=LinearDecoder(calibrating_temperature(maps, truth[alike])),
    )
    preview = (first_image, maps[0].cpu())
    final = {"loss": result.losses[-1]}
    remark = "" if check is None else check.said()
    on_step(StepReport("done", STEPS, STEPS, final, lambda: embeddings, preview, remark))
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
