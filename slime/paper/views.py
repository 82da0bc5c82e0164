"""Augmented views as the official code draws them."""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..examples import Example
from ..images import resize_image
from ..settings import ViewSettings
from ..training.augment import crop, flip_allowed, gaussian_blur, recolor, rotate_image, rotate_labels

LEAST_SHARE = 0.3  # of a class that a crop must hold
MOST_CROPS = 100  # drawn for one view


def official_view(
    example: Example,
    settings: ViewSettings,
    rng: random.Random,
    size: tuple[int, int],
    grid: tuple[int, int],
    turn: int,
) -> tuple[Tensor, Tensor]:
    """Make one random view as the official code draws it (src/dataset.py).

    A crop of uniformly drawn size is drawn again until it holds .3 of the class whose ``turn`` it is; half of the views
    are rotated, with black corners that count as background; the blur kernel is 1, 3 or 5 pixels at 512.

    Returns:
        Image [h, w, 3] of ``size`` and one-hot label maps [K + 1, *grid] of the nearest pixels.
    """
    classes = len(example.names) + 1
    wanted = LEAST_SHARE * (example.labels.numpy() == turn % classes).sum()
    for _ in range(MOST_CROPS):
        image, labels = crop(example, rng.uniform(settings.smallest_crop, 1.0), rng)
        if not wanted or (labels.numpy() == turn % classes).sum() > wanted:
            break
    if settings.recolor:  # the official code has no such thing
        image = recolor(image, labels, settings.recolor, rng)
    if flip_allowed(settings, example.names) and rng.random() < 0.5:
        image, labels = image.flip(1), labels.flip(1)
    image = resize_image(image[None], size)[0]
    if rng.random() < settings.blur and (radius := rng.randint(0, 2)):
        image = gaussian_blur(image, (0.3 * (radius - 1) + 0.8) * min(size) / 512)  # OpenCV's sigma of such a kernel
    if rng.random() < 0.5:
        angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
        image, labels = rotate_image(image, angle, mirrored=False), rotate_labels(labels, angle, mirrored=False)
    nearest = F.interpolate(labels[None, None].float(), size=grid, mode="nearest")[0, 0].long()
    return image, torch.stack([(nearest == k) for k in range(classes)]).float()
