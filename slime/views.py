"""The seeded views of the examples that trainers learn from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .augment import augmented_view, resize_image, soft_labels
from .examples import Example
from .settings import TrainSettings


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
