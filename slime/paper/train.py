"""The "paper" trainer: the paper's objective, minimised by gradients through the whole UNet."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.attention import cross_scores, differentiable_attention, propagate
from ..backbones.base import Backbone, choose_layers, seeded_noise
from ..backbones.text import Capture, Context, TextConditioned, add_noise, text_conditioned
from ..batches import OUT_OF_MEMORY
from ..embeddings import CONTEXT, PartEmbeddings
from ..errors import SlimeError
from ..examples import Example
from ..images import resize_maps
from ..settings import RESOLUTION, SHARED, PaperSettings
from ..training.losses import weighted_cross_entropy
from ..training.probe import with_probed_layers
from ..training.progress import OnStep, StepReport
from ..training.views import EncodedView, encode_views, view_count
from .decoder import PaperDecoder, official_maps, token_maps
from .losses import class_weights, sd_loss

WAS_WEIGHT, SD_WEIGHT, GUIDANCE = 1.0, 0.005, 100.0  # the paper's alpha and beta, and the guidance in its "SD loss"
NOISE_RANGE = (5, 100)  # timesteps drawn, both included
EVALUATION_STEPS = 10  # tokens are evaluated every so many steps
GRADIENT_SCALE = 1024.0  # keeps small gradients of half-precision UNets from vanishing
REPORT_STEPS = 10  # the host waits for the device only so often

logger = logging.getLogger(__name__)

_NO_MEMORY = (
    "Out of GPU memory while training through the model, even with checkpointing. Use the preset instant, which needs "
    "no gradients, close other programs, or use a smaller model."
)


@dataclass
class _PoolEntry:
    """An encoded view with its noise, its timestep and, for the SD loss, its unconditional prediction."""

    latents: Tensor
    noise: Tensor
    timestep: int
    labels: Tensor
    image: Callable[[], Tensor]
    unconditional: Tensor | None = None

    def outside_inference_mode(self) -> _PoolEntry:
        """Return copies that autograd may save; it refuses inference tensors."""
        unconditional = None if self.unconditional is None else self.unconditional.clone()
        latents, noise, labels = self.latents.clone(), self.noise.clone(), self.labels.clone()
        return replace(self, latents=latents, noise=noise, labels=labels, unconditional=unconditional)


def train_paper(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: PaperSettings,
    init: PartEmbeddings | None,
    validation: Sequence[Example],
    on_step: OnStep,
) -> PartEmbeddings:
    """Train as :func:`train_by_gradient`; out of memory, train again with checkpointing.

    Raises:
        SlimeError: a backbone without text, a loss that is not finite, or too little memory for gradients.
    """
    denoiser = text_conditioned(backbone, "The preset paper")
    prompt = settings.prompt or part_prompt(examples[0].names)
    settings = with_probed_layers(backbone, examples, settings, prompt, on_step)
    try:
        return train_by_gradient(denoiser, examples, settings, init, validation, on_step)
    except OUT_OF_MEMORY:
        if settings.checkpointing:
            raise SlimeError(_NO_MEMORY) from None
    # Outside the handler, whose traceback would keep the tensors of the failed step alive.
    logger.warning("SLiMe: out of memory; training again with checkpointing, which needs less memory and more time.")
    torch.cuda.empty_cache()
    lighter = replace(settings, checkpointing=True)
    try:
        return train_by_gradient(denoiser, examples, lighter, init, validation, on_step)
    except OUT_OF_MEMORY as error:
        raise SlimeError(_NO_MEMORY) from error


def part_prompt(names: Sequence[str]) -> str:
    """Return the paper's text: the word "part" for the background and for every part."""
    return " ".join(["part"] * (len(names) + 1))


def _template(backbone: Backbone, names: Sequence[str], settings: PaperSettings) -> PartEmbeddings:
    """Return the embeddings without what is learned."""
    info = backbone.info
    prompt = settings.prompt or part_prompt(names)
    condition = backbone.condition(prompt)
    context = condition["context"]
    if len(context) <= len(names):
        raise SlimeError(f"The prompt has {len(context)} tokens, too few for {len(names)} parts. Use a longer prompt.")
    return PartEmbeddings(
        names=tuple(names),
        vectors={SHARED: torch.zeros(len(names), context.shape[-1])},
        condition=condition,
        prompt=prompt,
        backbone=info.id,
        layers=choose_layers(backbone, settings.read_layers, settings.propagate_layers),
        timestep=info.timestep,
        side=info.side,
        mode=CONTEXT,
        grouping=RESOLUTION,
        decoder=PaperDecoder(),
        settings={"preset": "paper"} | asdict(settings),
    )


