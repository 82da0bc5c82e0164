"""Learn part embeddings: ``train`` is the one call; "instant" fits cached features, the others go through the UNet."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import cross_scores, resize_maps, was_maps
from .augment import augmented_view, resize_image, soft_labels, working_size
from .batches import in_batches
from .denoiser import Capture, Context, Denoiser, add_noise, seeded_noise
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import Example
from .features import FeaturePlan, Features, extract_features, key_projections
from .fit import fit_rows
from .layers import LayerChoice, LayerKey, choose_layers
from .losses import class_weights, guard_loss, weighted_cross_entropy
from .read import ReadOut
from .settings import TrainSettings, preset

JUDGED_STEPS = 10
VIEW_BATCH = 4


@dataclass(frozen=True)
class StepReport:
    """Progress of training.

    Attributes:
        stage: "features" (UNet passes before an instant fit), "fit" or "train".
        step, steps: 1-based.
        losses: terms by name; empty for "features".
        embeddings: gives the best embeddings so far, or None when there are none.
        preview: image [h, w, 3] and label map [h', w'] of the current segmentation, every few steps, else None.
    """

    stage: str
    step: int
    steps: int
    losses: dict[str, float]
    embeddings: Callable[[], PartEmbeddings | None]
    preview: tuple[Tensor, Tensor] | None = None


OnStep = Callable[[StepReport], None]


def train(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings | None = None,
    *,
    start: PartEmbeddings | None = None,
    on_step: OnStep | None = None,
) -> PartEmbeddings:
    """Learn one embedding row a part from one or a few labelled images.

    Args:
        denoiser: the diffusion model.
        examples: all with the same part names.
        settings: default is the "instant" preset with the model family's adjustments.
        start: embeddings of the same parts to continue from.
        on_step: progress; what it raises ends the training.

    Raises:
        SlimeError: no examples, differing names, or ``start`` of other parts or another model.
    """
    settings = settings or preset("instant", denoiser.family)
    if not examples:
        raise SlimeError("No example given: connect at least one SLiMe Example.")
    names = examples[0].names
    if any(example.names != names for example in examples):
        raise SlimeError(f"All examples must name the same parts; got {sorted({e.names for e in examples})}.")
    if start is not None:
        start.check_model(denoiser.family)
        if start.names != names:
            raise SlimeError(f"The embeddings to start from name {start.names}, the examples {names}.")
        start = start.with_context(denoiser)
    on_step = on_step or (lambda report: None)
    if settings.preset == "instant":
        return _fit(denoiser, examples, settings, start, on_step)
    if settings.preset == "thorough" and start is None:
        start = _fit(denoiser, examples, _instant_for_thorough(settings, denoiser), None, on_step)
    return _train_through_unet(denoiser, examples, settings, start, on_step)


# ------------------------------------------------------------------------------------------------------------- instant


def _fit(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    template = _template(denoiser, examples, settings, "keys")
    plan = template.plan()
    first_image: Tensor | None = None
    # All encoding comes first: on a small card VAE and UNet take turns in memory.
    views = []
    for index, (example, rng) in enumerate(_views(examples, settings)):
        size = working_size(example.labels.shape[0], example.labels.shape[1], template.working_side)
        image, label = _make_view(example, settings, rng, size, (size[0] // 8, size[1] // 8), index < len(examples))
        views.append(_EncodedView(denoiser.encode_images(image[None].to(denoiser.device)), label, size))
        first_image = image if first_image is None else first_image
    scores: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for features in _view_features(denoiser, views, plan, settings.seed):
        # Examples of another aspect come to the first one's grid: the loss looks at single positions only.
        like = [(maps.shape[-2], maps.shape[-1]) for maps in (scores[0] if scores else features.scores)]
        grid = (labels[0].shape[-2], labels[0].shape[-1]) if labels else features.grid
        scores.append([resize_maps(maps, size) for maps, size in zip(features.scores, like, strict=True)])
        seen = views[len(labels) : len(labels) + len(features.scores[0])]
        labels += [resize_labels(view.labels, grid) for view in seen]
        on_step(StepReport("features", len(labels), len(views), {}, lambda: None))
    stacked = [torch.cat(group) for group in zip(*scores, strict=True)]

    def report(step: int, losses: dict[str, float], rows: Callable[[], Tensor], logits: Tensor) -> None:
        preview = (first_image, logits.argmax(0).cpu()) if step % 5 == 1 and first_image is not None else None
        on_step(
            StepReport(
                "fit",
                min(step, settings.steps),
                settings.steps,
                losses,
                lambda: replace(template, rows=rows().cpu()),
                preview,
            )
        )

    result = fit_rows(
        stacked,
        torch.stack(labels).to(stacked[0]),
        template.background.to(stacked[0]),
        steps=settings.steps,
        l2=settings.l2,
        weight_exponent=settings.class_weights,
        separate_rows=settings.row_groups != "shared",
        start=_starting_rows(start, settings.row_groups, len(stacked)),
        on_step=report,
    )
    return replace(template, rows=result.rows.cpu(), losses=tuple(result.losses))


class _EncodedView(NamedTuple):
    """One augmented view: latents [1, C, h, w], label maps [K, h, w] and its size in pixels."""

    latents: Tensor
    labels: Tensor
    size: tuple[int, int]


def _view_features(
    denoiser: Denoiser, views: Sequence[_EncodedView], plan: FeaturePlan, seed: int
) -> Iterator[Features]:
    """Features of the views in order, in batches of neighbours of one size; every view has noise of its own."""
    projections = key_projections(denoiser, plan.layers, plan.context.pooled)
    first = 0
    for size, neighbours in groupby(views, key=lambda view: view.size):
        latents = torch.cat([view.latents for view in neighbours])
        seeds = range(seed + first, seed + first + len(latents))
        noise = torch.cat([seeded_noise(latents[:1].shape, one, latents.device) for one in seeds])
        look = partial(_look, denoiser, latents, noise, plan, size, projections)
        yield from in_batches(len(latents), VIEW_BATCH, look)
        first += len(latents)


def _look(
    denoiser: Denoiser,
    latents: Tensor,
    noise: Tensor,
    plan: FeaturePlan,
    size: tuple[int, int],
    projections: Mapping[LayerKey, Tensor],
    part: slice,
) -> Features:
    return extract_features(denoiser, latents[part], plan, noise[part], size, projections)


def _starting_rows(start: PartEmbeddings | None, row_groups: str, groups: int) -> Tensor | None:
    """Rows to continue an instant fit from; those of the paper's way do not fit, other groupings give their mean."""
    if start is None or start.mode != "keys":
        return None
    return start.rows if len(start.rows) in (1, groups if row_groups != "shared" else 1) else start.rows.mean(0)[None]


