"""Edge-aware refinement of soft maps with the image."""

from __future__ import annotations

from inspect import signature

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..images import resize_maps

RADIUS = 2.0  # of the filter, in cells of the map's grid; chosen on the tiny model's validation scenes
GROUP = 8  # maps filtered at once: with many right-hand sides LAPACK hands its small systems to threads, far slower
EDGE = 1e-3  # variance of the image below which it counts as flat


def refine_maps(maps: Tensor, images: Tensor, method: str) -> Tensor:
    """Bring part probabilities to the images' size along the images' edges (guided filter, He et al. 2010).

    Args:
        maps: [B, K, h, w].
        images: [B, H, W, 3] in [0, 1].
        method: "off" (bilinear), "fast" (coefficients at a quarter of the size) or "best" (full size).

    Returns:
        [B, K, H, W], summing to 1 over K.
    """
    height, width = images.shape[1:3]
    smooth = resize_maps(maps, (height, width))
    if method == "off":
        return smooth
    cell = max(height / maps.shape[-2], width / maps.shape[-1])
    subsample = max(1, round(cell / 4)) if method == "fast" else 1
    shortest = min(height, width) // subsample
    radius = max(1, min(round(RADIUS * cell), (shortest // 2 - 1) * subsample))
    guide = images.movedim(-1, 1).to(smooth)
    groups = [_guided_filter(guide, part, 2 * radius + 1, subsample) for part in smooth.split(GROUP, 1)]
    refined = torch.cat(groups, 1)
    refined = torch.nan_to_num(refined).clamp(min=0)
    return refined / refined.sum(1, keepdim=True).clamp(min=1e-6)


def _guided_filter(guide: Tensor, maps: Tensor, size: int, subsample: int) -> Tensor:
    """Kornia's filter, from 0.7.1 on: before 0.9 it is slower, and wants multiples of ``subsample``."""
    from kornia.filters import guided_blur  # imported late: it adds to ComfyUI's start

    height, width = guide.shape[-2:]
    more = (0, -width % subsample, 0, -height % subsample)
    guide, maps = (F.pad(x, more, mode="replicate") if any(more) else x for x in (guide, maps))
    quick = {"separable": True} if "separable" in signature(guided_blur).parameters else {}
    return guided_blur(guide, maps, size, EDGE, subsample=subsample, **quick)[..., :height, :width]