def train_by_gradient(
    denoiser: TextConditioned,
    examples: Sequence[Example],
    settings: PaperSettings,
    init: PartEmbeddings | None,
    validation: Sequence[Example],
    on_step: OnStep,
) -> PartEmbeddings:
    """Learn token embeddings as in section 3 of the paper: Adam minimises
    CE(cross-attention scores) + alpha MSE(WAS maps) + beta "SD loss".

    Unlike the paper, views are drawn and encoded up front, each with its noise and timestep, and the unconditional
    prediction of a view is computed once, without gradients, because it does not depend on the tokens.

    Raises:
        SlimeError: the loss is not finite.
    """
    template = _template(denoiser, examples[0].names, settings)
    context, parts = Context.of(template.condition or {}).to(denoiser.device), len(template.names)
    pool = _make_pool(denoiser, examples, settings, on_step)
    shown = validation or examples
    plain = encode_views(denoiser, shown, settings, range(len(shown)), plain=len(shown))
    evaluated = [_entry(denoiser, view, settings.seed, template.timestep) for view in plain]
    # Tokens start as the prompt's own words, "part" each (official src/slime.py).
    initial = context.tokens[1 : parts + 1] if init is None else init.vectors[SHARED][:parts].to(denoiser.device)
    with denoiser.differentiable(settings.checkpointing), differentiable_attention(), _frames_cleared():
        tokens = initial.detach().clone().requires_grad_(True)
        model = _Model(denoiser, context, template, tokens)
        pool = [entry.outside_inference_mode() for entry in pool]
        evaluated = [entry.outside_inference_mode() for entry in evaluated]
        optimizer = torch.optim.Adam([tokens], lr=settings.learning_rate)
        best = _Best(tokens)
        history: list[Tensor] = []
        terms: dict[str, float] = {}

        def embeddings() -> PartEmbeddings:
            finite = tuple(filter(math.isfinite, torch.stack(history).tolist() if history else ()))  # files hold no NaN
            return replace(template, vectors={SHARED: best.tokens.cpu()}, losses=finite)

        for step in range(1, settings.steps + 1):
            entry = pool[(step - 1) % len(pool)]
            scores, losses = model.losses(entry, settings.checkpointing)
            loss = torch.stack(list(losses.values())).sum()
            history.append(loss.detach())
            if step % EVALUATION_STEPS == 0 or step == settings.steps:
                with torch.no_grad():
                    best.update(tokens, torch.stack([model.iou(entry) for entry in evaluated]).mean())

            optimizer.zero_grad()
            (loss * GRADIENT_SCALE).backward()
            if tokens.grad is not None:
                tokens.grad /= GRADIENT_SCALE
            optimizer.step()

            preview = None
            if step % REPORT_STEPS == 1 or step == settings.steps:
                terms = _finite_terms(history[-1], losses)
                preview = (entry.image(), scores.detach()[0].softmax(0).cpu())
            on_step(StepReport("train", step, settings.steps, terms, embeddings, preview))
    return embeddings()


