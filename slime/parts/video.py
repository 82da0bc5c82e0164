"""Smooth the parts of video frames over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import most_probable
from .maps import DenseMaps, PartMaps

STILL = 0.06  # mean colour difference at which the weight of the frame before is halved
BLUR = 9  # pixels over which differences are averaged
MATCHED_SIDE, REACH = 256, 4  # longer side at which motion is looked for, and the largest motion there in pixels
STAY = 0.0005  # cost of a pixel of motion, so that noise does not move what stands still
MOVED = 0.02  # by so much the colours of another place fit better where something moves
MARGIN = 0.4  # of probability by which another part must win where nothing moves, at strength 1
PATIENCE = 0.85  # of the margin that is left after every frame in which the other part was more probable


class VideoSmoother:
    """Smooths the probabilities of a video's frames, one after the other; needs no later frames.

    Each pixel is averaged with the place in the frame before that it came from (block matching of colours), and the
    label of the frame before has an advantage for some frames where nothing moves.

    Attributes:
        labels: uint8 [H, W] of the last frame.
    """

    labels: Tensor

    def __init__(self, strength: float) -> None:
        """Start before the first frame; ``strength`` in [0, 1) is the weight of the frame before, 0 is none."""
        self._strength = strength
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # frame, averaged probabilities, age of the labels

    def __call__(self, probabilities: Tensor, frame: Tensor) -> Tensor:
        """Return the smoothed probabilities float32 [K, H, W] of the next frame [H, W, 3] on the same device.

        Another size starts anew.
        """
        probabilities = smooth = probabilities.float()
        age = torch.zeros_like(frame[..., 0])
        if self._strength > 0 and self._last is not None and self._last[0].shape == frame.shape:
            last, before, age = self._last
            motion = _motion(last, frame)
            probabilities = torch.lerp(probabilities, before.flatten(1)[:, motion.source], self._strength * motion.fit)
            margin = MARGIN * self._strength * motion.rest * PATIENCE**age
            smooth = probabilities.clone()
            smooth.scatter_add_(0, self.labels[None].long(), margin[None])
            smooth /= 1 + margin
        found = most_probable(smooth[None])[0]
        if smooth is not probabilities:
            age = torch.where(most_probable(probabilities[None])[0] == found, 0.0, age + 1)
        self.labels, self._last = found, (frame, probabilities, age)
        return smooth


def smooth_video_parts(
    maps: PartMaps, frames: Tensor, strength: float = 0.7, on_frame: Callable[[int], None] = lambda done: None
) -> PartMaps:
    """Smooth the maps of frames with :class:`VideoSmoother`. All are in memory at full size meanwhile.

    Args:
        maps: of the frames in order, segmented with the same noise (one batch, one seed).
        frames: [B, H, W, 3] in [0, 1].
        strength: see :class:`VideoSmoother`.
        on_frame: called with the number of finished frames; an exception from it ends the work.
    """
    if strength <= 0 or len(frames) < 2:
        return maps
    smoother, smooth = VideoSmoother(strength), torch.empty(maps.source.shape)
    for index, frame in enumerate(frames):
        smooth[index] = smoother(maps.source(slice(index, index + 1))[0], frame)
        on_frame(index + 1)
    return replace(maps, source=DenseMaps(smooth))


class Motion(NamedTuple):
    """How a frame follows from the one before.

    Attributes:
        source: int64 [H, W], index of the pixel of the frame before that a pixel came from.
        fit: [H, W] in [0, 1], how well the colours there fit.
        rest: [H, W] in [0, 1], how likely nothing moves and nothing changes.
    """

    source: Tensor
    fit: Tensor
    rest: Tensor


def _motion(last: Tensor, frame: Tensor) -> Motion:
    """Match blocks of colours of two frames [H, W, 3], first coarsely, then in steps half as wide."""
    size = height, width = frame.shape[0], frame.shape[1]
    pictures = torch.stack([frame, last]).movedim(-1, 1)
    scale = max(1.0, max(size) / MATCHED_SIDE)
    shift = torch.zeros(2, 1, 1, device=frame.device)
    for reach, step in ((REACH, scale), (1, max(1.0, scale / 2))):
        small = [max(1, round(side / step)) for side in size]
        now, before = F.interpolate(pictures, small, mode="area")
        base = _nearest(shift, small) / step
        best, chosen = torch.full(small, torch.inf, device=frame.device), base
        stay = _blurred((now - before).abs().mean(0))
        for y, x in product(range(-reach, reach + 1), repeat=2):
            moved = torch.stack([base[0] + y, base[1] + x])
            differences = (now - before.flatten(1)[:, _places(moved, small)]).abs().mean(0)
            cost = _blurred(differences) + STAY * moved.abs().sum(0)
            chosen, best = torch.where(cost < best, moved, chosen), torch.minimum(cost, best)
        shift = chosen * step
        if scale == 1:
            break
    source = _places(_nearest(shift, [height, width]), [height, width])
    rest = _weight(stay) * torch.exp2(-(((stay - best).clamp(min=0) / MOVED) ** 2))
    fit, rest = F.interpolate(torch.stack([_weight(best), rest])[None], size, mode="bilinear", align_corners=False)[0]
    return Motion(source, fit, rest)


def _nearest(shift: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(shift[None], size, mode="nearest")[0]


def _places(shift: Tensor, size: list[int]) -> Tensor:
    """Return the index int64 [H, W] of every pixel's place, shifted by [2, H, W] and kept in the picture."""
    y, x = (torch.arange(side, device=shift.device) for side in size)
    rows = (y[:, None] + shift[0].round().long()).clamp(0, size[0] - 1)
    return rows * size[1] + (x + shift[1].round().long()).clamp(0, size[1] - 1)


def _blurred(difference: Tensor) -> Tensor:
    """Average [H, W] over a square, one direction after the other."""
    difference = difference[None, None]
    for size in ((BLUR, 1), (1, BLUR)):
        padding = (size[0] // 2, size[1] // 2)
        difference = F.avg_pool2d(difference, size, 1, padding, count_include_pad=False)
    return difference[0, 0]


def _weight(difference: Tensor) -> Tensor:
    return torch.exp2(-((difference / STILL) ** 2))
