"""The "thorough" and "paper" trainers: the paper's objective, by gradients through the whole UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import cross_scores, resize_maps, was_maps
from .augment import working_size
from .denoiser import Capture, Context, Denoiser, add_noise, seeded_noise
from .embeddings import PartEmbeddings
from .examples import Example
from .losses import class_weights, guard_loss, weighted_cross_entropy
from .recipe import OnStep, StepReport, make_template, make_view, seeded_views
from .settings import TrainSettings

JUDGED_STEPS = 10


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


def train_through_unet(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings,
    start: PartEmbeddings | None,
    on_step: OnStep,
) -> PartEmbeddings:
    """The paper's training, section 3: the rows stand in the UNet's context, Adam minimises
    CE(cross-attention scores) + alpha MSE(WAS maps) + beta "SD loss".

    Beside the paper: views are drawn and encoded up front, each with its noise and timestep; the unconditional
    prediction of a view is made once, without gradients, because it does not depend on the rows; the best rows are
    those of the lowest recent loss.
    """
    template = make_template(denoiser, examples, settings, "context")
    device, parts = denoiser.device, len(template.names)
    base = template.base_context().rows.to(device)
    pooled = template.pooled
    empty = denoiser.encode_prompt("")
    pool = _make_pool(denoiser, examples, settings, template)
    pixels = torch.cat([entry.labels.flatten(2)[:, :, None] for entry in pool], 3)
    weights = class_weights(pixels, settings.class_weights)
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
            predicted = denoiser.predict_noise(noisy, entry.timestep, context, capture, entry.size)

            grid = (entry.labels.shape[-2], entry.labels.shape[-1])
            layers = [resize_maps(cross_scores(a, parts + 1), grid) for a in capture.cross.values()]
            scores = torch.stack(layers).mean(0)
            losses = {"ce": weighted_cross_entropy(scores, entry.labels, weights)}
            if settings.was_weight:
                was = was_maps(list(capture.self_.values()), F.softmax(scores, 1))
                losses["was"] = settings.was_weight * F.mse_loss(was, entry.labels)
            if settings.guard_weight and predicted is not None and entry.unconditional is not None:
                losses["guard"] = settings.guard_weight * guard_loss(predicted, entry.unconditional, entry.noise)
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
    for index, (example, rng) in enumerate(seeded_views(examples, settings)[: settings.steps]):
        size = working_size(example.labels.shape[0], example.labels.shape[1], template.working_side)
        grid = (size[0] // 8, size[1] // 8)
        image, labels = make_view(example, settings, rng, size, grid, plain=False)
        latents = denoiser.encode_images(image[None].to(denoiser.device))
        noise = seeded_noise(latents.shape, settings.seed + index, denoiser.device)
        pool.append(_PoolEntry(latents, noise, rng.randint(low, high), labels[None].to(denoiser.device), image, size))
    return pool
