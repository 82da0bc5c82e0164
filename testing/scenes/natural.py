"""The natural style: parts have the colours they usually have, surfaces have texture, light casts shadows.

A third of its scenes keeps freely drawn colours. Captions leave much unsaid and use the word "part". Parts finer than
any that a caption names (hub, hoof, mane, pupil) are labelled too.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from .canvas import Color, shade
from .painter import COLORS, Painter

FREE_SHARE = 1 / 3  # share of the scenes whose colours are drawn freely
# Usual colours of every part with their weights; parts that resemble another part are in ALIKE.
TONES = {"pale": (238, 206, 180), "tan": (205, 160, 125), "dark": (96, 62, 44)}
USUAL: dict[str, dict[str, float]] = {
    "body": {
        "white": 3,
        "gray": 3,
        "black": 3,
        "red": 2,
        "blue": 2,
        "green": 1,
        "yellow": 1,
        "brown": 1,
        "orange": 0.5,
    },
    "window": {"black": 3, "blue": 1, "gray": 1, "teal": 0.5},
    "wheel": {"black": 5, "gray": 1},
    "light": {"white": 3, "yellow": 2, "orange": 1},
    "plate": {"white": 4, "yellow": 2},
    "neck+torso": {"brown": 4, "black": 2, "white": 2, "gray": 1.5, "orange": 0.5},
    "tail": {"black": 3, "brown": 2, "white": 1, "yellow": 0.5},
    "skin": {"pale": 3, "tan": 3, "dark": 2, "brown": 1},
    "hair": {"black": 3, "brown": 3, "yellow": 1.5, "gray": 1, "orange": 0.7, "white": 0.5},
    "cloth": {name: 1.0 for name in COLORS},
    "eye": {"brown": 3, "blue": 2, "green": 1, "gray": 1},
    "mouth": {"red": 3, "pink": 2},
}
# Parts in the colour of another part: that part, how often, and the factor of the brightness.
ALIKE = {
    "head": ("neck+torso", 0.8, 0.92),
    "leg": ("neck+torso", 0.6, 0.85),
    "neck": ("skin", 1.0, 0.86),
    "ear": ("skin", 1.0, 0.93),
    "nose": ("skin", 1.0, 0.88),
    "brow": ("hair", 0.9, 0.8),
}
PALETTE = {**COLORS, **TONES}
PART_WORDS = (
    "the {part} part of a {thing}",
    "a {part}, part of a {thing}",
    "a part of a {thing}",
    "parts of a {thing}",
)


class NaturalPainter(Painter):
    """Painter that gives parts their usual colours."""

    mane = True

    def choose(self, part: str, differs_from: tuple[str, ...] = ()) -> Color:
        """Draw a usual colour for ``part``, or one like that of the part it usually resembles."""
        if part in ALIKE:
            other, often, factor = ALIKE[part]
            if self.rng.random() < often:
                self.names[part] = self.names[other]
                self.colors[part] = self._jitter(shade(self.colors[other], factor), 5)
                return self.colors[part]
        table = USUAL.get(part, {name: 1.0 for name in COLORS})
        weights = np.array(list(table.values()))
        name = str(self.rng.choice(list(table), p=weights / weights.sum()))
        self.names[part] = name
        self.colors[part] = self._jitter(PALETTE[name], 12)
        return self.colors[part]

    def _jitter(self, color: Color, spread: float) -> Color:
        moved = np.array(color) + self.rng.normal(0, spread, 3) + self.rng.normal(0, spread)
        r, g, b = (int(value) for value in moved.clip(0, 255))
        return r, g, b


class FreePainter(Painter):
    """Painter that draws colours freely in the natural style."""

    mane = True


def natural_painter(rng: np.random.Generator) -> Painter:
    return FreePainter(rng) if rng.random() < FREE_SHARE else NaturalPainter(rng)


def texture(rng: np.random.Generator, size: int, finest: int) -> np.ndarray:
    """Return smooth noise of several scales, [size, size], mean about 0, deviation about 1."""
    total = np.zeros((size, size), np.float32)
    cells, weight, power = 4, 1.0, 0.0
    while cells <= finest:
        layer = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        total += weight * np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC))
        power += weight**2
        cells, weight = cells * 2, weight * 0.8
    return total / (0.75 * power**0.5)


def light_naturally(image: Image.Image, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add textures of object and surroundings, light from one side, a cast shadow, soft focus and camera noise."""
    size = image.width
    inside: np.ndarray = np.asarray(
        Image.fromarray(((labels > 0) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7)), np.float32
    )
    inside = inside[..., None] / 255
    around = texture(rng, size, 64)[..., None] * rng.uniform(0.02, 0.09)
    surface = texture(rng, size, int(rng.choice([16, 32, 64])))[..., None] * rng.uniform(0.01, 0.05)
    field = Image.fromarray(rng.uniform(0.8, 1.15, (3, 3)).astype(np.float32))
    light: np.ndarray = np.asarray(field.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    if rng.random() < 0.5:
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
        angle, offset, soft = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.35), rng.uniform(0.01, 0.08)
        side = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) - offset
        shadow = 1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-side / soft))
        light = (light * shadow[..., None]).astype(np.float32)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 1.0)))), np.float32)
    pixels = pixels * light * (1 + around * (1 - inside) + surface * inside)
    return np.clip(pixels + rng.normal(0, 3.0, (size, size, 1)), 0, 255).astype(np.uint8)


def sparse_caption(domain: str, painter: Painter, place: str, main: str, plural: dict[str, str]) -> str:
    """Return a caption that names some parts, more if colours are free; a quarter of the captions has "part"."""
    rng, kind = painter.rng, painter.rng.random()
    others = [part for part in painter.names if part != main]
    rng.shuffle(others)
    if kind < 0.25:
        pattern = str(rng.choice(PART_WORDS))
        text = pattern.format(part=others[0], thing=domain)
        return f"{text}, {painter.names[others[0]]} {others[0]} part" if rng.random() < 0.3 else text
    color = f"{painter.names[main]} " if rng.random() < 0.6 else ""
    text = f"{'a photo of ' if rng.random() < 0.3 else ''}a {color}{domain}"
    often = 0.8 if isinstance(painter, FreePainter) else 0.5  # unusual colours are worth naming
    named = [f"{painter.names[part]} {plural.get(part, part)}" for part in others if rng.random() < often]
    if kind < 0.8 and named:
        text = f"{text} with {', '.join(named)}"
    return f"{text} on {place}" if rng.random() < 0.5 else text
