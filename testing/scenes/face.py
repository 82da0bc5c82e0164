"""A portrait."""

from __future__ import annotations

import math

from .canvas import Canvas, Color, Frame, Point, ellipse, limb, shade
from .painter import Painter

PARTS = ("skin", "eye", "mouth", "nose", "brow", "ear", "neck", "cloth", "hair")
FINE = ("pupil",)


def paint_face(canvas: Canvas, painter: Painter, scale: float) -> None:
    """Draw a frontal portrait with a slight turn and one of several haircuts."""
    p = painter
    skin = p.choose("skin")
    hair = p.choose("hair", ("skin",))
    cloth = p.choose("cloth", ("skin", "hair"))
    neck = p.choose("neck", ("skin", "cloth"))
    ear = p.choose("ear", ("skin", "hair"))
    eye = p.choose("eye", ("skin",))
    brow = p.choose("brow", ("skin", "eye"))
    nose = p.choose("nose", ("skin",))
    mouth = p.choose("mouth", ("skin", "nose"))
    frame = Frame(
        p.uniform(0.36, 0.64), p.uniform(0.38, 0.56), scale * p.uniform(0.68, 1.0), p.uniform(-0.25, 0.25), p.flip()
    )
    ids = {name: i + 1 for i, name in enumerate(PARTS)}

    def part(points: list[Point], color: Color, name: str, fine: str = "") -> None:
        canvas.polygon(frame(points), color, ids[name], FINE.index(fine) + 1 if fine else 0)

    rx, ry = p.uniform(0.215, 0.255), p.uniform(0.28, 0.32)
    turn = p.uniform(-0.05, 0.05)
    long_hair = p.flip()
    if long_hair:
        part(limb((0, -0.08), (0, p.uniform(0.1, 0.3)), rx + 0.1, rx + p.uniform(0.05, 0.1)), shade(hair, 0.9), "hair")
    else:
        part(ellipse(0, -0.1, rx + 0.06, ry * 0.85), shade(hair, 0.9), "hair")
    part([(-0.1, 0.15), (0.1, 0.15), (0.125, 0.45), (-0.125, 0.45)], shade(neck, 0.92), "neck")
    shoulder = p.uniform(0.4, 0.5)
    collar = p.uniform(0.36, 0.42)
    part(
        [
            (-0.13, collar),
            (0, collar + p.uniform(0.03, 0.1)),
            (0.13, collar),
            (shoulder, collar + 0.1),
            (shoulder + 0.3, 1.3),
            (-shoulder - 0.3, 1.3),
            (-shoulder, collar + 0.1),
        ],
        cloth,
        "cloth",
    )
    for side in (-1, 1):
        part(ellipse(side * (rx + 0.012), 0.0, 0.05, 0.085, 0.15 * side), ear, "ear")
        part(ellipse(side * (rx + 0.018), 0.0, 0.022, 0.05, 0.15 * side), shade(ear, 0.8), "ear")
    part(ellipse(0, 0, rx, ry), skin, "skin")
    part(ellipse(turn * 0.5, 0.06, rx * 0.8, ry * 0.75), shade(skin, 1.05), "skin")

    gap, level = p.uniform(0.095, 0.115), p.uniform(-0.06, -0.02)
    ex, ey = p.uniform(0.05, 0.062), p.uniform(0.026, 0.038)
    lift, tilt = p.uniform(0.075, 0.1), p.uniform(-0.2, 0.25)
    for side in (-1, 1):
        x = turn + side * gap
        part(ellipse(x, level, ex, ey), (245, 245, 243), "eye")
        part(ellipse(x + turn * 0.2, level, ey * 1.05, ey), eye, "eye")
        part(ellipse(x + turn * 0.2, level, ey * 0.42, ey * 0.42), (15, 15, 18), "eye", "pupil")
        inner, outer = (x - side * 0.055, level - lift), (x + side * 0.06, level - lift - 0.06 * tilt)
        part(limb(inner, outer, 0.021, 0.014), brow, "brow")
    part(
        [
            (turn * 1.4 - 0.02, level + 0.02),
            (turn * 1.4 + 0.02, level + 0.02),
            (turn * 1.4 + 0.05, 0.105),
            (turn * 1.4, 0.122),
            (turn * 1.4 - 0.05, 0.105),
        ],
        nose,
        "nose",
    )
    open_by, wide = p.uniform(0.02, 0.042), p.uniform(0.075, 0.105)
    smile = p.uniform(-0.012, 0.03)
    upper = [(turn - wide, 0.18 - smile), (turn, 0.18 - open_by), (turn + wide, 0.18 - smile)]
    part([*upper, (turn + wide * 0.5, 0.18 + open_by), (turn - wide * 0.5, 0.18 + open_by)], mouth, "mouth")
    part(
        [
            (turn - wide * 0.7, 0.183 - smile * 0.6),
            (turn, 0.19),
            (turn + wide * 0.7, 0.183 - smile * 0.6),
            (turn, 0.176),
        ],
        shade(mouth, 0.55),
        "mouth",
    )

    fringe = p.uniform(-0.2, -0.13)
    cap = [q for q in ellipse(0, -0.02, rx + 0.045, ry + 0.045, n=48) if q[1] < fringe + 0.02]
    parting = p.uniform(-0.12, 0.12)
    cap.sort(key=lambda q: math.atan2(-q[1], q[0]))
    part(
        [*cap, (-rx * 0.75, fringe - 0.01), (parting, fringe - p.uniform(0.0, 0.05)), (rx * 0.75, fringe - 0.01)],
        hair,
        "hair",
    )
