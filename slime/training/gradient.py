"""The "paper" trainer: the paper's objective, by gradients through the whole UNet."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..backbones.attention import cross_scores, differentiable_attention, propagate
from ..backbones.base import seeded_noise
from ..backbones.text import Capture, Context, TextConditioned, add_noise
from ..embeddings import PartEmbeddings
from ..errors import SlimeError
from ..examples import Example
from ..images import resize_maps
from ..reading.official import official_maps, token_maps
from ..settings import PaperSettings
from .losses import class_weights, guard_loss, weighted_cross_entropy
from .progress import OnStep, StepReport, encoding
from .template import paper_template
from .views import EncodedView, encode_all, encode_views, view_count

WAS_WEIGHT, GUARD_WEIGHT, GUIDANCE = 1.0, 0.005, 100.0  # the paper's alpha and beta, and the guidance in its "SD loss"
JUDGED_STEPS = 10  # rows are judged every so many steps
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
    unconditional: Tensor | None = None

    def outside_inference_mode(self) -> _PoolEntry:
        """Copies that autograd may save; inference tensors it refuses."""
        unconditional = None if self.unconditional is None else self.unconditional.clone()
        latents, noise, labels = self.latents.clone(), self.noise.clone(), self.labels.clone()
        return replace(self, latents=latents, noise=noise, labels=labels, unconditional=unconditional)


def train_by_gradient(
    denoiser: TextConditioned,
    examples: Sequence[Example],
    settings: PaperSettings,
    start: PartEmbeddings | None,
    validation: Sequence[Example],
    on_step: OnStep,
) -> PartEmbeddings:
    """The paper's training, section 3: the rows stand in the UNet's context, Adam minimises
    CE(cross-attention scores) + alpha MSE(WAS maps) + beta "SD loss".

    Beside the paper: views are drawn and encoded up front, each with its noise and timestep, and the unconditional
    prediction of a view is made once, without gradients, because it does not depend on the rows.

    Raises:
        SlimeError: the loss is not a number any more.
    """
    template = paper_template(denoiser, examples[0].names, settings)
    device, parts = denoiser.device, len(template.names)
    prompt = Context.of(template.condition or {}).to(device)
    # Rows start as the prompt's own words, "part" each (official src/slime.py).
    pool = _make_pool(denoiser, examples, settings, on_step)
    shown = validation or examples
    plain = encode_views(denoiser, shown, settings, range(len(shown)), plain=len(shown))
    judged = [_entry(denoiser, view, settings.seed, template.timestep) for view in plain]
    initial = prompt.rows[1 : parts + 1] if start is None else start.rows.mean(0)[:parts].to(device)
    with denoiser.differentiable(settings.checkpointing), differentiable_attention(), _frames_cleared():
        rows = initial.detach().clone().requires_grad_(True)
        base = prompt.rows.clone()
        pool = [entry.outside_inference_mode() for entry in pool]
        judged = [entry.outside_inference_mode() for entry in judged]
        optimizer = torch.optim.Adam([rows], lr=settings.learning_rate)
        best = _Best(rows)
        history: list[Tensor] = []
        terms: dict[str, float] = {}

        def embeddings() -> PartEmbeddings:
            losses = torch.stack(history).tolist() if history else []
            return replace(template, rows=best.rows[None].cpu(), losses=tuple(losses))

        def look(entry: _PoolEntry, capture: Capture) -> Tensor | None:
            noisy = add_noise(denoiser, entry.latents, entry.noise, entry.timestep)
            context = Context(torch.cat([base[:1], rows, base[parts + 1 :]]), prompt.pooled)
            return denoiser.predict_noise(noisy, entry.timestep, context, capture)

        def value(entry: _PoolEntry) -> Tensor:
            capture = Capture(template.layers, stop_early=True)
            look(entry, capture)
            return official_iou(capture, entry.labels)

        for step in range(1, settings.steps + 1):
            entry = pool[(step - 1) % len(pool)]
            capture = Capture(template.layers, maps=None if settings.checkpointing else partial(_maps, entry.labels))
            predicted = look(entry, capture)
            scores = mean_scores(capture, parts + 1, entry.labels)
            losses = loss_terms(scores, capture, entry.labels)
            if predicted is not None and entry.unconditional is not None:
                losses["guard"] = GUARD_WEIGHT * guard_loss(predicted, entry.unconditional, entry.noise, GUIDANCE)
            loss = torch.stack(list(losses.values())).sum()
            history.append(loss.detach())
            if step % JUDGED_STEPS == 0 or step == settings.steps:
                with torch.no_grad():
                    best.judge(rows, torch.stack([value(entry) for entry in judged]).mean())

            optimizer.zero_grad()
            (loss * GRADIENT_SCALE).backward()
            if rows.grad is not None:
                rows.grad /= GRADIENT_SCALE
            optimizer.step()

            preview = None
            if step % REPORTED_STEPS == 1 or step == settings.steps:
                terms = {"loss": float(history[-1])} | {name: float(value.detach()) for name, value in losses.items()}
                if not math.isfinite(terms["loss"]):
                    raise SlimeError(
                        "The loss is not a number any more: gradients overflow in this precision. Start "
                        "ComfyUI with --bf16-unet or --force-fp32, or use the preset instant."
                    )
                preview = (entry.picture(), scores.detach()[0].softmax(0).cpu())
            on_step(StepReport("train", step, settings.steps, terms, embeddings, preview))
    return embeddings()


@contextmanager
def _frames_cleared() -> Iterator[None]:
    """Clear the frames of an error's traceback: one that interrupts a checkpointed step would keep torch's hooks for
    saved tensors in place as long as somebody holds it, and the next training would save through them."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def mean_scores(capture: Capture, classes: int, labels: Tensor) -> Tensor:
    """Scores averaged over heads and layers on the labels' grid, [1, K, h, w]."""
    grid = (labels.shape[-2], labels.shape[-1])
    return torch.stack([resize_maps(cross_scores(a, classes), grid) for a in capture.cross.values()]).mean(0)


