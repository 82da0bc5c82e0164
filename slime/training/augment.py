"""Seeded augmented views of an example: crop, flip, rotation, blur; ours, and the official code's."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..examples import IGNORE, Example
from ..images import resize_image, soft_labels
from ..settings import ViewSettings

# "left" and "right" in the languages of locales/. A false alarm costs mirrored views only.
SIDED = re.compile(
    r"\b(left|right|links|rechts|gauche|droite?|izquierd[oa]|derech[oa])\b"
    r"|\u5de6|\u53f3|\uc67c|\uc624\ub978"  # Chinese and Japanese; Korean
    r"|\b\u043b\u0435\u0432\w\w|\b\u043f\u0440\u0430\u0432\w\w"  # Russian, with an ending
    r"|\u064a\u0633\u0627?\u0631|\u064a\u0645\u064a?\u0646",  # Arabic
    re.IGNORECASE,
)

KEPT = 0.3  # of a class must be in an official crop
DRAWS = 100  # of such a crop at most


def flip_allowed(settings: ViewSettings, names: Sequence[str]) -> bool:
    if settings.flip is not None:
        return settings.flip
    return not any(SIDED.search(name) for name in names)


def augmented_view(
    example: Example, settings: ViewSettings, rng: random.Random, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """One random view.

    Returns:
        Image [h, w, 3] of ``size`` and soft label maps [K + 1, *grid].
    """
    share = math.exp(rng.uniform(math.log(settings.crop), 0.0))
    image, labels = crop(example, share, rng)
    if settings.recolor:
        image = recolor(image, labels, settings.recolor, rng)
    if flip_allowed(settings, example.names) and rng.random() < 0.5:
        image, labels = image.flip(1), labels.flip(1)
    image = resize_image(image[None], size)[0]
    angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
    if angle:
        image, labels = rotate(image, labels, angle)
    if rng.random() < settings.blur:
        image = gaussian_blur(image, rng.uniform(0.3, 1.5) * min(size) / 512)
    return image, soft_labels(labels, len(example.names) + 1, grid)


def official_view(
    example: Example,
    settings: ViewSettings,
    rng: random.Random,
    size: tuple[int, int],
    grid: tuple[int, int],
    turn: int,
) -> tuple[Tensor, Tensor]:
    """One random view as the official code draws it (src/dataset.py).

    A crop of uniformly drawn size, drawn again until it holds .3 of the class whose ``turn`` it is; half of the views
    are turned, with black corners that count as background; blur has a kernel of 1, 3 or 5 pixels at 512.

    Returns:
        Image [h, w, 3] of ``size`` and one-hot label maps [K + 1, *grid] of the nearest pixels.
    """
    classes = len(example.names) + 1
    wanted = KEPT * (example.labels.numpy() == turn % classes).sum()
    for _ in range(DRAWS):
        image, labels = crop(example, rng.uniform(settings.crop, 1.0), rng)
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
        image, labels = rotate(image, labels, angle, mirrored=False)
    nearest = F.interpolate(labels[None, None].float(), size=grid, mode="nearest")[0, 0].long()
    return image, torch.stack([(nearest == k) for k in range(classes)]).float()


def crop(example: Example, share: float, rng: random.Random) -> tuple[Tensor, Tensor]:
    """A random window of image and labels whose sides are ``share`` times the image's."""
    height, width = example.labels.shape
    rows, columns = window(height, share, rng), window(width, share, rng)
    return example.image[rows, columns], example.labels[rows, columns]


def window(length: int, share: float, rng: random.Random) -> slice:
    """A random stretch of ``share`` times ``length`` pixels."""
    size = max(1, round(length * share))
    first = rng.randint(0, length - size)
    return slice(first, first + size)


def recolor(image: Tensor, labels: Tensor, strength: float, rng: random.Random) -> Tensor:
    """Change hue, saturation, brightness and tint of every part, and of the background, independently.

    One example says how a part looks in one image; this keeps the rows from taking its colour for its meaning.

    Args:
        image: [h, w, 3].
        labels: [h, w].
        strength: 0 leaves the image as it is, 1 turns hues at will.
    """
    result = image.clone()
    for label in labels.unique().tolist():
        inside = labels == label
        # Rotation of the colour cube about its grey axis (Rodrigues), then saturation, gain and tint.
        angle = rng.uniform(-math.pi, math.pi) * strength
        cosine, third = math.cos(angle), (1 - math.cos(angle)) / 3
        sine = math.sin(angle) / math.sqrt(3)
        a, b, c = cosine + third, third - sine, third + sine
        turn = torch.tensor([[a, b, c], [c, a, b], [b, c, a]])
        saturation = rng.uniform(1 - 0.6 * strength, 1 + 0.4 * strength)
        matrix = saturation * turn + (1 - saturation) / 3
        gain = rng.uniform(1 - 0.4 * strength, 1 + 0.3 * strength)
        shift = rng.uniform(-0.3, 0.3) * strength
        tint = torch.tensor([shift + rng.uniform(-0.25, 0.25) * strength for _ in range(3)])
        result[inside] = image[inside] @ matrix.T * gain + tint
    return result.clamp(0, 1)


def rotate(image: Tensor, labels: Tensor, angle: float, mirrored: bool = True) -> tuple[Tensor, Tensor]:
    """Rotate image [h, w, 3] and labels [H, W] about their centres by ``angle`` radians; corners mirror the inside, or
    are black and background."""
    padding = "reflection" if mirrored else "zeros"

    def turn(x: Tensor, mode: str) -> Tensor:
        h, w = x.shape[-2:]
        c, s = math.cos(angle), math.sin(angle)
        theta = torch.tensor([[[c, -s * h / w, 0.0], [s * w / h, c, 0.0]]])
        where = F.affine_grid(theta, [1, 1, h, w], align_corners=False)
        return F.grid_sample(x[None], where, mode=mode, padding_mode=padding, align_corners=False)[0]

    turned = turn(labels[None].float(), "nearest")[0].long().clamp(0, IGNORE)
    return turn(image.movedim(-1, 0), "bilinear").movedim(0, -1).clamp(0, 1), turned


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """[h, w, 3] blurred by a Gaussian of ``sigma`` pixels."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    x = F.pad(image.movedim(-1, 0)[None], [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[..., None, :], groups=3)
    return F.conv2d(x, kernel[..., :, None], groups=3)[0].movedim(0, -1)
