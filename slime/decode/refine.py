"""Refine soft maps along the edges of the image: the guided filter (He et al. 2010), fast (He and Sun 2015).

In every window each map is fitted as a linear function of the image's colour. The coefficients are computed at half of
a map's cell, averaged, resized to full size and applied to the pixels. Full size is processed in strips of rows, which
fit the CPU cache: moving memory takes most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import as_rgb, most_probable, resize_maps

RADIUS = 2.0  # of the filter, in cells of the map's grid; chosen on the tiny model's validation scenes
EDGE = 1e-3  # variance of the image below which it counts as flat
STRIP = 2**20  # values per strip


def refine_maps(maps: Tensor, images: Tensor, method: str) -> Tensor:
    """Upsample part probabilities to the images' size along the images' edges.

    Args:
        maps: [B, K, h, w].
        images: [B, H, W, 1, 3 or 4] in [0, 1].
        method: "off" (bilinear), "fast" (coefficients at half of a cell) or "best" (at full size).

    Returns:
        [B, K, H, W], summing to 1 over K.
    """
    refined = torch.empty(*maps.shape[:2], *images.shape[1:3], device=maps.device)
    for rows, strip in _strips(maps, images, method):
        strip = strip.clamp(min=0)
        refined[:, :, rows] = strip / strip.sum(1, keepdim=True).clamp(min=1e-6)
    return refined


def refined_labels(maps: Tensor, images: Tensor, method: str) -> Tensor:
    """Return the most probable class of every pixel of :func:`refine_maps`, uint8 [B, H, W], without computing it."""
    labels = torch.empty(len(maps), *images.shape[1:3], dtype=torch.uint8, device=maps.device)
    for rows, strip in _strips(maps, images, method):
        strip[:, 0].clamp_(min=0)  # where all classes are 0 it is background
        labels[:, rows] = most_probable(strip)
    return labels


def _strips(maps: Tensor, images: Tensor, method: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of full-size pixels with their maps [B, K, rows, W], before normalisation."""
    height, width = images.shape[1:3]
    coefficients = None if method == "off" else _fit(maps.float(), images, method)
    wide = _Rows.of(maps.float() if coefficients is None else coefficients.flatten(1, 2), height, width)
    step = max(1, STRIP // (wide.values[:, :, 0].numel()))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        strip = wide[rows]
        if coefficients is not None:
            *slopes, strip = strip.unflatten(1, (4, -1)).unbind(1)
            for slope, channel in zip(slopes, as_rgb(images[:, rows]).split(1, -1), strict=True):
                strip.addcmul_(slope, channel[:, None, ..., 0].to(strip))
        yield rows, strip


@dataclass(frozen=True)
class _Rows:
    """Maps resized to an image's width, whose rows are computed on demand: a bilinear resize in strips."""

    values: Tensor  # [B, C, h, W]
    height: int

    @classmethod
    def of(cls, maps: Tensor, height: int, width: int) -> _Rows:
        return cls(resize_maps(maps, (maps.shape[2], width)), height)

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows of the enlarged maps, [B, C, rows, W]."""
        count = self.values.shape[2]
        if count == self.height:
            return self.values[:, :, rows].clone()
        place = torch.arange(rows.start, rows.stop, device=self.values.device) + 0.5
        place = (place * (count / self.height) - 0.5).clamp(min=0)
        above = place.long()
        below = (above + 1).clamp(max=count - 1)
        weight = (place - above).to(self.values)[:, None]
        return self.values.index_select(2, above).lerp_(self.values.index_select(2, below), weight)


def _fit(maps: Tensor, images: Tensor, method: str) -> Tensor:
    """Return the coefficients of red, green and blue, and a constant: [B, 4, K, h, w]."""
    height, width = images.shape[1:3]
    cell = max(height / maps.shape[-2], width / maps.shape[-1])
    step = max(1, round(cell / 2)) if method == "fast" else 1
    size = (-(-height // step), -(-width // step))
    color = F.interpolate(as_rgb(images).movedim(-1, 1), size, mode="area").contiguous()
    maps = resize_maps(maps, size)
    radius, count = max(1, round(RADIUS * cell / step)), maps.shape[1]
    red, green, blue = channels = color.split(1, 1)
    products = [red * red, green * green, blue * blue, red * green, red * blue, green * blue]
    means = _box(torch.cat([color, maps, *products, *(channel * maps for channel in channels)], 1), radius)
    mean, maps, products, crossed = means.split([3, count, 6, 3 * count], 1)
    red, green, blue = channels = mean.split(1, 1)
    rr, gg, bb, rg, rb, gb = products.split(1, 1)
    # The covariance of the colours is symmetric, and inverted by its cofactors.
    rr, gg, bb = rr - red * red + EDGE, gg - green * green + EDGE, bb - blue * blue + EDGE
    rg, rb, gb = rg - red * green, rb - red * blue, gb - green * blue
    inverse = (
        (gg * bb - gb * gb, rb * gb - rg * bb, rg * gb - rb * gg),
        (rb * gb - rg * bb, rr * bb - rb * rb, rb * rg - rr * gb),
        (rg * gb - rb * gg, rb * rg - rr * gb, rr * gg - rg * rg),
    )
    determinant = rr * inverse[0][0] + rg * inverse[0][1] + rb * inverse[0][2]
    with_maps = [both - channel * maps for both, channel in zip(crossed.split(count, 1), channels, strict=True)]
    slopes = [(x * with_maps[0] + y * with_maps[1] + z * with_maps[2]) / determinant for x, y, z in inverse]
    constant = maps - red * slopes[0] - green * slopes[1] - blue * slopes[2]
    return _box(torch.cat([*slopes, constant], 1), radius).unflatten(1, (4, count))


def _box(maps: Tensor, radius: int) -> Tensor:
    """Average [B, C, h, w] over squares of (2 radius + 1) x (2 radius + 1), clipped at the image's border."""
    for dim, before in ((-1, ()), (-2, (0, 0))):
        length = maps.shape[dim]
        place = torch.arange(length, device=maps.device)
        inside = 1 + (place + radius).clamp(max=length - 1) - (place - radius).clamp(min=0)
        sums = F.pad(maps, (*before, radius + 1, radius)).cumsum(dim)
        maps = sums.narrow(dim, 2 * radius + 1, length) - sums.narrow(dim, 0, length)
        maps = maps / (inside if dim == -1 else inside[:, None])
    return maps
