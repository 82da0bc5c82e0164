"""Temporally steady parts: probabilities of a video's frames smoothed where the picture stands still."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .maps import Held, PartMaps

STILL = 0.06  # mean colour difference at which half of the trust in the neighbour frame is gone
BLUR = 9  # pixels over which differences are averaged


def steady_parts(maps: PartMaps, frames: Tensor, strength: float = 0.7) -> PartMaps:
    """Blend every frame's probabilities with its neighbours', less where the picture changes.

    An exponential average runs along the frames in both directions; what it carries over from a neighbour shrinks with
    the local colour difference, so that nothing trails behind moving parts. All frames are held at full size meanwhile.

    Args:
        maps: of the frames in order, segmented with one noise (one batch, one seed).
        frames: [B, H, W, 3] in [0, 1].
        strength: 0 leaves the maps as they are; share of a neighbour where nothing moved, below 1.
    """
    if strength <= 0 or len(frames) < 2:
        return maps
    trust, before = strength * stillness(frames), maps.probabilities
    forward = _run(before, trust, range(1, len(frames)), -1)
    backward = _run(before, trust, range(len(frames) - 2, -1, -1), 1)
    return replace(maps, pixels=Held(0.5 * (forward + backward)))


def stillness(frames: Tensor) -> Tensor:
    """[B - 1, 1, H, W] between neighbouring frames: 1 where nothing changed, towards 0 where colours differ."""
    difference = (frames[1:] - frames[:-1]).abs().mean(-1)[:, None]
    blurred = F.avg_pool2d(difference, BLUR, 1, BLUR // 2, count_include_pad=False)
    return torch.exp2(-((blurred / STILL) ** 2))


def _run(probabilities: Tensor, trust: Tensor, order: range, neighbour: int) -> Tensor:
    smooth = probabilities.clone()
    for index in order:
        weight = trust[min(index, index + neighbour)]
        smooth[index] = torch.lerp(smooth[index], smooth[index + neighbour], weight)
    return smooth
