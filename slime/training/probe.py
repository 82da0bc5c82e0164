"""Choose layers on the examples: for the layer pattern "auto", and for models without known layers.

Every layer is scored alone on views of the examples that it was not fitted to; the best few are then combined. GoCA
(CVPR 2026) and a first trial with a small model found the paper's layers far from the best on other models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.attention import Attention, propagate
from ..backbones.base import Backbone, ExtractionSpec, seeded_noise
from ..backbones.layers import AUTO, LayerChoice, select_layers
from ..batches import OUT_OF_MEMORY, check_finite
from ..errors import SlimeError
from ..examples import Example
from ..images import resize_maps
from ..settings import LAYER, InstantSettings, PaperSettings, ViewSettings
from .fit import OnEvaluation, fit_vectors
from .losses import balanced_weights, weighted_cross_entropy
from .progress import OnStep, StepReport
from .views import encode_views

Trained = TypeVar("Trained", InstantSettings, PaperSettings)

VIEWS = 24  # half of them are held out
SELF_VIEWS = 4  # of these, for scoring self-attention, whose queries and keys take memory
GRID = 32  # finer features are pooled: SDXL has 70 layers
WIDEST, DIRECTIONS = 1024, 512  # wider features are projected onto so many random directions
FIT_STEPS = 25
L2 = 0.05  # per layer
SIZES = (1, 2, 3, 5, 8, 12, 16, 24)  # how many of the best layers are combined
TOLERANCE = 1.002  # fewer layers are chosen if their loss is within this factor of the best
MOST_SELF = 4


@dataclass(frozen=True)
class ProbeResult:
    """The choice, and the score of every layer alone.

    Attributes:
        choice: the layers.
        read: held-out cross-entropy by layer (lower is better).
        propagate: held-out IoU after propagation by layer (higher is better).
    """

    choice: LayerChoice
    read: dict[str, float]
    propagate: dict[str, float]


def with_probed_layers(
    backbone: Backbone, examples: Sequence[Example], settings: Trained, prompt: str, on_step: OnStep
) -> Trained:
    """Return the settings with probed layers where they say "auto", or nothing while the backbone has no default."""
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
        choice = probe_layers(backbone, examples, settings, backbone.condition(prompt), timestep, given, on_step).choice
    except OUT_OF_MEMORY as error:
        raise SlimeError(
            "Out of GPU memory while choosing layers on the examples. Close other programs, or name the layers in "
            f"SLiMe Instant Settings; this model has: {', '.join(layer.name for layer in backbone.layers)}."
        ) from error
    return replace(
        settings,
        read_layers=", ".join(choice.read) if probe_read else read,
        propagate_layers=", ".join(choice.propagate) if probe_propagate else propagate,
    )


def probe_layers(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: ViewSettings,
    condition: Mapping[str, Tensor],
    timestep: int,
    read: tuple[str, ...] = (),
    on_step: OnStep | None = None,
) -> ProbeResult:
    """Score every layer on the examples, and choose.

    Costs ``VIEWS`` and ``SELF_VIEWS`` passes and a small fit per layer: about as much as an instant training.

    Args:
        backbone: the model.
        examples: with labels.
        settings: of the views.
        condition, timestep: of the passes.
        read: layers to read in any case; these alone are scored then.
        on_step: called after every view, stage "layers".
    """
    every = tuple(layer.name for layer in backbone.layers)

    def advance(done: int) -> None:
        if on_step is not None:
            on_step(StepReport("layers", done, VIEWS + SELF_VIEWS))

    spec = ExtractionSpec(LayerChoice(read or every, ()), condition, timestep, LAYER)
    views = _extract_views(backbone, examples, settings, spec, advance)
    truth = views.labels.to(backbone.device)
    finite = {
        name: maps for name, maps in views.features.items() if all(bool(torch.isfinite(one).all()) for one in maps)
    }
    check_finite([] if finite else [maps[0] for maps in views.features.values()])

    def on_evaluation(*_: object) -> None:
        advance(VIEWS)  # no progress, but a chance to cancel

    scores = {
        name: _fit_and_hold_out({name: maps}, truth, views.held_out, on_evaluation)[0] for name, maps in finite.items()
    }
    best_first = sorted(scores, key=lambda name: scores[name])
    trials = {}
    for count in (n for n in SIZES if n <= len(best_first)) if not read else (len(best_first),):
        several = {name: finite[name] for name in best_first[:count]}
        trials[count] = _fit_and_hold_out(several, truth, views.held_out, on_evaluation)
    enough = TOLERANCE * min(loss for loss, _ in trials.values())
    chosen = min(count for count, (loss, _) in trials.items() if loss <= enough)
    kept = set(best_first[:chosen])
    attention = _self_attention(backbone, views, LayerChoice((), every), condition, timestep, advance)
    shown = list(views.inputs)
    self_scores, self_choice = _choose_self(attention, every, trials[chosen][1][: len(shown)], truth[shown])
    return ProbeResult(LayerChoice(tuple(name for name in every if name in kept), self_choice), scores, self_scores)


@dataclass(frozen=True)
class _Views:
    """Features of views of the examples.

    Attributes:
        features: [1, D, h, w] per view, by layer.
        labels: soft labels [V, K, h, w] on the CPU.
        held_out: numbers of the views that are not fitted.
        inputs: encoded image and noise of the first of these.
    """

    features: dict[str, list[Tensor]]
    labels: Tensor
    held_out: list[int]
    inputs: dict[int, tuple[Tensor, Tensor]]


def _extract_views(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: ViewSettings,
    spec: ExtractionSpec,
    advance: Callable[[int], None],
) -> _Views:
    spec = spec.to(backbone.device)
    features: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    held_out: list[int] = []
    for index, view in enumerate(encode_views(backbone, examples, settings, range(VIEWS))):
        noise = seeded_noise(view.latents.shape, settings.seed + index, backbone.device)
        # Every example is fitted and held out in turn, unless there are too many.
        turn = index // len(examples) if 2 * len(examples) <= VIEWS else index
        if turn % 2:
            held_out.append(index)
            if len(inputs) < SELF_VIEWS:
                inputs[index] = view.latents, noise
        for name, maps in backbone.extract(view.latents, spec, noise).groups.items():
            # Examples of another aspect are pooled to the first one's sizes.
            like = features[name][0] if name in features else _pool(maps)
            pooled = _project(F.adaptive_avg_pool2d(maps, (like.shape[-2], like.shape[-1])))
            # On the CPU: a GPU cannot hold 24 wide layers besides the model.
            features.setdefault(name, []).append(pooled.half().cpu())
        labels.append(F.adaptive_avg_pool2d(view.labels, GRID))
        advance(index + 1)
    return _Views(features, torch.stack(labels), held_out, inputs)


def _self_attention(
    backbone: Backbone,
    views: _Views,
    layers: LayerChoice,
    condition: Mapping[str, Tensor],
    timestep: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[Attention, ...]]:
    """Yield the self-attention of every layer, one held-out view at a time: queries and keys take memory."""
    spec = ExtractionSpec(layers, condition, timestep).to(backbone.device)
    for done, (encoded, noise) in enumerate(views.inputs.values()):
        yield backbone.extract(encoded, spec, noise).attention
        advance(VIEWS + done + 1)


def _project(maps: Tensor) -> Tensor:
    """Project very wide features [1, D, h, w] onto random directions, the same for all views."""
    width = maps.shape[1]
    if width <= WIDEST:
        return maps
    directions = torch.randn(width, DIRECTIONS, generator=torch.Generator().manual_seed(width)) * width**-0.5
    return torch.einsum("bdhw,de->behw", maps.float(), directions.to(maps.device))


def _pool(maps: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(maps, GRID) if maps.shape[-2] > GRID or maps.shape[-1] > GRID else maps


def _fit_and_hold_out(
    features: Mapping[str, Sequence[Tensor]], truth: Tensor, held_out: Sequence[int], on_evaluation: OnEvaluation
) -> tuple[float, Tensor]:
    """Fit these layers to the views that are not held out; return cross-entropy and maps [V, K, h, w] of the others."""
    fitted = [index for index in range(len(truth)) if index not in held_out]
    stacked = {name: torch.cat([maps[i] for i in fitted]).to(truth) for name, maps in features.items()}
    l2 = L2 * len(features)
    vectors = fit_vectors(stacked, truth[fitted], steps=FIT_STEPS, l2=l2, on_step=on_evaluation).vectors
    size = (truth.shape[-2], truth.shape[-1])
    scores = []
    for name, maps in features.items():
        others = torch.cat([maps[i] for i in held_out]).to(truth)
        scores.append(resize_maps(torch.einsum("bdhw,kd->bkhw", others, vectors[name]), size))
    logits = F.pad(torch.stack(scores).sum(0), (0, 0, 0, 0, 1, 0))
    loss = weighted_cross_entropy(logits, truth[list(held_out)], balanced_weights(truth[fitted]))
    return float(loss), logits.softmax(1)


def _choose_self(
    attentions: Iterable[tuple[Attention, ...]], names: Sequence[str], maps: Tensor, truth: Tensor
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Score self-attention layers by the IoU of half-propagated maps; choose the best few, if better than fewer.

    Args:
        attentions: of every view in turn, one for each of the names.
        names: of the layers.
        maps: part maps [V, K, h, w] to propagate.
        truth: soft labels [V, K, h, w].
    """
    size = (truth.shape[-2], truth.shape[-1])
    views = [
        torch.stack([resize_maps(propagate(layer, maps[v : v + 1]), size)[0] for layer in layers])
        for v, layers in enumerate(attentions)
    ]
    propagated = torch.stack(views, 1)  # [layers, views, K, h, w]
    scores = {name: _iou(0.5 * maps + 0.5 * one, truth) for name, one in zip(names, propagated, strict=True)}
    best_first = sorted(range(len(names)), key=lambda i: -scores[names[i]])[:MOST_SELF]
    together = [
        _iou(0.5 * maps + 0.5 * propagated[best_first[:n]].mean(0), truth) for n in range(1, len(best_first) + 1)
    ]
    count = max(range(len(together)), key=lambda n: together[n]) + 1
    kept = set(best_first[:count])
    return scores, tuple(name for i, name in enumerate(names) if i in kept)


def _iou(maps: Tensor, truth: Tensor) -> float:
    """Return the mean soft IoU of the parts; ignored pixels have no label and do not count."""
    predicted = F.one_hot(maps.argmax(1), maps.shape[1]).movedim(-1, 1).float()[:, 1:] * truth.sum(1, keepdim=True)
    actual = truth[:, 1:]
    inter, union = torch.minimum(predicted, actual).sum((0, 2, 3)), torch.maximum(predicted, actual).sum((0, 2, 3))
    return float((inter / union.clamp(min=1e-6)).mean())
