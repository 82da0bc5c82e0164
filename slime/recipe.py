"""What all trainers share: progress reports, the embeddings to be filled, and the seeded views of the examples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .augment import augmented_view, resize_image, soft_labels
from .denoiser import Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import Example
from .layers import LayerChoice, choose_layers
from .read import ReadOut
from .settings import TrainSettings


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


def make_template(
    denoiser: Denoiser, examples: Sequence[Example], settings: TrainSettings, mode: str
) -> PartEmbeddings:
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


def seeded_views(examples: Sequence[Example], settings: TrainSettings) -> list[tuple[Example, random.Random]]:
    """Examples in turn, each view with a generator of its own; at least one view an example."""
    count = max(settings.views, len(examples))
    return [(examples[i % len(examples)], random.Random(f"{settings.seed}/{i}")) for i in range(count)]  # noqa: S311


def make_view(
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
