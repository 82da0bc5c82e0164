"""Another drawing style, used neither for training nor for choosing defaults: flat colours, ink outlines, paper.

The objects are built anew: a car in cabinet projection, a horse of straight timber, a face of circles.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from . import car, face, horse
from .canvas import Canvas, Color, Frame, Point, ellipse, shade
from .painter import Painter

INK = (38, 34, 44)
PAPERS: tuple[Color, ...] = ((244, 236, 214), (226, 232, 240), (236, 222, 226), (222, 232, 218), (208, 200, 186))


class InkCanvas(Canvas):
    """Canvas whose polygons have an outline, which belongs to the part that it surrounds."""

    line = 0.008  # relative to the image's side

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.drawn = Image.new("L", (self.side, self.side))

    def polygon(self, points: list[Point], color: Color, label: int | None, fine: int = 0) -> None:
        super().polygon(points, color, label, fine)
        xy = [(x * self.side, y * self.side) for x, y in [*points, *points[:2]]]
        for image, fill in ((self.color, INK), (self.drawn, 255)):
            drawing = ImageDraw.Draw(image)
            drawing.line(xy, fill=fill, width=max(1, round(self.line * self.side)), joint="curve")
        ImageDraw.Draw(self.drawn).polygon(xy[:-2], fill=255)


def paint_paper(canvas: Canvas, painter: Painter) -> None:
    """Draw paper, a part of it hatched."""
    paper = PAPERS[int(painter.rng.integers(len(PAPERS)))]
    Canvas.polygon(canvas, [(0, 0), (1, 0), (1, 1), (0, 1)], paper, None)
    ground = painter.uniform(0.55, 0.8)
    Canvas.polygon(canvas, [(0, ground), (1, ground), (1, 1), (0, 1)], shade(paper, 0.88), None)
    x, step, slope = painter.uniform(-0.2, 0.4), painter.uniform(0.03, 0.06), painter.uniform(-0.3, 0.3)
    for i in range(int(painter.rng.integers(4, 16))):
        left = x + i * step
        top, bottom = painter.uniform(0.02, 0.2), painter.uniform(0.3, 0.95)
        stroke = [(left, top), (left + 0.004, top), (left + slope + 0.004, bottom), (left + slope, bottom)]
        Canvas.polygon(canvas, stroke, shade(paper, 0.7), None)


def paint_car(canvas: Canvas, p: Painter, scale: float) -> None:
    """Draw a boxy car in cabinet projection: its side as it is, its front slanting backwards."""
    body, window = p.choose("body"), p.choose("window", ("body",))
    wheel, light = p.choose("wheel", ("body",)), p.choose("light", ("body",))
    plate = p.choose("plate", ("body", "light"))
    frame = Frame(
        p.uniform(0.42, 0.58), p.uniform(0.5, 0.62), scale * p.uniform(0.75, 1.0), p.uniform(-0.06, 0.06), p.flip()
    )
    ids = {name: i + 1 for i, name in enumerate(car.PARTS)}

    def part(points: list[Point], color: Color, name: str, fine: int = 0) -> None:
        canvas.polygon(frame(points), color, ids[name], fine)

    length, low, deck = p.uniform(0.56, 0.64), 0.14, p.uniform(-0.06, 0.0)
    roof, dx, dy = deck - p.uniform(0.15, 0.22), p.uniform(0.14, 0.2), -p.uniform(0.06, 0.11)
    left, right = -length / 2 - dx / 2, length / 2 - dx / 2

    def front(u: float, v: float) -> Point:
        """Return a point of the front, u from the near edge back, v from its top down."""
        return right + u * dx, deck + v * (low - deck) + u * dy

    part([(left, deck), (left + dx, deck + dy), (right + dx, deck + dy), (right, deck)], shade(body, 1.12), "body")
    part([(left, low), (left, deck), (right, deck), (right, low)], body, "body")
    part([front(0, 0), front(1, 0), front(1, 1), front(0, 1)], shade(body, 0.82), "body")
    b0, b1 = left + p.uniform(0.02, 0.12), right - p.uniform(0.1, 0.17)
    t0, t1 = b0 + p.uniform(0.02, 0.07), b1 - p.uniform(0.05, 0.1)
    part([(t0, roof), (t0 + dx, roof + dy), (t1 + dx, roof + dy), (t1, roof)], shade(body, 1.12), "body")
    part([(b1, deck), (t1, roof), (t1 + dx, roof + dy), (b1 + dx, deck + dy)], shade(window, 0.9), "window")
    part([(b0, deck), (t0, roof), (t1, roof), (b1, deck)], body, "body")
    middle = (t0 + t1) / 2
    for x0, x1, bottom in ((t0 + 0.015, middle - 0.012, b0 + 0.03), (middle + 0.012, t1 - 0.01, b1 - 0.03)):
        bottoms = (bottom, x1) if bottom < middle else (x0, bottom)
        part(
            [(bottoms[0], deck - 0.02), (x0, roof + 0.025), (x1, roof + 0.025), (bottoms[1], deck - 0.02)],
            window,
            "window",
        )
    for u in (0.18, 0.82):
        x, y = front(u, 0.3)
        part(ellipse(x, y, 0.02, 0.028), light, "light")
    part([front(0.3, 0.62), front(0.7, 0.62), front(0.7, 0.86), front(0.3, 0.86)], plate, "plate")
    radius = p.uniform(0.075, 0.095)
    for x in (left + p.uniform(0.1, 0.13), right - p.uniform(0.08, 0.11)):
        part(ellipse(x, low, radius, radius), wheel, "wheel")
        part(ellipse(x, low, radius * 0.42, radius * 0.42), shade(wheel, 1.9), "wheel", 1)


def paint_horse(canvas: Canvas, p: Painter, scale: float) -> None:
    """Draw a horse of straight timber."""
    torso, head = p.choose("neck+torso"), p.choose("head", ("neck+torso",))
    leg, tail = p.choose("leg", ("neck+torso",)), p.choose("tail", ("neck+torso", "leg"))
    frame = Frame(
        p.uniform(0.42, 0.58), p.uniform(0.42, 0.54), scale * p.uniform(0.75, 1.0), p.uniform(-0.1, 0.1), p.flip()
    )
    ids = {name: i + 1 for i, name in enumerate(horse.PARTS)}

    def part(points: list[Point], color: Color, name: str, fine: int = 0) -> None:
        canvas.polygon(frame(points), color, ids[name], fine)

    half, girth = p.uniform(0.19, 0.24), p.uniform(0.08, 0.11)
    drop, sweep = p.uniform(0.15, 0.25), p.uniform(0.03, 0.16)
    part(
        [(-half, -girth * 0.6), (-half - sweep, drop), (-half - sweep - 0.05, drop - 0.02), (-half - 0.03, -girth)],
        tail,
        "tail",
    )
    for x in (-half + 0.02, -half + 0.1, half - 0.12, half - 0.04):
        foot = x + p.uniform(-0.1, 0.1)
        end = girth + p.uniform(0.22, 0.3)
        part([(x - 0.03, 0), (x + 0.035, 0), (foot + 0.025, end), (foot - 0.025, end)], leg, "leg")
        part(
            [(foot - 0.03, end - 0.03), (foot + 0.03, end - 0.03), (foot + 0.035, end), (foot - 0.035, end)],
            shade(leg, 0.6),
            "leg",
            1,
        )
    part(
        [(-half - 0.02, -girth), (half, -girth * 0.9), (half + 0.03, girth * 0.7), (-half, girth)], torso, "neck+torso"
    )
    rise, ahead = p.uniform(0.2, 0.29), p.uniform(0.08, 0.16)
    poll = (half + ahead, -girth - rise)
    part(
        [(half - 0.1, -girth * 0.8), (poll[0] - 0.05, poll[1]), (poll[0] + 0.03, poll[1] + 0.04), (half + 0.03, 0.02)],
        torso,
        "neck+torso",
    )
    part(
        [
            (half - 0.12, -girth),
            (poll[0] - 0.08, poll[1] - 0.01),
            (poll[0] - 0.035, poll[1]),
            (half - 0.08, -girth * 0.7),
        ],
        tail,
        "neck+torso",
        2,
    )
    nose = (poll[0] + p.uniform(0.13, 0.17), poll[1] + p.uniform(0.05, 0.14))
    part(
        [(poll[0] - 0.03, poll[1]), (poll[0] - 0.02, poll[1] - 0.08), (poll[0] + 0.02, poll[1] - 0.01)],
        shade(head, 0.85),
        "head",
    )
    part(
        [
            (poll[0] - 0.05, poll[1] + 0.01),
            (poll[0] + 0.02, poll[1] - 0.03),
            (nose[0], nose[1] - 0.02),
            (nose[0] - 0.02, nose[1] + 0.04),
            (poll[0], poll[1] + 0.08),
        ],
        head,
        "head",
    )
    part(ellipse(poll[0] + 0.02, poll[1] + 0.01, 0.01, 0.01), INK, "head")


def paint_face(canvas: Canvas, p: Painter, scale: float) -> None:
    """Draw a face of circles."""
    skin, hair = p.choose("skin"), p.choose("hair", ("skin",))
    cloth, neck = p.choose("cloth", ("skin", "hair")), p.choose("neck", ("skin", "cloth"))
    ear, eye = p.choose("ear", ("skin", "hair")), p.choose("eye", ("skin",))
    brow, nose = p.choose("brow", ("skin", "eye")), p.choose("nose", ("skin",))
    mouth = p.choose("mouth", ("skin", "nose"))
    frame = Frame(
        p.uniform(0.4, 0.6), p.uniform(0.42, 0.54), scale * p.uniform(0.72, 1.0), p.uniform(-0.15, 0.15), p.flip()
    )
    ids = {name: i + 1 for i, name in enumerate(face.PARTS)}

    def part(points: list[Point], color: Color, name: str, fine: int = 0) -> None:
        canvas.polygon(frame(points), color, ids[name], fine)

    r = p.uniform(0.23, 0.27)
    part(ellipse(0, -0.07, r + p.uniform(0.04, 0.08), r + 0.06), shade(hair, 0.85), "hair")
    part([(-0.08, 0.15), (0.08, 0.15), (0.08, 0.42), (-0.08, 0.42)], neck, "neck")
    part(
        [
            (-0.14, 0.37),
            (0.14, 0.37),
            (p.uniform(0.36, 0.5), 0.5),
            (0.5, 1.2),
            (-0.5, 1.2),
            (-p.uniform(0.36, 0.5), 0.5),
        ],
        cloth,
        "cloth",
    )
    for side in (-1, 1):
        part(ellipse(side * (r + 0.01), 0.02, 0.055, 0.065), ear, "ear")
    part(ellipse(0, 0, r, r * p.uniform(1.02, 1.15)), skin, "skin")
    gap, level, size = p.uniform(0.085, 0.105), p.uniform(-0.05, 0.0), p.uniform(0.035, 0.047)
    lift = p.uniform(0.03, 0.05)
    for side in (-1, 1):
        part(ellipse(side * gap, level, size, size), (246, 246, 240), "eye")
        part(ellipse(side * gap, level, size * 0.62, size * 0.62), eye, "eye")
        part(ellipse(side * gap, level, size * 0.3, size * 0.3), INK, "eye", 1)
        height = level - size - lift
        part(
            [
                (side * (gap - 0.05), height),
                (side * (gap + 0.05), height - 0.012),
                (side * (gap + 0.05), height - 0.035),
                (side * (gap - 0.05), height - 0.026),
            ],
            brow,
            "brow",
        )
    part([(0, level + 0.02), (p.uniform(0.03, 0.045), 0.1), (-0.035, 0.1)], nose, "nose")
    wide, deep = p.uniform(0.06, 0.1), p.uniform(0.02, 0.04)
    part([q for q in ellipse(0, 0.155, wide, deep * 1.6) if q[1] >= 0.15], mouth, "mouth")
    fringe = p.uniform(-0.2, -0.15)
    cap = [q for q in ellipse(0, -0.02, r + 0.03, r + 0.06, n=48) if q[1] < fringe]
    cap.sort(key=lambda q: q[0])
    zigzag = [(r * (0.8 - 0.4 * i), fringe + (0.0 if i % 2 else -0.05)) for i in range(5)]
    part([*cap, *zigzag], hair, "hair")


def print_on_paper(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Add the grain of the paper."""
    pixels = np.asarray(image, np.float32) * rng.uniform(0.92, 1.05)
    grain = np.repeat(np.repeat(rng.normal(0, 4, (image.height // 2, image.width // 2, 1)), 2, 0), 2, 1)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)


PAINT = {"car": paint_car, "horse": paint_horse, "face": paint_face}
