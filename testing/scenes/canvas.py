"""Polygons drawn in colour and in integer labels at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 256
SUPERSAMPLING = 2

Point = tuple[float, float]
Color = tuple[int, int, int]


class Canvas:
    """Canvas that draws polygons in colour and in their labels at once.

    Coordinates are in units of the image's side, y down.
    """

    def __init__(self, size: int) -> None:
        self.side = size * SUPERSAMPLING
        self.color = Image.new("RGB", (self.side, self.side))
        self.label = Image.new("L", (self.side, self.side))
        self.fine = Image.new("L", (self.side, self.side))
        self._draw_color = ImageDraw.Draw(self.color)
        self._draw_label = ImageDraw.Draw(self.label)
        self._draw_fine = ImageDraw.Draw(self.fine)

    def polygon(self, points: list[Point], color: Color, label: int | None, fine: int = 0) -> None:
        """Fill a polygon; ``label`` None leaves the labels as they are.

        ``fine`` labels parts that captions never name.
        """
        xy = [(x * self.side, y * self.side) for x, y in points]
        self._draw_color.polygon(xy, fill=color)
        if label is not None:
            self._draw_label.polygon(xy, fill=label)
            self._draw_fine.polygon(xy, fill=fine)

    def finish(self, size: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """Return the image at its size, its labels and its fine labels."""
        image = self.color.resize((size, size), Image.Resampling.BOX)
        offset = SUPERSAMPLING // 2
        labels, fine = (
            np.asarray(layer)[offset::SUPERSAMPLING, offset::SUPERSAMPLING].copy() for layer in (self.label, self.fine)
        )
        return image, labels, fine


@dataclass(frozen=True)
class Frame:
    """Placement of an object: rotate by ``angle``, mirror, scale, move; object coordinates are y down, about +-0.5."""

    x: float
    y: float
    scale: float
    angle: float = 0.0
    mirror: bool = False

    def __call__(self, points: list[Point]) -> list[Point]:
        c, s = math.cos(self.angle), math.sin(self.angle)
        sign = -1.0 if self.mirror else 1.0
        placed = []
        for px, py in points:
            px *= sign
            placed.append((self.x + self.scale * (c * px - s * py), self.y + self.scale * (s * px + c * py)))
        return placed


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, n: int = 36) -> list[Point]:
    c, s = math.cos(angle), math.sin(angle)
    points = []
    for i in range(n):
        a = 2 * math.pi * i / n
        px, py = rx * math.cos(a), ry * math.sin(a)
        points.append((x + c * px - s * py, y + s * px + c * py))
    return points


def limb(start: Point, end: Point, r0: float, r1: float) -> list[Point]:
    """Return a tapered capsule from ``start`` (radius r0) to ``end`` (radius r1)."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    points = []
    for i in range(9):
        a = angle + math.pi / 2 + math.pi * i / 8
        points.append((start[0] + r0 * math.cos(a), start[1] + r0 * math.sin(a)))
    for i in range(9):
        a = angle - math.pi / 2 + math.pi * i / 8
        points.append((end[0] + r1 * math.cos(a), end[1] + r1 * math.sin(a)))
    return points


def shade(color: Color, factor: float) -> Color:
    r, g, b = (int(min(255, max(0, c * factor))) for c in color)
    return r, g, b
