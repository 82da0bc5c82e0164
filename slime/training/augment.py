"""Augment an example: crop, recolour, flip, rotate, blur."""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..examples import IGNORE, Example
from ..images import resize_image, soft_labels
from ..settings import ViewSettings

# "left" and "right" in several languages, also in left_wheel and leftEye. A false alarm costs mirrored views only.
SIDED = re.compile(
    r"(?<![a-z])(left|right|link(s|e[rsnm]?)|recht(s|e[rsnm]?)|gauche|droite?|izquierd[oa]s?|derech[oa]s?|sinistr[oaie]|destr[oaie]"
    r"|esquerd[oa]s?|direit[oa]s?)(?![a-z])"
    r"|\u5de6|\u53f3|\uc67c|\uc624\ub978"  # Chinese and Japanese; Korean
    r"|\b\u043b\u0435\u0432\w\w|\b\u043f\u0440\u0430\u0432\w\w"  # Russian, with an ending
    r"|\u064a\u0633\u0627?\u0631|\u064a\u0645\u064a?\u0646",  # Arabic
    re.IGNORECASE,
)


def flip_allowed(settings: ViewSettings, names: Sequence[str]) -> bool:
    """Return whether views may be mirrored: by the setting, else unless a part name says left or right."""
    if settings.flip is not None:
        return settings.flip
    return not any(SIDED.search(words(name)) for name in names)


def words(name: str) -> str:
    """Return the words of a part name: leftEye is left Eye."""
    return unicodedata.normalize("NFC", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))


class Transform(NamedTuple):
    """How a random view is made: window, mirroring, rotation in radians, blur in pixels of an image of 512."""

    rows: slice
    columns: slice
    mirrored: bool
    angle: float
    sigma: float


def draw_transform(example: Example, settings: ViewSettings, rng: random.Random) -> Transform:
    """Draw a random view. It depends on the size of the image and the names of the parts, not on their labels."""
    height, width = example.labels.shape
    share = math.exp(rng.uniform(math.log(settings.smallest_crop), 0.0))
    rows, columns = window(height, share, rng), window(width, share, rng)
    mirrored = flip_allowed(settings, example.names) and rng.random() < 0.5
    angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
    sigma = rng.uniform(0.3, 1.5) if rng.random() < settings.blur else 0.0
    return Transform(rows, columns, mirrored, angle, sigma)


def augmented_image(example: Example, settings: ViewSettings, rng: random.Random, size: tuple[int, int]) -> Tensor:
    """Make the image [h, w, 3] of a random view, of ``size``."""
    drawn = draw_transform(example, settings, rng)
    image, labels = (tensor[drawn.rows, drawn.columns] for tensor in (example.image, example.labels))
    if settings.recolor:
        image = recolor(image, labels, settings.recolor, rng)
    image = resize_image((image.flip(1) if drawn.mirrored else image)[None], size)[0]
    image = rotate_image(image, drawn.angle)
    return gaussian_blur(image, drawn.sigma * min(size) / 512) if drawn.sigma else image


def augmented_labels(example: Example, settings: ViewSettings, rng: random.Random, grid: tuple[int, int]) -> Tensor:
    """Make the soft label maps [K + 1, *grid] of the view that a generator of the same seed draws."""
    drawn = draw_transform(example, settings, rng)
    labels = example.labels[drawn.rows, drawn.columns]
    labels = rotate_labels(labels.flip(1) if drawn.mirrored else labels, drawn.angle)
    return soft_labels(labels, len(example.names) + 1, grid)


def crop(example: Example, share: float, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Cut a random window whose sides are ``share`` times the image's out of image and labels."""
    height, width = example.labels.shape
    rows, columns = window(height, share, rng), window(width, share, rng)
    return example.image[rows, columns], example.labels[rows, columns]


def window(length: int, share: float, rng: random.Random) -> slice:
    """Return a random range of ``share`` times ``length`` pixels."""
    size = max(1, round(length * share))
    first = rng.randint(0, length - size)
    return slice(first, first + size)


def recolor(image: Tensor, labels: Tensor, strength: float, rng: random.Random) -> Tensor:
    """Change hue, saturation, brightness and tint of every part, and of the background, independently.

    One example shows each part in one colour only; this keeps the fit from relying on that colour.

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


def rotate_image(image: Tensor, angle: float, mirrored: bool = True) -> Tensor:
    """Rotate an image [h, w, 3] about its centre by ``angle`` radians; corners are mirrored, or else black."""
    if not angle:
        return image
    return _rotate(image.movedim(-1, 0), angle, "bilinear", mirrored).movedim(0, -1).clamp(0, 1)


def rotate_labels(labels: Tensor, angle: float, mirrored: bool = True) -> Tensor:
    """Rotate labels [h, w] likewise; corners are mirrored, or else background."""
    if not angle:
        return labels
    return _rotate(labels[None].float(), angle, "nearest", mirrored)[0].long().clamp(0, IGNORE)


def _rotate(x: Tensor, angle: float, mode: str, mirrored: bool) -> Tensor:
    h, w = x.shape[-2:]
    c, s = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[[c, -s * h / w, 0.0], [s * w / h, c, 0.0]]])
    where = F.affine_grid(theta, [1, 1, h, w], align_corners=False)
    padding = "reflection" if mirrored else "zeros"
    return F.grid_sample(x[None], where, mode=mode, padding_mode=padding, align_corners=False)[0]


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur an image [h, w, 3] by a Gaussian of ``sigma`` pixels."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    x = F.pad(image.movedim(-1, 0)[None], [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[..., None, :], groups=3)
    return F.conv2d(x, kernel[..., :, None], groups=3)[0].movedim(0, -1)