def loss_terms(scores: Tensor, capture: Capture, labels: Tensor) -> dict[str, Tensor]:
    """Terms that compare maps with labels: cross-entropy and MSE of the WAS maps (paper eq. 4).

    As in the official code (src/slime.py) the class weights are those of the view, and the MSE is summed over classes.
    """
    was = _was_maps(capture, F.softmax(scores, 1))
    error = (was * labels.sum(1, keepdim=True) - labels).square()  # ignored pixels have no label at all
    return {
        "ce": weighted_cross_entropy(scores, labels, class_weights(labels)),
        "was": WAS_WEIGHT * labels.shape[1] * error.mean(),
    }


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


class _Best:
    """The rows of the highest IoU on labelled images, as in the official code. Nothing here waits for the device."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.detach().clone()
        self._value = torch.full((), float("-inf"), device=rows.device)

    @torch.no_grad()
    def judge(self, rows: Tensor, value: Tensor) -> None:
        """Look at the rows that gave this value, before the optimiser changes them."""
        better = (value >= self._value) & rows.isfinite().all()
        self.rows = torch.where(better, rows.detach(), self.rows)
        self._value = torch.where(better, value, self._value)


def official_iou(capture: Capture, labels: Tensor) -> Tensor:
    """Mean IoU over the classes present, of the official read-out on one labelled image, without ignored pixels."""
    classes, grid = labels.shape[1], (labels.shape[-2], labels.shape[-1])
    maps = official_maps(token_maps(list(capture.cross.values()), classes, grid), list(capture.self_.values()))
    found = F.one_hot(maps[0].argmax(0), classes).movedim(-1, 0).bool() & (labels[0].sum(0) > 0.5)
    real = labels[0] > 0.5
    inter, union = (found & real).sum((1, 2)), (found | real).sum((1, 2))
    present = real.any(2).any(1)
    return (inter / union.clamp(min=1) * present).sum() / present.sum().clamp(min=1)


def _make_pool(
    denoiser: TextConditioned, examples: Sequence[Example], settings: PaperSettings, on_step: OnStep
) -> list[_PoolEntry]:
    """Views with their latents, noise, timesteps and unconditional predictions."""
    low, high = settings.noise_range
    empty = denoiser.encode_prompt("").to(denoiser.device)
    count = min(view_count(examples, settings), settings.steps)
    views = encode_all(denoiser, examples, settings, range(count), encoding(on_step))
    pool = []
    for index, view in enumerate(views):
        entry = _entry(denoiser, view, settings.seed + index, view.rng.randint(low, high))
        noisy = add_noise(denoiser, entry.latents, entry.noise, entry.timestep)
        with torch.no_grad():
            entry.unconditional = denoiser.predict_noise(noisy, entry.timestep, empty, None)
        pool.append(entry)
        on_step(StepReport("features", index + 1, len(views), {}, lambda: None))
    return pool


def _entry(denoiser: TextConditioned, view: EncodedView, seed: int, timestep: int) -> _PoolEntry:
    noise = seeded_noise(view.latents.shape, seed, denoiser.device)
    labels = view.labels[None].to(denoiser.device)
    return _PoolEntry(view.latents, noise, timestep, labels, view.picture)
