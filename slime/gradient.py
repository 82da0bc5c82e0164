"""The "thorough" and "paper" trainers: the paper's objective, by gradients through the whole UNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import cross_scores, propagate, resize_maps
from .denoiser import Capture, Context, Denoiser, add_noise, seeded_noise
from .embeddings import PartEmbeddings
from .examples import Example
from .losses import class_weights, dice_loss, guard_loss, weighted_cross_entropy
from .official import official_maps, token_maps
from .recipe import OnStep, StepReport, make_template
from .settings import TrainSettings
from .views import EncodedView, encode_views, view_count

JUDGED_STEPS = 10  # timesteps make single losses noisy: rows are judged by the mean over so many
HELD_CROPS = 4  # of an example, never trained on, where rows are kept by them
GRADIENT_SCALE = 1024.0  # keeps small gradients of half-precision UNets from vanishing
REPORTED_STEPS = 10  # the host waits for the device only so often


@dataclass
class _PoolEntry:
    """One augmented view, encoded once, with its noise, its timestep and, for the guard, unconditional prediction."""

    latents: Tensor
    noise: Tensor
    timestep: int
    labels: Tensor
    picture: Callable[[], Tensor]
    size: tuple[int, int]
    unconditional: Tensor | None = None

    def outside_inference_mode(self) -> _PoolEntry:
        """Copies that autograd may save; inference tensors it refuses."""
        unconditional = None if self.unconditional is None else self.unconditional.clone()
        latents, noise, labels = self.latents.clone(), self.noise.clone(), self.labels.clone()
        return replace(self, latents=latents, noise=noise, labels=labels, unconditional=unconditional)


def train_through_unet(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    """The paper's training, section 3: the rows stand in the UNet's context, Adam minimises
    CE(cross-attention scores) + alpha MSE(WAS maps) + beta "SD loss".

    Beside the paper: views are drawn and encoded up front, each with its noise and timestep, and the unconditional
    prediction of a view is made once, without gradients, because it does not depend on the rows.
    """
    template = make_template(denoiser, examples, settings, "context")
    device, parts = denoiser.device, len(template.names)
    if template.context is None:
        raise ValueError("a template for training has its context")
    # Rows start as the prompt's own words, "part" each (official src/slime.py).
    base = template.context.float().to(device)
    empty = denoiser.encode_prompt("")
    pool = _make_pool(denoiser, examples, settings, template, empty, on_step)
    judged = _make_judged(denoiser, examples, settings, template) if settings.keep in ("iou", "crop") else []
    initial = base[1 : parts + 1] if start is None else start.rows.mean(0)[:parts].to(device)
    with denoiser.differentiable(settings.checkpointing):
        initial = initial.detach().clone()
        rows = initial.clone().requires_grad_(True)
        base = base.clone()
        pool = [entry.outside_inference_mode() for entry in pool]
        judged = [entry.outside_inference_mode() for entry in judged]
        optimizer = torch.optim.Adam([rows], lr=settings.learning_rate)
        best = _Best(rows, settings)
        history: list[Tensor] = []
        terms: dict[str, float] = {}

        def embeddings() -> PartEmbeddings:
            losses = torch.stack(history).tolist() if history else []
            return replace(template, rows=best.rows[None].cpu(), losses=tuple(losses))

        def look(entry: _PoolEntry, capture: Capture) -> Tensor | None:
            noisy = add_noise(denoiser, entry.latents, entry.noise, entry.timestep)
            context = Context(torch.cat([base[:1], rows, base[parts + 1 :]]), template.pooled)
            return denoiser.predict_noise(noisy, entry.timestep, context, capture, entry.size)

        def value(entry: _PoolEntry) -> Tensor:
            capture = Capture(template.layers, stop_early=True)
            look(entry, capture)
            return _value(capture, entry.labels, settings)

        for step in range(1, settings.steps + 1):
            entry = pool[(step - 1) % len(pool)]
            capture = Capture(template.layers, maps=None if settings.checkpointing else partial(_maps, entry.labels))
            predicted = look(entry, capture)
            scores = mean_scores(capture, parts + 1, entry.labels)
            losses = loss_terms(scores, capture, entry.labels, settings)
            if settings.guard_weight and predicted is not None and entry.unconditional is not None:
                guard = guard_loss(predicted, entry.unconditional, entry.noise, settings.guidance)
                losses["guard"] = settings.guard_weight * guard
            if settings.l2:
                losses["l2"] = settings.l2 * (rows - initial).square().sum(-1).mean()
            loss = torch.stack(list(losses.values())).sum()
            history.append(loss.detach())
            judgement = None
            if judged and (step % JUDGED_STEPS == 0 or step == settings.steps):
                with torch.no_grad():
                    judgement = torch.stack([value(plain) for plain in judged]).mean()
            best.judge(rows, loss.detach(), judgement)

            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(settings.schedule, step, settings.steps)
            optimizer.zero_grad()
            (loss * GRADIENT_SCALE).backward()
            if rows.grad is not None:
                rows.grad /= GRADIENT_SCALE
            optimizer.step()

            preview = None
            if step % REPORTED_STEPS == 1 or step == settings.steps:
                terms = {"loss": float(history[-1])} | {name: float(value.detach()) for name, value in losses.items()}
                preview = (entry.picture(), scores.detach()[0].softmax(0).cpu())
            on_step(StepReport("train", step, settings.steps, terms, embeddings, preview))
    return embeddings()


def mean_scores(capture: Capture, classes: int, labels: Tensor) -> Tensor:
    """Scores averaged over heads and layers on the labels' grid, [1, K, h, w]."""
    grid = (labels.shape[-2], labels.shape[-1])
    return torch.stack([resize_maps(cross_scores(a, classes), grid) for a in capture.cross.values()]).mean(0)


