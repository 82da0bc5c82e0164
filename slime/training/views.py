"""The seeded views of the examples that trainers learn from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..backbones.base import Backbone, BackboneInfo
from ..batches import in_batches
from ..examples import Example
from ..images import resize_image, soft_labels, working_size
from ..settings import ViewSettings
from .augment import augmented_view, official_view
from .progress import OnStep, StepReport

VIEW_BATCH = 4


def view_count(examples: Sequence[Example], settings: ViewSettings) -> int:
    """At least one view an example."""
    return max(settings.views, len(examples))


class AugmentedView(NamedTuple):
    """One view of an example: image [h, w, 3], label maps [K, *cells], and its generator after the augmentation."""

    image: Tensor
    labels: Tensor
    rng: random.Random


def make_view(
    examples: Sequence[Example], settings: ViewSettings, info: BackboneInfo, plain: int, index: int
) -> AugmentedView:
    """The view of this index, always the same: examples in turn, the first ``plain`` views as they are."""
    example = examples[index % len(examples)]
    rng = random.Random(f"{settings.seed}/{index}")  # noqa: S311
    size = view_size(example, info)
    grid = (size[0] // info.cell, size[1] // info.cell)
    if index >= plain:
        if settings.official_views:
            return AugmentedView(*official_view(example, settings, rng, size, grid, index), rng)
        return AugmentedView(*augmented_view(example, settings, rng, size, grid), rng)
    labels = soft_labels(example.labels, len(example.names) + 1, grid)
    return AugmentedView(resize_image(example.image[None], size)[0], labels, rng)


def view_size(example: Example, info: BackboneInfo) -> tuple[int, int]:
    """Height and width the example's views are encoded at."""
    return working_size(example.labels.shape[0], example.labels.shape[1], info.side, info.multiple)


class EncodedView(NamedTuple):
    """Latents [1, C, h, w] of a view, its label maps [K, h, w] on the CPU, its size in pixels, and how to see it."""

    latents: Tensor
    labels: Tensor
    size: tuple[int, int]
    rng: random.Random
    picture: Callable[[], Tensor]


def encode_views(
    backbone: Backbone, examples: Sequence[Example], settings: ViewSettings, count: int, plain: int = 0
) -> Iterator[EncodedView]:
    """The first ``count`` views, encoded in batches of neighbours of one size; their pixels are not kept."""
    make = partial(make_view, examples, settings, backbone.info, plain)
    sizes = [view_size(example, backbone.info) for example in examples]
    first = 0
    for size, neighbours in groupby(range(count), key=lambda index: sizes[index % len(sizes)]):
        indices = list(neighbours)

        def encode(part: slice, indices: list[int] = indices) -> tuple[list[AugmentedView], Tensor]:
            views = [make(index) for index in indices[part]]
            return views, backbone.encode_images(torch.stack([view.image for view in views]).to(backbone.device))

        for views, latents in in_batches(len(indices), VIEW_BATCH, encode):
            for view, latent in zip(views, latents, strict=True):
                picture = partial(_picture, make, first)
                yield EncodedView(latent[None], view.labels, size, view.rng, picture)
                first += 1


def encode_all(
    backbone: Backbone, examples: Sequence[Example], settings: ViewSettings, on_step: OnStep, plain: int = 0
) -> list[EncodedView]:
    """All of the settings' views, before any pass: on a small card VAE and UNet take turns in memory."""
    count = view_count(examples, settings)
    views: list[EncodedView] = []
    for view in encode_views(backbone, examples, settings, count, plain):
        preview = None if views else (view.picture(), view.labels)
        views.append(view)
        on_step(StepReport("views", len(views), count, {}, lambda: None, preview))
    return views


def _picture(make: Callable[[int], AugmentedView], index: int) -> Tensor:
    return make(index).image


def resize_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Soft label maps [K, h, w] averaged down to ``grid``."""
    return labels if labels.shape[-2:] == grid else F.adaptive_avg_pool2d(labels, grid)
