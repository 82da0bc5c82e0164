"""Smooth the parts of video frames over time where the image stands still."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .maps import DenseMaps, PartMaps

STILL = 0.06  # mean colour difference at which the weight of the neighbour frame is halved
BLUR = 9  # pixels over which differences are averaged


def smooth_video_parts(maps: PartMaps, frames: Tensor, strength: float = 0.7) -> PartMaps:
    """Blend every frame's probabilities with its neighbours', less where the picture changes.

    An exponential average runs along the frames in both directions. The weight of a neighbour decreases with the local
    colour difference, so that nothing trails behind moving parts. All frames are in memory at full size meanwhile.

    Args:
        maps: of the frames in order, segmented with the same noise (one batch, one seed).
        frames: [B, H, W, 3] in [0, 1].
        strength: weight of a neighbour where nothing moved, below 1; 0 changes nothing.
    """
    if strength <= 0 or len(frames) < 2:
        return maps
    weights, before = strength * stillness(frames), maps.probabilities
    forward = _average(before, weights, range(1, len(frames)), -1)
    backward = _average(before, weights, range(len(frames) - 2, -1, -1), 1)
    return replace(maps, full_size=DenseMaps(0.5 * (forward + backward)))


def stillness(frames: Tensor) -> Tensor:
    """Return [B - 1, 1, H, W] between neighbouring frames: 1 where nothing changed, towards 0 where colours differ."""
    difference = (frames[1:] - frames[:-1]).abs().mean(-1)[:, None]
    blurred = F.avg_pool2d(difference, BLUR, 1, BLUR // 2, count_include_pad=False)
    return torch.exp2(-((blurred / STILL) ** 2))


def _average(probabilities: Tensor, weights: Tensor, order: range, neighbour: int) -> Tensor:
    smooth = probabilities.clone()
    for index in order:
        weight = weights[min(index, index + neighbour)]
        smooth[index] = torch.lerp(smooth[index], smooth[index + neighbour], weight)
    return smooth
