"""Make and encode the seeded augmented views of the examples that trainers learn from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.base import Backbone, BackboneInfo
from ..batches import in_batches
from ..examples import Example
from ..images import resize_image, soft_labels, working_size
from ..paper.views import official_view
from ..settings import ViewSettings
from .augment import augmented_image, augmented_labels

VIEW_BATCH = 4


def view_count(examples: Sequence[Example], settings: ViewSettings) -> int:
    """Return the number of views: at least one per example."""
    return max(settings.views, len(examples))


class AugmentedView(NamedTuple):
    """A view of an example: image [h, w, 3], soft labels [K, h, w] on latent pixels, and its random generator."""

    image: Tensor
    labels: Tensor
    rng: random.Random


def make_view(
    examples: Sequence[Example], settings: ViewSettings, info: BackboneInfo, plain: int, index: int
) -> AugmentedView:
    """Make the view of this index, always the same: examples in turn, the first ``plain`` views unaugmented."""
    example = examples[index % len(examples)]
    rng = random.Random(f"{settings.seed}/{view_place(settings, len(examples), index)}")
    size = view_size(example, info)
    if index < plain:
        image = resize_image(example.image[None], size)[0]
    elif settings.official_views:
        grid = (size[0] // info.cell, size[1] // info.cell)
        return AugmentedView(*official_view(example, settings, rng, size, grid, index), rng)
    else:
        image = augmented_image(example, settings, rng, size)
    return AugmentedView(image, view_labels(examples, settings, info, plain, index), rng)


def view_labels(
    examples: Sequence[Example], settings: ViewSettings, info: BackboneInfo, plain: int, index: int
) -> Tensor:
    """Make the soft labels [K, h, w] of a view that is not official, without its image."""
    example = examples[index % len(examples)]
    size = view_size(example, info)
    grid = (size[0] // info.cell, size[1] // info.cell)
    if index < plain:
        return soft_labels(example.labels, len(example.names) + 1, grid)
    rng = random.Random(f"{settings.seed}/{view_place(settings, len(examples), index)}")
    return augmented_labels(example, settings, rng, grid)


def view_place(settings: ViewSettings, count: int, index: int) -> str:
    """Name a view so that examples added later do not change it. The official code counts views."""
    if settings.official_views:
        return str(index)
    view, example = divmod(index, count)
    return f"{example}/{view}" if example else str(view)


def view_seed(settings: ViewSettings, count: int, index: int) -> int:
    """Return the seed of a view's noise, by the number of its example and its own."""
    return settings.seed + index // count + 10_000 * (index % count)


def view_size(example: Example, info: BackboneInfo) -> tuple[int, int]:
    """Return height and width at which the views of an example are encoded."""
    return working_size(example.labels.shape[0], example.labels.shape[1], info.side, info.multiple)


class EncodedView(NamedTuple):
    """An encoded view.

    Attributes:
        latents: [1, C, h, w].
        labels: soft labels [K, h, w] on the CPU.
        size: height and width in pixels.
        rng: its random generator.
        image: returns its image [h, w, 3].
        number: of the view.
    """

    latents: Tensor
    labels: Tensor
    size: tuple[int, int]
    rng: random.Random
    image: Callable[[], Tensor]
    number: int


def encode_views(
    backbone: Backbone, examples: Sequence[Example], settings: ViewSettings, wanted: Sequence[int], plain: int = 0
) -> Iterator[EncodedView]:
    """Yield views by number, encoded in batches of neighbours of one size; their pixels are not kept."""
    make = partial(make_view, examples, settings, backbone.info, plain)
    sizes = [view_size(example, backbone.info) for example in examples]
    for size, neighbours in groupby(wanted, key=lambda index: sizes[index % len(sizes)]):
        indices = list(neighbours)
        numbers = iter(indices)

        def encode(chunk: slice, indices: list[int] = indices) -> tuple[list[AugmentedView], Tensor]:
            views = [make(index) for index in indices[chunk]]
            return views, backbone.encode_images(torch.stack([view.image for view in views]).to(backbone.device))

        for views, latents in in_batches(len(indices), VIEW_BATCH, encode):
            for view, latent in zip(views, latents, strict=True):
                index = next(numbers)
                yield EncodedView(latent[None], view.labels, size, view.rng, partial(_image, make, index), index)


def _image(make: Callable[[int], AugmentedView], index: int) -> Tensor:
    return make(index).image


def resize_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average soft labels [K, h, w] down to ``grid``."""
    return labels if labels.shape[-2:] == grid else F.adaptive_avg_pool2d(labels, grid)
