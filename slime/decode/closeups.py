"""Find small objects by close-ups: windows around the densest spots of the coarse maps are segmented again.

A UNet knows an object best at the size it usually has in images. A close-up counts if it is more confident of its parts
than the whole image was. The paper names small parts as its limitation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize_image

CONFIDENCE_LIMIT = 0.8  # of the confidence on the examples; images below it get close-ups
WINDOW_SIDES = (0.75, 0.56, 0.42, 0.33, 0.25)  # sides of the windows relative to the image's
SECOND_OBJECT = 0.85  # least confidence of a further object, relative to the most confident one
EXTRA_SPOTS = 1  # spots tried beyond the number of objects: the coarse maps may miss small ones
BORDER_PENALTY = 0.5  # weight of parts that touch the window's border, in its confidence
LARGEST_OVERLAP = 0.2  # largest overlap of two windows that count as two objects


class Window(NamedTuple):
    """A box in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Tensor) -> Tensor:
        """Cut the window out of an image [H, W, ...]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]

    def overlap(self, other: Window) -> float:
        """Return the shared area relative to the smaller window."""
        high = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        return max(0, high) * max(0, wide) / min(self.height * self.width, other.height * other.width)


class Closeup(NamedTuple):
    """A window and the part maps [K, h, w] found in it."""

    window: Window
    maps: Tensor


def needs_closeups(peaks: Tensor, example_confidence: float) -> Tensor:
    """Return bool [B]: images whose part peaks [B, P] stay below those of the examples (0 if unknown)."""
    return peaks.mean(1) < CONFIDENCE_LIMIT * (example_confidence or 1.0)


def window_confidence(maps: Tensor) -> Tensor:
    """Score how well part maps [B, K, h, w] resemble a whole object, [B]: mean peak of the parts minus the share of
    the border that is part."""
    peaks = maps[:, 1:].amax((2, 3)).mean(1)
    inside = (maps.argmax(1) > 0).float()
    edges = (inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1])
    return peaks - BORDER_PENALTY * torch.stack([edge.mean(1) for edge in edges]).mean(0)


def spots(foreground: Tensor, factor: float, count: int) -> list[tuple[float, float]]:
    """Return centres (y, x) in [0, 1] of the ``count`` densest windows of a map [h, w], at least a window apart."""
    height, width = foreground.shape
    kernel = (max(1, round(height * factor / 2)) | 1, max(1, round(width * factor / 2)) | 1)
    padding = (kernel[0] // 2, kernel[1] // 2)
    density = F.avg_pool2d(foreground[None, None].float(), kernel, 1, padding)[0, 0]
    centres = []
    for _ in range(count):
        y, x = divmod(int(density.argmax()), width)
        if density[y, x] <= 0:
            break
        centres.append(((y + 0.5) / height, (x + 0.5) / width))
        reach = (max(1, round(height * factor)), max(1, round(width * factor)))
        density[max(0, y - reach[0] + 1) : y + reach[0], max(0, x - reach[1] + 1) : x + reach[1]] = 0
    return centres


def candidate_windows(coarse: Tensor, size: tuple[int, int], objects: int) -> list[Window]:
    """Return windows of every factor around the densest spots of coarse part maps [K, h, w] of an image of ``size``."""
    windows = []
    for factor in WINDOW_SIDES:
        height, width = max(8, round(size[0] * factor)), max(8, round(size[1] * factor))
        for y, x in spots(1 - coarse[0], factor, objects + EXTRA_SPOTS):
            top = min(max(round(y * size[0] - height / 2), 0), max(size[0] - height, 0))
            left = min(max(round(x * size[1] - width / 2), 0), max(size[1] - width, 0))
            windows.append(Window(top, left, min(height, size[0]), min(width, size[1])))
    return list(dict.fromkeys(windows))


def window_images(image: Tensor, windows: Sequence[Window]) -> Tensor:
    """Cut windows out of an image [H, W, 3], enlarged to the image's size: [N, H, W, 3]."""
    size = (image.shape[0], image.shape[1])
    return torch.cat([resize_image(window.cut(image)[None], size) for window in windows])


def choose_closeups(windows: Sequence[Window], maps: Tensor, coarse: Tensor, objects: int) -> list[Closeup]:
    """Return the windows that are more confident than the whole image was, the most confident first.

    Args:
        windows: N candidates.
        maps: their part maps [N, K, h, w].
        coarse: part maps [K, h, w] of the whole image.
        objects: largest number of windows.
    """
    confidence = window_confidence(maps).tolist()
    least = max(float(window_confidence(coarse[None])), SECOND_OBJECT * max(confidence))
    chosen: list[int] = []
    for index in sorted(range(len(windows)), key=lambda i: -confidence[i]):
        apart = all(windows[index].overlap(windows[other]) < LARGEST_OVERLAP for other in chosen)
        if len(chosen) < objects and apart and confidence[index] > least:
            chosen.append(index)
    return [Closeup(windows[index], maps[index]) for index in chosen]


def paste_closeups(
    blank: Tensor, image: Tensor, closeups: Sequence[Closeup], refine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Paste the parts of close-ups into ``blank`` [..., H, W], which is changed and returned.

    Args:
        blank: result for an image [H, W, 3] without any part, as ``refine`` gives it.
        image: [H, W, 3].
        closeups: the most confident first.
        refine: brings maps [1, K, h, w] to the size of their image [1, H, W, 3].
    """
    for window, maps in reversed(closeups):  # the most confident last, on top
        pasted = refine(maps[None].to(blank.device), window.cut(image)[None])[0]
        blank[..., window.top : window.top + window.height, window.left : window.left + window.width] = pasted
    return blank


def closeup_peaks(coarse: Tensor, closeups: Sequence[Closeup]) -> Tensor:
    """Return the highest value of every part [P] in the close-ups, or in the coarse maps [K, h, w] where none."""
    counted = torch.stack([closeup.maps for closeup in closeups]) if closeups else coarse[None]
    return counted[:, 1:].amax((0, 2, 3))
