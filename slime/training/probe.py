"""Which layers of a loaded model tell the parts of the examples apart: for layer patterns "auto", and for models of
which nobody knows.

Every layer is judged by itself on views of the examples that it was not fitted to; the best few are then taken
together. GoCA (CVPR 2026) and a first trial with a small model found the paper's layers far from the best elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..backbones.attention import Attention, propagate
from ..backbones.base import Backbone, Plan, seeded_noise
from ..backbones.layers import AUTO, LayerChoice, select_layers
from ..batches import OUT_OF_MEMORY, check_finite
from ..errors import SlimeError
from ..examples import Example
from ..images import resize_maps
from ..settings import InstantSettings, PaperSettings, ViewSettings
from .fit import OnEvaluation, fit_rows
from .losses import balanced_weights, weighted_cross_entropy
from .progress import OnStep, StepReport
from .views import encode_views

Trained = TypeVar("Trained", InstantSettings, PaperSettings)

VIEWS = 24  # half of them are held out
SELF_VIEWS = 4  # of these, for judging self-attention, whose queries and keys take memory
GRID = 32  # finer score features are pooled: SDXL has 70 layers
WIDEST, ENOUGH = 1024, 512  # features wider than the first are judged in as many random directions as the second
FIT_STEPS = 25
L2 = 0.05  # of every layer
SIZES = (1, 2, 3, 5, 8, 12, 16, 24)  # how many of the best layers are tried together
PATIENCE = 1.002  # fewer layers are taken where they do nearly as well
MOST_SELF = 4


@dataclass(frozen=True)
class ProbeResult:
    """The choice, and what every layer scored alone: to be read the held-out cross-entropy (lower is better), to
    propagate by the held-out IoU after it (higher is better)."""

    choice: LayerChoice
    read: dict[str, float]
    propagate: dict[str, float]


def probe_layers(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: ViewSettings,
    condition: dict[str, Tensor],
    timestep: int,
    read: tuple[str, ...] = (),
    on_step: OnStep | None = None,
) -> ProbeResult:
    """Judge every layer on the examples; ``read`` names layers that are read in any case, and judges those alone.

    ``on_step`` hears of every view that was looked at, stage "layers".

    Costs ``VIEWS`` and ``SELF_VIEWS`` passes and a small fit a layer: about as much again as an instant training.
    """
    every = tuple(layer.name for layer in backbone.layers)
    looked = partial(_say, on_step) if on_step is not None else lambda _: None
    plan = Plan(LayerChoice(read or every, ()), condition, timestep, "layer")
    stack = _look(backbone, examples, settings, plan, looked)
    truth = stack.labels.to(backbone.device)
    sound = {
        name: maps for name, maps in stack.features.items() if all(bool(torch.isfinite(one).all()) for one in maps)
    }
    check_finite([] if sound else [maps[0] for maps in stack.features.values()])

    def heard(*_: object) -> None:
        looked(VIEWS)  # says nothing new, but is where a training can be cancelled

    cross = {name: _held_out([maps], truth, stack.held, heard)[0] for name, maps in sound.items()}
    best_first = sorted(cross, key=lambda key: cross[key])
    trials = {}
    for count in (n for n in SIZES if n <= len(best_first)) if not read else (len(best_first),):
        trials[count] = _held_out([sound[key] for key in best_first[:count]], truth, stack.held, heard)
    enough = PATIENCE * min(loss for loss, _ in trials.values())
    chosen = min(count for count, (loss, _) in trials.items() if loss <= enough)
    kept = set(best_first[:chosen])
    self_plan = Plan(LayerChoice((), every), condition, timestep).to(backbone.device)
    shown = list(stack.inputs)

    def look_again() -> Iterator[tuple[Attention, ...]]:
        for done, view in enumerate(shown):
            encoded, noise = stack.inputs[view]
            yield backbone.observe(encoded, self_plan, noise).attention
            looked(VIEWS + done + 1)

    attention = look_again()
    self_scores, self_choice = _choose_self(attention, every, trials[chosen][1][: len(shown)], truth[shown])
    return ProbeResult(LayerChoice(tuple(key for key in every if key in kept), self_choice), cross, self_scores)


def _say(on_step: OnStep, done: int) -> None:
    on_step(StepReport("layers", done, VIEWS + SELF_VIEWS, {}, lambda: None))


@dataclass(frozen=True)
class _Views:
    """What views of the examples showed: by layer one [1, D, h, w] a view, soft labels [V, K, h, w] on the CPU, which
    views are held out, and what the first of these were looked at with: encoded, and noise."""

    features: dict[str, list[Tensor]]
    labels: Tensor
    held: list[int]
    inputs: dict[int, tuple[Tensor, Tensor]]


def _look(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: ViewSettings,
    plan: Plan,
    looked: Callable[[int], None],
) -> _Views:
    # As observations sort single layers.
    order = sorted(range(len(backbone.layers)), key=lambda i: (backbone.layers[i].eye, -backbone.layers[i].stride, i))
    names = [name for i in order if (name := backbone.layers[i].name) in plan.layers.read]
    plan = plan.to(backbone.device)
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    labels: list[Tensor] = []
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    held: list[int] = []
    for index, (encoded, label, *_) in enumerate(encode_views(backbone, examples, settings, range(VIEWS))):
        noise = seeded_noise(encoded.shape, settings.seed + index, backbone.device)
        # Every example is fitted and held out in turn, unless there are too many.
        turn = index // len(examples) if 2 * len(examples) <= VIEWS else index
        if turn % 2:
            held.append(index)
            if len(inputs) < SELF_VIEWS:
                inputs[index] = encoded, noise
        for name, maps in zip(names, backbone.observe(encoded, plan, noise).features, strict=True):
            # Examples of another aspect come to the first one's sizes.
            like = features[name][0] if features[name] else _pool(maps)
            pooled = _narrow(F.adaptive_avg_pool2d(maps, (like.shape[-2], like.shape[-1])))
            features[name].append(pooled.half().cpu())  # of 24 wide layers a GPU cannot hold them beside the model
        labels.append(F.adaptive_avg_pool2d(label, GRID))
        looked(index + 1)
    return _Views(features, torch.stack(labels), held, inputs)


def with_probed_layers(
    backbone: Backbone, examples: Sequence[Example], settings: Trained, prompt: str, on_step: OnStep | None = None
) -> Trained:
    """The settings with the layers that the probe chooses, where they say "auto", or say nothing and the model of the
    backbone is not known."""
    usual = backbone.default_layers()
    read, propagate = settings.read_layers.strip(), settings.propagate_layers.strip()
    probe_read, probe_propagate = (
        pattern == AUTO or not (pattern or known)
        for pattern, known in ((read, usual.read), (propagate, usual.propagate))
    )
    if not (probe_read or probe_propagate):
        return settings
    timestep = getattr(settings, "timestep", None)
    timestep = backbone.info.timestep if timestep is None else timestep
    given = () if probe_read else select_layers(read, backbone.layers) if read else usual.read
    try:
        found = probe_layers(backbone, examples, settings, backbone.condition(prompt), timestep, given, on_step).choice
    except OUT_OF_MEMORY as error:
        raise SlimeError(
            "The GPU's memory does not suffice to choose layers on the examples. Close other programs, or name layers "
            f"in SLiMe Instant Settings; this model has: {', '.join(layer.name for layer in backbone.layers)}."
        ) from error
    return replace(
        settings,
        read_layers=", ".join(found.read) if probe_read else read,
        propagate_layers=", ".join(found.propagate) if probe_propagate else propagate,
    )


def _narrow(maps: Tensor) -> Tensor:
    """Features [1, D, h, w] in fewer directions where there are many, the same for all."""
    width = maps.shape[1]
    if width <= WIDEST:
        return maps
    directions = torch.randn(width, ENOUGH, generator=torch.Generator().manual_seed(width)) * width**-0.5
    return torch.einsum("bdhw,de->behw", maps.float(), directions.to(maps.device))


def _pool(maps: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(maps, GRID) if maps.shape[-2] > GRID or maps.shape[-1] > GRID else maps


def _held_out(
    groups: Sequence[Sequence[Tensor]], truth: Tensor, held: Sequence[int], heard: OnEvaluation
) -> tuple[float, Tensor]:
    """Fit rows to the views that are not held out, a row a layer; cross-entropy and maps [len(held), K, h, w]."""
    fit = [index for index in range(len(truth)) if index not in held]
    fitted = [torch.cat([maps[index] for index in fit]).to(truth) for maps in groups]
    rows = fit_rows(fitted, truth[fit], steps=FIT_STEPS, l2=L2 * len(groups), on_step=heard).rows
    size = (truth.shape[-2], truth.shape[-1])
    looks = [torch.cat([maps[index] for index in held]).to(truth) for maps in groups]
    seen = [resize_maps(torch.einsum("bdhw,kd->bkhw", m, row), size) for m, row in zip(looks, rows, strict=True)]
    logits = F.pad(torch.stack(seen).sum(0), (0, 0, 0, 0, 1, 0))
    loss = weighted_cross_entropy(logits, truth[list(held)], balanced_weights(truth[fit]))
    return float(loss), logits.softmax(1)


def _choose_self(
    attentions: Iterable[tuple[Attention, ...]], names: Sequence[str], maps: Tensor, truth: Tensor
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Self-attention layers by the IoU of half-propagated maps; the best few that do better together than alone.

    ``attentions`` of the views, one after the other: the queries and keys of one take memory.
    """
    size = (truth.shape[-2], truth.shape[-1])
    views = [
        torch.stack([resize_maps(propagate(layer, maps[v : v + 1]), size)[0] for layer in layers])
        for v, layers in enumerate(attentions)
    ]
    spread = torch.stack(views, 1)  # [layers, views, K, h, w]
    scores = {name: _iou(0.5 * maps + 0.5 * one, truth) for name, one in zip(names, spread, strict=True)}
    best_first = sorted(range(len(names)), key=lambda i: -scores[names[i]])[:MOST_SELF]
    together = [_iou(0.5 * maps + 0.5 * spread[best_first[:n]].mean(0), truth) for n in range(1, len(best_first) + 1)]
    count = max(range(len(together)), key=lambda n: together[n]) + 1
    kept = set(best_first[:count])
    return scores, tuple(name for i, name in enumerate(names) if i in kept)


def _iou(maps: Tensor, truth: Tensor) -> float:
    """Mean soft IoU of the parts; ignored pixels have no label at all and do not count."""
    found = F.one_hot(maps.argmax(1), maps.shape[1]).movedim(-1, 1).float()[:, 1:] * truth.sum(1, keepdim=True)
    real = truth[:, 1:]
    inter, union = torch.minimum(found, real).sum((0, 2, 3)), torch.maximum(found, real).sum((0, 2, 3))
    return float((inter / union.clamp(min=1e-6)).mean())
