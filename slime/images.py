"""Images, label maps and maps in and out: what is accepted, and how sizes change."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it
from torch import Tensor

from .errors import SlimeError

MIN_SIDE = 16
SLACK = 0.1  # resampling overshoots [0, 1] by as much; more is another range, such as 0..255
CHANNELS = (1, 3, 4)


def check_images(images: Tensor) -> None:
    """Raises SlimeError for images that are not [B, H, W, 3] in [0, 1]: shape, size, NaN, infinite or other values.

    Grey and four-channel images pass, see :func:`as_rgb`. Goes image by image, so that it takes no memory.
    """
    if images.ndim != 4 or images.shape[-1] not in CHANNELS or len(images) == 0:
        raise SlimeError(f"Images must be [B, H, W, 3]; got {list(images.shape)}.")
    height, width = images.shape[1:3]
    if min(height, width) < MIN_SIDE:
        raise SlimeError(f"The image is {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed.")
    for image in images:
        low, high = (float(value) for value in torch.aminmax(image.detach()[..., :3]))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(image)).sum())
            raise SlimeError(f"The image holds {bad} NaN or infinite values; look for the node that made them.")
        if low < -SLACK or high > 1 + SLACK:
            raise SlimeError(f"Image values must lie in [0, 1]; got {low:.2f} to {high:.2f}.")


def as_rgb(images: Tensor) -> Tensor:
    """Images [..., H, W, 1, 3 or 4] as float32 [..., H, W, 3] in [0, 1]; alpha is dropped, grey is repeated."""
    images = images.detach().float()
    rgb = images.expand(*images.shape[:-1], 3) if images.shape[-1] == 1 else images[..., :3]
    return rgb.clamp(0, 1)


def working_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Height and width, multiples of ``multiple``, with about side * side pixels and the aspect (at most 1:4)."""
    aspect = min(max(width / height, 0.25), 4.0)
    h = max(multiple, round(side / math.sqrt(aspect) / multiple) * multiple)
    w = max(multiple, round(side * math.sqrt(aspect) / multiple) * multiple)
    return h, w


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W, 3] -> [B, h, w, 3], antialiased bilinear."""
    if (image.shape[1], image.shape[2]) == tuple(size):
        return image
    moved = F.interpolate(image.movedim(-1, 1), size=size, mode="bilinear", antialias=True, align_corners=False)
    return moved.movedim(1, -1).clamp(0, 1)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of [B, C, h, w]."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def most_probable(maps: Tensor) -> Tensor:
    """uint8 [B, ...]: the first class of the highest value in maps [B, K, ...], by comparing class after class, which
    is several times faster on a CPU than an argmax across planes."""
    best, labels = maps[:, 0].clone(), torch.zeros(maps[:, 0].shape, dtype=torch.uint8, device=maps.device)
    for label, values in enumerate(maps[:, 1:].unbind(1), start=1):
        labels.masked_fill_(values > best, label)
        torch.maximum(best, values, out=best)
    return labels


def soft_labels(labels: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Label map [H, W] -> area-averaged one-hot maps [count, h, w]; ignored pixels take from the sum, which is <= 1."""
    one_hot = torch.stack([(labels == k) for k in range(count)]).float()
    return F.adaptive_avg_pool2d(one_hot, size)