def loss_terms(scores: Tensor, capture: Capture, labels: Tensor, settings: TrainSettings) -> dict[str, Tensor]:
    """Terms that compare maps with labels: cross-entropy, MSE of the WAS maps (paper eq. 4), Dice where asked for.

    As in the official code (src/slime.py) the class weights are those of the view, and the MSE is summed over classes.
    """
    weights = class_weights(labels, settings.class_weights)
    losses = {"ce": weighted_cross_entropy(scores, labels, weights, settings.focal)}
    if settings.dice:
        losses["dice"] = settings.dice * dice_loss(scores, labels)
    if settings.was_weight:
        was = _was_maps(capture, F.softmax(scores, 1))
        error = (was * labels.sum(1, keepdim=True) - labels).square()  # ignored pixels have no label at all
        losses["was"] = settings.was_weight * labels.shape[1] * error.mean()
    return losses


def _maps(labels: Tensor, capture: Capture) -> Tensor:
    """Maps to be propagated in the pass itself, from cross-attention layers that have come."""
    return F.softmax(mean_scores(capture, labels.shape[1], labels), 1)


def _was_maps(capture: Capture, maps: Tensor) -> Tensor:
    """WAS of the maps, of which the pass itself may have made some layers'."""
    size = (maps.shape[-2], maps.shape[-1])
    layers = [
        capture.propagated[key] if key in capture.propagated else propagate(attention, maps)
        for key, attention in capture.self_.items()
    ]
    return torch.stack([resize_maps(layer, size) for layer in layers]).mean(0)


def schedule(name: str, step: int, steps: int) -> float:
    """Factor of the learning rate at a step, 1-based: "constant", or "cosine" down to zero."""
    return 1.0 if name == "constant" else 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


