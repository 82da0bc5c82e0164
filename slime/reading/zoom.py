"""Small objects: look again, closer, where the first look saw something, and keep what is surest.

A UNet knows an object best at the size it usually has in pictures. Windows of several sizes around the densest spots
of the first look are segmented as pictures of their own; a window counts when it is surer of its parts than the whole
image was. The paper names small parts as its limitation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..images import resize_image

UNSURE = 0.8  # share of the examples' sureness, below which an image is looked at more closely
FACTORS = (0.75, 0.56, 0.42, 0.33, 0.25)  # sides of the windows relative to the image's
SECOND = 0.85  # a further object must be at least this sure, relative to the surest
SPARE = 1  # more spots are looked at than objects are wanted: the first look errs on small ones
BORDER = 0.5  # weight of parts that touch the window's border, in the sureness


class Window(NamedTuple):
    """A box in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Tensor) -> Tensor:
        """[H, W, ...] -> [height, width, ...]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]

    def overlap(self, other: Window) -> float:
        """Shared area relative to the smaller window."""
        high = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        return max(0, high) * max(0, wide) / min(self.height * self.width, other.height * other.width)


def unsure(highest: Tensor, examples: float) -> Tensor:
    """Images [B] that deserve closer looks: their parts' peaks [B, P] stay behind those of the ``examples``, 0 if
    unknown."""
    return highest.mean(1) < UNSURE * (examples or 1.0)


def sureness(maps: Tensor) -> Tensor:
    """How much part maps [B, K, h, w] look like a whole object: mean peak of the parts less the share of the border
    that is part: [B]."""
    peaks = maps[:, 1:].amax((2, 3)).mean(1)
    part = (maps.argmax(1) > 0).float()
    border = torch.stack([part[:, 0].mean(1), part[:, -1].mean(1), part[:, :, 0].mean(1), part[:, :, -1].mean(1)])
    return peaks - BORDER * border.mean(0)


def spots(foreground: Tensor, factor: float, count: int) -> list[tuple[float, float]]:
    """Centres (y, x) in [0, 1] of the ``count`` densest windows of a map [h, w], at least a window apart."""
    height, width = foreground.shape
    kernel = (max(1, round(height * factor / 2)) | 1, max(1, round(width * factor / 2)) | 1)
    padding = (kernel[0] // 2, kernel[1] // 2)
    density = F.avg_pool2d(foreground[None, None].float(), kernel, 1, padding)[0, 0]
    found = []
    for _ in range(count):
        y, x = divmod(int(density.argmax()), width)
        if density[y, x] <= 0:
            break
        found.append(((y + 0.5) / height, (x + 0.5) / width))
        reach = (max(1, round(height * factor)), max(1, round(width * factor)))
        density[max(0, y - reach[0] + 1) : y + reach[0], max(0, x - reach[1] + 1) : x + reach[1]] = 0
    return found


def windows(foreground: Tensor, size: tuple[int, int], count: int) -> list[Window]:
    """Windows of every factor around the densest spots of a map [h, w] of an image of ``size``."""
    found = []
    for factor in FACTORS:
        height, width = max(8, round(size[0] * factor)), max(8, round(size[1] * factor))
        for y, x in spots(foreground, factor, count):
            top = min(max(round(y * size[0] - height / 2), 0), max(size[0] - height, 0))
            left = min(max(round(x * size[1] - width / 2), 0), max(size[1] - width, 0))
            found.append(Window(top, left, min(height, size[0]), min(width, size[1])))
    return list(dict.fromkeys(found))


class Seen(NamedTuple):
    """What a closer look showed: its window and the part maps [K, h, w] there."""

    window: Window
    maps: Tensor


def look_closer(look: Callable[[Tensor], Tensor], image: Tensor, coarse: Tensor, objects: int) -> list[Seen]:
    """Windows of an image that are surer of their parts than its first look was, the surest first.

    Args:
        look: part maps [B, K, h, w] of images [B, H, W, 3].
        image: [H, W, 3].
        coarse: part maps [K, h, w] of the whole image.
        objects: windows that may count.
    """
    height, width = image.shape[:2]
    candidates = windows(1 - coarse[0], (height, width), objects + SPARE)
    if not candidates:
        return []
    crops = torch.cat([resize_image(window.cut(image)[None], (height, width)) for window in candidates])
    maps = look(crops)
    sure = sureness(maps).tolist()
    first = float(sureness(coarse[None]))
    chosen: list[int] = []
    for index in sorted(range(len(candidates)), key=lambda i: -sure[i]):
        apart = all(candidates[index].overlap(candidates[other]) < 0.2 for other in chosen)
        if len(chosen) < objects and apart and sure[index] > max(first, SECOND * max(sure)):
            chosen.append(index)
    return [Seen(candidates[index], maps[index]) for index in chosen]


def compose(blank: Tensor, image: Tensor, closer: Sequence[Seen], refine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What closer looks showed, in its place in ``blank`` [..., H, W], which is changed.

    Args:
        blank: an image [H, W, 3] without any part, as ``refine`` gives it.
        image: [H, W, 3].
        closer: the surest first.
        refine: finishes maps [1, K, h, w] with their image [1, H, W, 3].
    """
    for window, maps in reversed(closer):  # the surest last, on top
        part = refine(maps[None].to(blank.device), window.cut(image)[None])[0]
        blank[..., window.top : window.top + window.height, window.left : window.left + window.width] = part
    return blank


def peaks(coarse: Tensor, closer: Sequence[Seen]) -> Tensor:
    """Highest value of every part [P] in the maps that count."""
    counted = torch.stack([one.maps for one in closer]) if closer else coarse[None]
    return counted[:, 1:].amax((0, 2, 3))