def _finite_terms(loss: Tensor, losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the loss and its terms by name; raise SlimeError where the loss is no number."""
    value = float(loss)
    if not math.isfinite(value):
        raise SlimeError(
            "The loss became NaN or infinite: gradients overflow in this precision. Start ComfyUI with "
            "--bf16-unet or --force-fp32, or use the preset instant."
        )
    return {"loss": value} | {name: float(term.detach()) for name, term in losses.items()}


class _Model:
    """The UNet with the learned tokens in its context."""

    def __init__(self, denoiser: TextConditioned, context: Context, template: PartEmbeddings, tokens: Tensor) -> None:
        self._denoiser, self._layers, self._tokens = denoiser, template.layers, tokens
        self._base, self._pooled, self._classes = context.tokens.clone(), context.pooled, len(tokens) + 1

    def predict(self, entry: _PoolEntry, capture: Capture) -> Tensor | None:
        """Run one pass over a noised view."""
        noisy = add_noise(self._denoiser, entry.latents, entry.noise, entry.timestep)
        tokens = torch.cat([self._base[:1], self._tokens, self._base[self._classes :]])
        return self._denoiser.predict_noise(noisy, entry.timestep, Context(tokens, self._pooled), capture)

    def losses(self, entry: _PoolEntry, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return scores [1, K, h, w] and the loss terms by name."""
        capture = Capture(self._layers, make_maps=None if checkpointing else partial(_maps, entry.labels))
        predicted = self.predict(entry, capture)
        scores = mean_scores(capture, self._classes, entry.labels)
        losses = loss_terms(scores, capture, entry.labels)
        if predicted is not None and entry.unconditional is not None:
            losses["sd"] = SD_WEIGHT * sd_loss(predicted, entry.unconditional, entry.noise, GUIDANCE)
        return scores, losses

    def iou(self, entry: _PoolEntry) -> Tensor:
        """Return the IoU on a labelled image."""
        capture = Capture(self._layers, stop_early=True)
        self.predict(entry, capture)
        return official_iou(capture, entry.labels)


@contextmanager
def _frames_cleared() -> Iterator[None]:
    """Clear the frames of an error's traceback.

    An error that interrupts a checkpointed step would keep torch's hooks for saved tensors installed as long as the
    error is referenced, and the next training would save through them.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def mean_scores(capture: Capture, classes: int, labels: Tensor) -> Tensor:
    """Return scores averaged over heads and layers on the labels' grid, [1, K, h, w]."""
    grid = (labels.shape[-2], labels.shape[-1])
    return torch.stack([resize_maps(cross_scores(a, classes), grid) for a in capture.cross.values()]).mean(0)


def loss_terms(scores: Tensor, capture: Capture, labels: Tensor) -> dict[str, Tensor]:
    """Return the terms that compare maps with labels: cross-entropy and MSE of the WAS maps (paper eq. 4).

    As in the official code (src/slime.py) the class weights are those of the view, and the MSE is summed over classes.
    """
    was = _was_maps(capture, F.softmax(scores, 1))
    error = (was * labels.sum(1, keepdim=True) - labels).square()  # ignored pixels have no label
    return {
        "ce": weighted_cross_entropy(scores, labels, class_weights(labels)),
        "was": WAS_WEIGHT * labels.shape[1] * error.mean(),
    }


def _maps(labels: Tensor, capture: Capture) -> Tensor:
    """Return maps to propagate in the pass itself, from the cross-attention layers recorded so far."""
    return F.softmax(mean_scores(capture, labels.shape[1], labels), 1)


def _was_maps(capture: Capture, maps: Tensor) -> Tensor:
    """Return the WAS maps, of which the pass itself may have computed some layers'."""
    size = (maps.shape[-2], maps.shape[-1])
    layers = [
        capture.propagated[key] if key in capture.propagated else propagate(attention, maps)
        for key, attention in capture.self_.items()
    ]
    return torch.stack([resize_maps(layer, size) for layer in layers]).mean(0)


class _Best:
    """The tokens with the highest IoU on labelled images, as in the official code, without a host sync."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.detach().clone()
        self._iou = torch.full((), float("-inf"), device=tokens.device)

    @torch.no_grad()
    def update(self, tokens: Tensor, iou: Tensor) -> None:
        """Take the tokens that have this IoU, before the optimiser changes them, if it is the best."""
        better = (iou >= self._iou) & tokens.isfinite().all()
        self.tokens = torch.where(better, tokens.detach(), self.tokens)
        self._iou = torch.where(better, iou, self._iou)


def official_iou(capture: Capture, labels: Tensor) -> Tensor:
    """Return the mean IoU over the classes present, of the official decoder on one image, without ignored pixels."""
    classes, grid = labels.shape[1], (labels.shape[-2], labels.shape[-1])
    maps = official_maps(token_maps(list(capture.cross.values()), classes, grid), list(capture.self_.values()))
    predicted = F.one_hot(maps[0].argmax(0), classes).movedim(-1, 0).bool() & (labels[0].sum(0) > 0.5)
    actual = labels[0] > 0.5
    inter, union = (predicted & actual).sum((1, 2)), (predicted | actual).sum((1, 2))
    present = actual.any(2).any(1)
    return (inter / union.clamp(min=1) * present).sum() / present.sum().clamp(min=1)


def _make_pool(
    denoiser: TextConditioned, examples: Sequence[Example], settings: PaperSettings, on_step: OnStep
) -> list[_PoolEntry]:
    """Encode the views, and draw their noise and timesteps; predict them without condition.

    All are encoded before any pass: on a small card the VAE and the UNet take turns in memory.
    """
    low, high = NOISE_RANGE
    empty = denoiser.encode_prompt("").to(denoiser.device)
    count = min(view_count(examples, settings), settings.steps)
    views: list[EncodedView] = []
    for view in encode_views(denoiser, examples, settings, range(count)):
        views.append(view)
        preview = (view.image(), view.labels) if len(views) == 1 else None
        on_step(StepReport("views", len(views), count, preview=preview))
    pool = []
    for index, view in enumerate(views):
        entry = _entry(denoiser, view, settings.seed + index, view.rng.randint(low, high))
        noisy = add_noise(denoiser, entry.latents, entry.noise, entry.timestep)
        with torch.no_grad():
            entry.unconditional = denoiser.predict_noise(noisy, entry.timestep, empty, None)
        pool.append(entry)
        on_step(StepReport("features", index + 1, len(views)))
    return pool


def _entry(denoiser: TextConditioned, view: EncodedView, seed: int, timestep: int) -> _PoolEntry:
    noise = seeded_noise(view.latents.shape, seed, denoiser.device)
    labels = view.labels[None].to(denoiser.device)
    return _PoolEntry(view.latents, noise, timestep, labels, view.image)
