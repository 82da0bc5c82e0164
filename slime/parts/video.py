"""Smooth the parts of video frames over time."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .maps import DenseMaps, PartMaps

STILL = 0.06  # mean colour difference at which the weight of the frame before is halved
BLUR = 9  # pixels over which differences are averaged
MATCHED_SIDE, REACH = 256, 4  # longer side at which motion is looked for, and the largest motion there in pixels
STAY = 0.0005  # cost of a pixel of motion, so that noise does not move what stands still
MARGIN = 0.4  # of probability by which another part must win where the picture stands still, at strength 1


class VideoSmoother:
    """Smooths the probabilities of a video's frames, one after the other; needs no later frames.

    Each pixel is averaged with the place in the frame before that it came from (block matching of colours), and the
    label of the frame before has an advantage where nothing moves.
    """

    def __init__(self, strength: float) -> None:
        """``strength``: weight of the frame before where the picture is the same, in [0, 1); 0 changes nothing."""
        self._strength = strength
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # averaged probabilities, labels, frame

    def __call__(self, probabilities: Tensor, frame: Tensor) -> Tensor:
        """Return the smoothed probabilities [K, H, W] of the next frame [H, W, 3]; another size starts anew."""
        if self._strength <= 0:
            return probabilities
        smooth = probabilities
        if self._last is not None and self._last[2].shape == frame.shape:
            before, labels, last = self._last
            source, fit = _sources(last, frame)
            probabilities = torch.lerp(probabilities, before.flatten(1)[:, source], self._strength * fit)
            margin = MARGIN * self._strength * stillness(last, frame)
            smooth = probabilities + margin * F.one_hot(labels, len(probabilities)).movedim(-1, 0)
            smooth = smooth / (1 + margin)
        self._last = probabilities, smooth.argmax(0), frame
        return smooth

    def set_labels(self, labels: Tensor) -> None:
        """Take other labels [H, W] for those of the last frame, as when a video goes on from what was written."""
        if self._last is not None:
            self._last = self._last[0], labels.long(), self._last[2]


def smooth_video_parts(maps: PartMaps, frames: Tensor, strength: float = 0.7) -> PartMaps:
    """Smooth the maps of frames with :class:`VideoSmoother`. All are in memory at full size meanwhile.

    Args:
        maps: of the frames in order, segmented with the same noise (one batch, one seed).
        frames: [B, H, W, 3] in [0, 1].
        strength: see :class:`VideoSmoother`.
    """
    if strength <= 0 or len(frames) < 2:
        return maps
    smoother = VideoSmoother(strength)
    smooth = [smoother(*pair) for pair in zip(maps.probabilities, frames, strict=True)]
    return replace(maps, full_size=DenseMaps(torch.stack(smooth)))


def stillness(last: Tensor, frame: Tensor) -> Tensor:
    """Return [H, W] for frames [H, W, 3]: 1 where nothing changed, towards 0 where colours differ."""
    return _weight(_blurred((frame - last).abs().mean(-1)[None, None])[0, 0])


def _sources(last: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the pixels of a frame came from.

    Returns:
        Index int64 [H, W] of a pixel of the frame before, and [H, W] in [0, 1], how well their surroundings fit.
    """
    size = height, width = frame.shape[:2]
    scale = max(1.0, max(size) / MATCHED_SIDE)
    small = [max(1, round(side / scale)) for side in size]
    now, before = (F.interpolate(image.movedim(-1, 0)[None], small, mode="area") for image in (frame, last))
    before = F.pad(before, (REACH,) * 4, mode="replicate")
    best = torch.full((1, 1, *small), torch.inf)
    shift = torch.zeros(1, 2, *small)
    for y, x in product(range(-REACH, REACH + 1), repeat=2):
        moved = before[..., REACH + y : REACH + y + small[0], REACH + x : REACH + x + small[1]]
        cost = _blurred((now - moved).abs().mean(1, keepdim=True)) + STAY * (abs(y) + abs(x))
        better = cost < best
        best = torch.where(better, cost, best)
        shift = torch.where(better, torch.tensor([float(y), float(x)])[:, None, None], shift)
    y, x = (F.interpolate(shift, size, mode="nearest")[0] * scale).round().long()
    rows, columns = torch.arange(height)[:, None] + y, torch.arange(width) + x
    source = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return source, _weight(F.interpolate(best, size, mode="bilinear", align_corners=False)[0, 0])


def _blurred(difference: Tensor) -> Tensor:
    """Average [1, 1, H, W] over a square, one direction after the other."""
    for size in ((BLUR, 1), (1, BLUR)):
        padding = (size[0] // 2, size[1] // 2)
        difference = F.avg_pool2d(difference, size, 1, padding, count_include_pad=False)
    return difference


def _weight(difference: Tensor) -> Tensor:
    return torch.exp2(-((difference / STILL) ** 2))
