"""Check and resize images, label maps and part maps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SlimeError

MIN_SIDE = 16
SLACK = 0.1  # resampling overshoots [0, 1] by as much; more is another range, such as 0..255
CHANNELS = (1, 3, 4)


def check_images(images: Tensor) -> None:
    """Raise SlimeError for images that are not [B, H, W, 3] in [0, 1]: wrong shape or size, NaN or infinite values.

    Greyscale and four-channel images are accepted, see :func:`as_rgb`. Checks image by image, to save memory.
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
            raise SlimeError(f"The image contains {bad} NaN or infinite values. Check the node that made it.")
        if low < -SLACK or high > 1 + SLACK:
            raise SlimeError(
                f"Image values must lie in [0, 1]; got {low:.2f} to {high:.2f}. Check the node that made it."
            )


def as_rgb(images: Tensor) -> Tensor:
    """Return images [..., H, W, 1, 3 or 4] as float32 [..., H, W, 3] in [0, 1]; alpha is dropped, grey is repeated."""
    images = images.detach().float()
    rgb = images.expand(*images.shape[:-1], 3) if images.shape[-1] == 1 else images[..., :3]
    return rgb.clamp(0, 1)


def working_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Return height and width, multiples of ``multiple``, with about side * side pixels and this aspect (up to 1:4)."""
    aspect = min(max(width / height, 0.25), 4.0)
    h = max(multiple, round(side / math.sqrt(aspect) / multiple) * multiple)
    w = max(multiple, round(side * math.sqrt(aspect) / multiple) * multiple)
    return h, w


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [B, H, W, 3], bilinear with antialiasing."""
    if (image.shape[1], image.shape[2]) == tuple(size):
        return image
    moved = F.interpolate(image.movedim(-1, 1), size=size, mode="bilinear", antialias=True, align_corners=False)
    return moved.movedim(1, -1).clamp(0, 1)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps [B, C, h, w], bilinear."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def most_probable(maps: Tensor) -> Tensor:
    """Return the argmax over K of maps [B, K, ...], uint8 [B, ...]; the first of equal values.

    Compares class after class, which is several times faster on a CPU than argmax across planes.
    """
    best, labels = maps[:, 0].clone(), torch.zeros(maps[:, 0].shape, dtype=torch.uint8, device=maps.device)
    for label, values in enumerate(maps[:, 1:].unbind(1), start=1):
        labels.masked_fill_(values > best, label)
        torch.maximum(best, values, out=best)
    return labels


def soft_labels(labels: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Average the one-hot maps of a label map [H, W] down to [count, h, w]; ignored pixels lower the sum below 1."""
    one_hot = torch.stack([(labels == k) for k in range(count)]).float()
    return F.adaptive_avg_pool2d(one_hot, size)
