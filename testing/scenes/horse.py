"""A horse from the side."""

from __future__ import annotations

import math

from .canvas import Canvas, Color, Frame, Point, ellipse, limb, shade
from .painter import Painter

PARTS = ("head", "neck+torso", "leg", "tail")
FINE = ("hoof", "mane")


def paint_horse(canvas: Canvas, painter: Painter, scale: float) -> None:
    """Draw a side view with random gait, neck and tail."""
    p = painter
    torso = p.choose("neck+torso")
    head = p.choose("head", ("neck+torso",))
    leg = p.choose("leg", ("neck+torso",))
    tail = p.choose("tail", ("neck+torso", "leg"))
    frame = Frame(
        p.uniform(0.4, 0.6), p.uniform(0.42, 0.56), scale * p.uniform(0.72, 1.02), p.uniform(-0.12, 0.12), p.flip()
    )
    id_head, id_torso, id_leg, id_tail = 1, 2, 3, 4

    def part(points: list[Point], color: Color, label: int, fine: int = 0) -> None:
        canvas.polygon(frame(points), color, label, fine)

    half, girth = p.uniform(0.21, 0.25), p.uniform(0.1, 0.125)
    canvas.polygon(frame(ellipse(0, 0.385, 0.32, 0.035)), (70, 70, 66), None)

    def draw_leg(x: float, swing: float, color: Color) -> None:
        knee = (x + 0.16 * math.sin(swing), 0.06 + 0.16 * math.cos(swing))
        bend = swing + p.uniform(-0.35, 0.25)
        hoof = (knee[0] + 0.16 * math.sin(bend), knee[1] + 0.16 * math.cos(bend))
        part(limb((x, 0.06), knee, 0.05, 0.034), color, id_leg)
        part(limb(knee, hoof, 0.034, 0.029), color, id_leg)
        part(limb(hoof, (hoof[0] + 0.02, hoof[1] + 0.012), 0.036, 0.03), shade(color, 0.7), id_leg, fine=1)

    for x in (-half + 0.03, half - 0.02):
        draw_leg(x + 0.045, p.uniform(-0.5, 0.5), shade(leg, 0.75))
    dock, droop = (-half - 0.03, -0.05), p.uniform(0.3, 1.1)
    middle = (dock[0] - 0.13 * math.sin(droop), dock[1] + 0.12 * math.cos(droop))
    tip = (middle[0] - p.uniform(-0.02, 0.06), middle[1] + p.uniform(0.1, 0.15))
    part(limb(dock, middle, 0.026, 0.042), tail, id_tail)
    part(limb(middle, tip, 0.042, 0.018), tail, id_tail)

    part(ellipse(0, 0, half + 0.02, girth), torso, id_torso)
    part(ellipse(-half + 0.07, -0.01, 0.11, girth + 0.01), torso, id_torso)
    part(ellipse(half - 0.07, 0.0, 0.11, girth), shade(torso, 1.05), id_torso)
    for x in (-half + 0.02, half - 0.04):
        draw_leg(x, p.uniform(-0.5, 0.5), leg)
    part(ellipse(0.02, -0.015, half - 0.02, girth * 0.8), torso, id_torso)

    lift = p.uniform(0.25, 1.15)
    reach = p.uniform(0.24, 0.29)
    poll = (half + 0.0 + reach * math.cos(lift), -0.05 - reach * math.sin(lift))
    part(limb((half - 0.05, -0.01), poll, 0.105, 0.058), shade(torso, 1.03), id_torso)
    if p.mane:
        bulge = p.uniform(0.03, 0.055)
        start, end = (half - 0.06, -0.1), (poll[0] - 0.045 * math.sin(lift), poll[1] - 0.045 * math.cos(lift))
        middle = ((start[0] + end[0]) / 2 - bulge, (start[1] + end[1]) / 2 - bulge)
        part(limb(start, middle, 0.03, 0.042), tail, id_torso, fine=2)
        part(limb(middle, end, 0.042, 0.03), tail, id_torso, fine=2)
    nod = lift - p.uniform(1.2, 1.9)
    muzzle = (poll[0] + 0.165 * math.cos(nod), poll[1] - 0.165 * math.sin(nod))
    for side in (-0.02, 0.03):
        part(
            [
                (poll[0] + side - 0.02, poll[1] - 0.02),
                (poll[0] + side, poll[1] - 0.105),
                (poll[0] + side + 0.025, poll[1] - 0.02),
            ],
            shade(head, 0.85),
            id_head,
        )
    part(limb(poll, muzzle, 0.066, 0.04), head, id_head)
    eye = (poll[0] + 0.03 * math.cos(nod), poll[1] - 0.03 * math.sin(nod) - 0.012)
    part(ellipse(*eye, 0.013, 0.013), (20, 20, 22), id_head)