class _Best:
    """The best rows so far: by the mean loss of the last steps, by a value (the IoU on the examples, as the official
    code, or the loss on held-out crops), or the last.

    Nothing here waits for the device.
    """

    def __init__(self, rows: Tensor, settings: TrainSettings) -> None:
        self.keep, self.ema = settings.keep, settings.ema
        self.rows = rows.detach().clone()
        self._average = self.rows
        self._losses: list[Tensor] = []
        self._value = torch.full((), float("-inf"), device=rows.device)

    @torch.no_grad()
    def judge(self, rows: Tensor, loss: Tensor, value: Tensor | None) -> None:
        """Look at the rows that gave this loss, and every few steps this value, before the optimiser changes them."""
        self._average = self.ema * self._average + (1 - self.ema) * rows.detach()
        self._losses = [*self._losses[1 - JUDGED_STEPS :], loss]
        if self.keep == "last" or (self.keep == "loss" and len(self._losses) < JUDGED_STEPS):
            self.rows = self._average
            return
        if self.keep == "loss":
            value = -torch.stack(self._losses).mean()
        if value is None:
            return
        better = value >= self._value
        self.rows = torch.where(better, self._average, self.rows)
        self._value = torch.where(better, value, self._value)


def _value(capture: Capture, labels: Tensor, settings: TrainSettings) -> Tensor:
    """How good the rows are on one labelled image."""
    if settings.keep == "iou":
        return official_iou(capture, labels)
    terms = loss_terms(mean_scores(capture, labels.shape[1], labels), capture, labels, settings)
    return -torch.stack(list(terms.values())).sum()


def official_iou(capture: Capture, labels: Tensor) -> Tensor:
    """Mean IoU over the classes present, of the official read-out on one labelled image, without ignored pixels."""
    classes, grid = labels.shape[1], (labels.shape[-2], labels.shape[-1])
    maps = official_maps(token_maps(list(capture.cross.values()), classes, grid), list(capture.self_.values()))
    found = F.one_hot(maps[0].argmax(0), classes).movedim(-1, 0).bool() & (labels[0].sum(0) > 0.5)
    real = labels[0] > 0.5
    inter, union = (found & real).sum((1, 2)), (found | real).sum((1, 2))
    present = real.any(2).any(1)
    return (inter / union.clamp(min=1) * present).sum() / present.sum().clamp(min=1)


def _make_judged(
    denoiser: Denoiser, examples: Sequence[Example], settings: TrainSettings, template: PartEmbeddings
) -> list[_PoolEntry]:
    """The examples as they are, or crops held out, with the noise and timestep of inference."""
    count, plain = len(examples), len(examples)
    if settings.keep == "crop":
        settings, count, plain = replace(settings, seed=settings.seed + 1_000_003), HELD_CROPS * count, 0
    views = encode_views(denoiser, examples, settings, template.working_side, count, plain=plain)
    return [_entry(denoiser, view, settings.seed, template.timestep) for view in views]


def _make_pool(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings,
    template: PartEmbeddings,
    empty: Context,
    on_step: OnStep,
) -> list[_PoolEntry]:
    """Views with their latents, noise, timesteps and unconditional predictions."""
    low, high = settings.noise_range
    count = min(view_count(examples, settings), settings.steps)
    # All encoding comes first: on a small card VAE and UNet take turns in memory.
    views = list(encode_views(denoiser, examples, settings, template.working_side, count))
    frozen = empty.to(denoiser.device)
    pool = []
    for index, view in enumerate(views):
        entry = _entry(denoiser, view, settings.seed + index, view.rng.randint(low, high))
        if settings.guard_weight:
            noisy = add_noise(denoiser, entry.latents, entry.noise, entry.timestep)
            with torch.no_grad():
                prediction = denoiser.predict_noise(noisy, entry.timestep, frozen, None, entry.size)
            entry.unconditional = prediction
        pool.append(entry)
        on_step(StepReport("features", index + 1, count, {}, lambda: None))
    return pool


def _entry(denoiser: Denoiser, view: EncodedView, seed: int, timestep: int) -> _PoolEntry:
    noise = seeded_noise(view.latents.shape, seed, denoiser.device)
    labels = view.labels[None].to(denoiser.device)
    return _PoolEntry(view.latents, noise, timestep, labels, view.picture, view.size)