def _instant_for_thorough(settings: TrainSettings, denoiser: Denoiser) -> TrainSettings:
    """One shared row a part, since the rows enter the UNet's single context afterwards."""
    return preset(
        "instant",
        denoiser.family,
        row_groups="shared",
        seed=settings.seed,
        flip=settings.flip,
        prompt=settings.prompt,
        cross_layers=settings.cross_layers,
        self_layers=settings.self_layers,
    )


# ------------------------------------------------------------------------------------------------------- full gradient


@dataclass
class _PoolEntry:
    """One augmented view, encoded once, with its noise, its timestep and, once needed, its unconditional prediction."""

    latents: Tensor
    noise: Tensor
    timestep: int
    labels: Tensor
    image: Tensor
    size: tuple[int, int]
    unconditional: Tensor | None = None

    def outside_inference_mode(self) -> _PoolEntry:
        """Copies that autograd may save; inference tensors it refuses."""
        return replace(self, latents=self.latents.clone(), noise=self.noise.clone(), labels=self.labels.clone())


def _train_through_unet(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    template = _template(denoiser, examples, settings, "context")
    device, parts = denoiser.device, len(template.names)
    base = template.base_context().rows.to(device)
    pooled = template.pooled
    empty = denoiser.encode_prompt("")
    pool = _make_pool(denoiser, examples, settings, template)
    weights = class_weights(torch.cat([entry.labels for entry in pool]), settings.class_weights)
    initial = base[1 : parts + 1] if start is None else start.rows.mean(0).to(device)
    with denoiser.differentiable(settings.checkpointing):
        rows = initial.detach().clone().requires_grad_(True)
        base, frozen = base.clone(), Context(empty.rows.to(device).clone(), empty.pooled)
        pool = [entry.outside_inference_mode() for entry in pool]
        optimizer = torch.optim.Adam([rows], lr=settings.learning_rate)
        history: list[float] = []
        best_loss, best_rows = float("inf"), rows.detach().clone()

        def embeddings() -> PartEmbeddings:
            return replace(template, rows=best_rows[None].cpu(), losses=tuple(history))

        for step in range(1, settings.steps + 1):
            entry = pool[(step - 1) % len(pool)]
            noisy = add_noise(denoiser, entry.latents, entry.noise, entry.timestep)
            if entry.unconditional is None and settings.guard_weight:
                with torch.no_grad():
                    prediction = denoiser.predict_noise(noisy, entry.timestep, frozen, None, entry.size)
                entry.unconditional = prediction

            context = Context(torch.cat([base[:1], rows, base[parts + 1 :]]), pooled)
            capture = Capture(template.layers)
            noise = denoiser.predict_noise(noisy, entry.timestep, context, capture, entry.size)

            grid = (entry.labels.shape[-2], entry.labels.shape[-1])
            layers = [resize_maps(cross_scores(a, parts + 1), grid) for a in capture.cross.values()]
            scores = torch.stack(layers).mean(0)
            losses = {"ce": weighted_cross_entropy(scores, entry.labels, weights)}
            if settings.was_weight:
                was = was_maps(list(capture.self_.values()), F.softmax(scores, 1))
                losses["was"] = settings.was_weight * F.mse_loss(was, entry.labels)
            if settings.guard_weight and noise is not None and entry.unconditional is not None:
                losses["guard"] = settings.guard_weight * guard_loss(noise, entry.unconditional, entry.noise)
            loss = torch.stack(list(losses.values())).sum()

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            history.append(float(loss.detach()))
            # Timesteps make single losses noisy: judge rows by the mean over the last steps.
            recent = sum(history[-JUDGED_STEPS:]) / len(history[-JUDGED_STEPS:])
            if recent <= best_loss or step <= JUDGED_STEPS:
                best_loss, best_rows = recent, rows.detach().clone()
            preview = (entry.image, scores.detach()[0].argmax(0).cpu()) if step % 10 == 1 else None
            terms = {name: float(value.detach()) for name, value in losses.items()}
            on_step(StepReport("train", step, settings.steps, {"loss": history[-1]} | terms, embeddings, preview))
    return embeddings()


def _make_pool(
    denoiser: Denoiser, examples: Sequence[Example], settings: TrainSettings, template: PartEmbeddings
) -> list[_PoolEntry]:
    """Views with their latents, noise and timesteps, all drawn up front."""
    pool = []
    low, high = settings.noise_range
    for index, (example, rng) in enumerate(_views(examples, settings)[: settings.steps]):
        size = working_size(example.labels.shape[0], example.labels.shape[1], template.working_side)
        grid = (size[0] // 8, size[1] // 8)
        image, labels = _make_view(example, settings, rng, size, grid, plain=False)
        latents = denoiser.encode_images(image[None].to(denoiser.device))
        noise = seeded_noise(latents.shape, settings.seed + index, denoiser.device)
        pool.append(_PoolEntry(latents, noise, rng.randint(low, high), labels[None].to(denoiser.device), image, size))
    return pool


# -------------------------------------------------------------------------------------------------------------- shared


def _template(denoiser: Denoiser, examples: Sequence[Example], settings: TrainSettings, mode: str) -> PartEmbeddings:
    """Embeddings with everything but the learned rows."""
    family, names = denoiser.family, examples[0].names
    prompt = settings.prompt or (" ".join(["part"] * (len(names) + 1)) if mode == "context" else "")
    context = denoiser.encode_prompt(prompt)
    if len(context.rows) <= len(names):
        raise SlimeError(f"The prompt gives {len(context.rows)} text rows, too few for {len(names)} parts.")
    if context.rows.shape[-1] != family.context_dim:
        raise SlimeError(
            f"The CLIP gives text rows {context.rows.shape[-1]} wide, but the model needs {family.context_dim}: "
            "connect the CLIP of the same checkpoint as the model."
        )
    layers = choose_layers(family, denoiser.layers, settings.cross_layers, settings.self_layers)
    return PartEmbeddings(
        names=names,
        rows=torch.zeros(1, len(names), family.context_dim),
        context=context.rows.cpu().half(),
        pooled=context.pooled,
        prompt=prompt,
        row_groups=settings.row_groups if mode == "keys" else "shared",
        family=family.name,
        prediction=denoiser.prediction,
        mode=mode,
        layers=LayerChoice(*layers),
        timestep=settings.timestep or family.timestep,
        working_side=family.working_side,
        read_out=ReadOut(official=True) if settings.preset == "paper" else ReadOut(**family.read_out),
        settings=asdict(settings),
    )


def _views(examples: Sequence[Example], settings: TrainSettings) -> list[tuple[Example, random.Random]]:
    """Examples in turn, each view with a generator of its own; at least one view an example."""
    count = max(settings.views, len(examples))
    return [(examples[i % len(examples)], random.Random(f"{settings.seed}/{i}")) for i in range(count)]  # noqa: S311


def _make_view(
    example: Example,
    settings: TrainSettings,
    rng: random.Random,
    size: tuple[int, int],
    grid: tuple[int, int],
    plain: bool,
) -> tuple[Tensor, Tensor]:
    """An augmented view, or the example as it is; image [h, w, 3] and label maps [K, *grid]."""
    if not plain:
        return augmented_view(example, settings, rng, size, grid)
    return resize_image(example.image[None], size)[0], soft_labels(example.labels, len(example.names) + 1, grid)


def resize_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Soft label maps [K, h, w] averaged down to ``grid``."""
    return labels if labels.shape[-2:] == grid else F.adaptive_avg_pool2d(labels, grid)
