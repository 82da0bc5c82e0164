"""Random choices of one scene: places, shapes, and the colour of every part with the words that name it."""

from __future__ import annotations

import numpy as np

from .canvas import Color

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (200, 40, 40),
    "orange": (236, 140, 40),
    "yellow": (240, 214, 70),
    "green": (60, 150, 70),
    "teal": (50, 165, 165),
    "blue": (50, 85, 190),
    "purple": (130, 65, 165),
    "pink": (240, 150, 185),
    "brown": (125, 80, 45),
    "black": (35, 35, 40),
    "white": (240, 240, 236),
    "gray": (135, 138, 142),
}


class Painter:
    """Random choices of one scene: the generator, the colour of every part and the words that name them."""

    mane = False  # horses in the natural style have one

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.names: dict[str, str] = {}
        self.colors: dict[str, Color] = {}

    def choose(self, part: str, differs_from: tuple[str, ...] = ()) -> Color:
        """Draw a named colour for ``part`` that differs from its neighbours', and jitter it."""
        taken = {self.names[other] for other in differs_from}
        name = str(self.rng.choice([c for c in COLORS if c not in taken]))
        self.names[part] = name
        jitter = self.rng.normal(0, 9, 3) + self.rng.normal(0, 8)
        r, g, b = (int(min(255, max(0, c + j))) for c, j in zip(COLORS[name], jitter, strict=True))
        self.colors[part] = (r, g, b)
        return self.colors[part]

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def flip(self) -> bool:
        return bool(self.rng.random() < 0.5)
