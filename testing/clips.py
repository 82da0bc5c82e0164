"""Moving scenes with sensor noise: seen by a moving camera, or an object that moves before a still place."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import scenes, splits

SENSOR_NOISE = 0.02


def clip(
    domain: str, seed: int, frames: int, split: int = splits.TEST, style: str = scenes.WORLD
) -> tuple[Tensor, np.ndarray]:
    """Return frames [T, H, W, 3] and label maps [T, H, W] of a slow pan that stops for a third of the time."""
    scene = scenes.render(domain, split + seed, style=style)
    image = torch.from_numpy(scene.image).float().movedim(-1, 0)[None] / 255
    labels = torch.from_numpy(scene.labels).float()[None, None]
    generator = torch.Generator().manual_seed(seed)
    pictures, truths = [], []
    for frame in range(frames):
        phase = min(frame, 2 * frames // 3) / max(frames - 1, 1)
        zoom, shift = 0.85 + 0.1 * phase, 0.1 * math.sin(2 * phase + seed)
        theta = torch.tensor([[[zoom, 0.0, shift], [0.0, zoom, 0.3 * shift]]])
        where = F.affine_grid(theta, [1, 1, *image.shape[-2:]], align_corners=False)
        moved = F.grid_sample(image, where, padding_mode="reflection", align_corners=False)[0].movedim(0, -1)
        noise = SENSOR_NOISE * torch.randn(moved.shape, generator=generator)
        pictures.append((moved + noise).clamp(0, 1))
        turned = F.grid_sample(labels, where, mode="nearest", padding_mode="reflection", align_corners=False)
        truths.append(turned[0, 0].byte().numpy())
    return torch.stack(pictures), np.stack(truths)


def moving_clip(
    domain: str, seed: int, frames: int, split: int = splits.TEST, style: str = scenes.WORLD
) -> tuple[Tensor, np.ndarray]:
    """Return frames and label maps as :func:`clip`; the object goes 30 % of the width to the right and back.

    Behind it is the mirrored image, or the mean of the place where that shows the object too.
    """
    scene = scenes.render(domain, split + seed, style=style)
    image, labels = torch.from_numpy(scene.image).float() / 255, torch.from_numpy(scene.labels)
    inside = labels > 0
    free = (~inside).flip(1)
    behind = torch.where((inside & free)[..., None], image.flip(1), image)
    behind[inside & ~free] = image[~inside].mean(0)
    generator = torch.Generator().manual_seed(seed)
    pictures, truths = [], []
    for frame in range(frames):
        shift = round(0.3 * image.shape[1] * math.sin(math.pi * frame / max(frames - 1, 1)))
        there = torch.zeros_like(labels)
        picture = behind.clone()
        width = image.shape[1] - shift
        there[:, shift:] = labels[:, :width]
        picture[:, shift:][inside[:, :width]] = image[:, :width][inside[:, :width]]
        noise = SENSOR_NOISE * torch.randn(picture.shape, generator=generator)
        pictures.append((picture + noise).clamp(0, 1))
        truths.append(there.byte().numpy())
    return torch.stack(pictures), np.stack(truths)
