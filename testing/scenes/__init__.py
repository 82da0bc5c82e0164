"""Procedural scenes with captions and exact part masks: cars, horses and faces.

A scene is drawn twice from the same random numbers: once in colour (2x supersampled) and once as integer labels. The
colour of every part is drawn independently and named in the caption ("a red car with blue windows ... on sand"), so a
text-to-image model can only paint the scene if it knows where each part is. Label ids follow the paper's data sets: 0
is the background, 1.. are the entries of ``PARTS[domain]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import car, face, horse, ink
from .canvas import SIZE, Canvas
from .natural import light_naturally, natural_painter, sparse_caption
from .painter import Painter
from .place import PLACES, light_up, paint_background, paint_bar

__all__ = [
    "DOMAINS",
    "FINE",
    "NATURAL",
    "PARTS",
    "PLACES",
    "SIZE",
    "STYLES",
    "VARIATIONS",
    "WORLD",
    "Scene",
    "Variation",
    "render",
]

PARTS: dict[str, tuple[str, ...]] = {"car": car.PARTS, "horse": horse.PARTS, "face": face.PARTS}
FINE: dict[str, tuple[str, ...]] = {"car": car.FINE, "horse": horse.FINE, "face": face.FINE}
DOMAINS = tuple(PARTS)


@dataclass(frozen=True)
class Scene:
    """One rendered scene: image uint8 [H, W, 3], labels uint8 [H, W], its caption and its domain.

    ``fine`` uint8 [H, W] labels parts that no caption names: 1.. are the entries of ``FINE[domain]``.
    """

    image: np.ndarray
    labels: np.ndarray
    caption: str
    domain: str
    fine: np.ndarray


STYLES: dict[str, tuple[int, ...]] = {"free": (), "natural": (1,), "ink": (3,)}  # added to their seeds
WORLD = "free"  # the style that the tiny model was trained on
NATURAL = "natural"  # the test bed's style


@dataclass(frozen=True)
class Variation:
    """Changes of a stress set: object scale, a bar over the object, or a background in the object's own colours."""

    scale: float = 1.0
    occlusion: bool = False
    camouflage: bool = False


VARIATIONS = {
    "plain": Variation(),
    "small": Variation(scale=1 / 3),
    "occlusion": Variation(occlusion=True),
    "camouflage": Variation(camouflage=True),
}

PAINT = {"car": car.paint_car, "horse": horse.paint_horse, "face": face.paint_face}
PLURAL = {
    "window": "windows",
    "wheel": "wheels",
    "light": "lights",
    "leg": "legs",
    "eye": "eyes",
    "brow": "brows",
    "ear": "ears",
}


MAIN = {"car": "body", "horse": "neck+torso", "face": "skin"}


def describe(domain: str, painter: Painter, place: str) -> str:
    """Return the caption: it names every part but the main one, in random order, each with probability 0.9."""
    main = MAIN[domain]
    others = [part for part in painter.names if part != main]
    painter.rng.shuffle(others)
    named = [f"{painter.names[part]} {PLURAL.get(part, part)}" for part in others if painter.rng.random() < 0.9]
    text = f"a {painter.names[main]} {domain}"
    return f"{text} with {', '.join(named)} on {place}" if named else f"{text} on {place}"


def render(
    domain: str, seed: int, variation: Variation = VARIATIONS["plain"], size: int = SIZE, style: str = WORLD
) -> Scene:
    """Draw one scene. The same arguments give the same pixels.

    Args:
        domain: "car", "horse" or "face".
        seed: any non-negative integer.
        variation: see ``VARIATIONS``.
        size: side of the square image in pixels.
        style: "natural", with natural colours and light, see :mod:`.natural`; "free", where every part has a colour of
            its own; or "ink", drawn by another renderer, see :mod:`.ink`.
    """
    rng = np.random.default_rng([DOMAINS.index(domain), seed, *STYLES[style]])
    painter = Painter(rng) if style == "free" else natural_painter(rng)
    if style == "ink":
        return draw_in_ink(domain, painter, variation, size)
    natural = style == "natural"
    place = str(rng.choice(list(PLACES)))

    canvas = Canvas(size)
    PAINT[domain](canvas, painter, variation.scale)
    foreground, mask = canvas.color, canvas.label.point(lambda v: 255 if v else 0)

    backdrop = Canvas(size)
    paint_background(backdrop, painter, place, list(painter.colors.values()) if variation.camouflage else [])
    backdrop.color.paste(foreground, mask=mask)
    backdrop.label, backdrop.fine = canvas.label, canvas.fine
    if variation.occlusion:
        paint_bar(backdrop, painter)
    if natural:
        caption = sparse_caption(domain, painter, place, MAIN[domain], PLURAL)
    else:
        caption = describe(domain, painter, place)
    image, labels, fine = backdrop.finish(size)
    return Scene(
        light_naturally(image, labels, rng) if natural else light_up(image, rng), labels, caption, domain, fine
    )


def draw_in_ink(domain: str, painter: Painter, variation: Variation, size: int) -> Scene:
    """Draw a scene with the other renderer."""
    canvas, backdrop = ink.InkCanvas(size), Canvas(size)
    ink.PAINT[domain](canvas, painter, variation.scale)
    ink.paint_paper(backdrop, painter)
    backdrop.color.paste(canvas.color, mask=canvas.drawn)
    backdrop.label, backdrop.fine = canvas.label, canvas.fine
    if variation.occlusion:
        paint_bar(backdrop, painter)
    image, labels, fine = backdrop.finish(size)
    return Scene(ink.print_on_paper(image, painter.rng), labels, f"a {domain}", domain, fine)
