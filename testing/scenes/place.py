"""Surroundings of an object: ground and sky, clutter, an occluding bar, light and noise of the camera."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import Canvas, Color, ellipse, shade
from .painter import COLORS, Painter

# Ground or wall below the horizon, sky or wall above it.
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sand": ((214, 190, 140), (150, 195, 230)),
    "grass": ((105, 155, 80), (160, 205, 240)),
    "snow": ((228, 233, 240), (185, 200, 220)),
    "asphalt": ((95, 97, 104), (170, 180, 190)),
    "water": ((70, 125, 165), (205, 220, 230)),
    "earth": ((130, 95, 70), (225, 200, 170)),
}


def paint_background(canvas: Canvas, painter: Painter, place: str, palette: list[Color]) -> None:
    ground, sky = PLACES[place]
    horizon = painter.uniform(0.3, 0.65)
    steps = 12
    for i in range(steps):
        y0, y1 = horizon * i / steps, horizon * (i + 1) / steps
        canvas.polygon([(0, y0), (1, y0), (1, y1 + 0.01), (0, y1 + 0.01)], shade(sky, 0.88 + 0.16 * i / steps), None)
    for i in range(steps):
        y0, y1 = horizon + (1 - horizon) * i / steps, horizon + (1 - horizon) * (i + 1) / steps
        canvas.polygon([(0, y0), (1, y0), (1, y1 + 0.01), (0, y1 + 0.01)], shade(ground, 1.05 - 0.15 * i / steps), None)
    for _ in range(int(painter.rng.integers(4, 10))):
        x, y = painter.uniform(0, 1), painter.uniform(0.05, 1)
        color = shade(ground if y > horizon else sky, painter.uniform(0.7, 1.25))
        if palette or painter.rng.random() < 0.35:
            choices = palette or list(COLORS.values())
            color = choices[int(painter.rng.integers(len(choices)))]
        r = painter.uniform(0.02, 0.11)
        if painter.flip():
            canvas.polygon(ellipse(x, y, r * painter.uniform(0.6, 1.8), r, painter.uniform(0, 3)), color, None)
        else:
            w, h = r * painter.uniform(0.4, 1.6), r * painter.uniform(0.5, 2.0)
            canvas.polygon([(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)], color, None)


def paint_bar(canvas: Canvas, painter: Painter) -> None:
    """Draw a slanted bar (label background) across the middle of the image."""
    x, half, slant = painter.uniform(0.3, 0.7), painter.uniform(0.06, 0.1), painter.uniform(-0.25, 0.25)
    color = list(COLORS.values())[int(painter.rng.integers(len(COLORS)))]
    points = [(x - half - slant, 0.0), (x + half - slant, 0.0), (x + half + slant, 1.0), (x - half + slant, 1.0)]
    xy = [(a * canvas.side, b * canvas.side) for a, b in points]
    ImageDraw.Draw(canvas.color).polygon(xy, fill=color)
    for layer in (canvas.label, canvas.fine):
        ImageDraw.Draw(layer).polygon(xy, fill=0)


def light_up(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Apply uneven lighting, slight blur and sensor noise."""
    size = image.width
    field = Image.fromarray(rng.uniform(0.82, 1.12, (3, 3)).astype(np.float32))
    light = np.asarray(field.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.6)))), dtype=np.float32)
    pixels = pixels * light + rng.normal(0, 3.0, (size, size, 1)).astype(np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)
