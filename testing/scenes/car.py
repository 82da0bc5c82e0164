"""A car, in three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

from .canvas import Canvas, Color, Frame, Point, ellipse, shade
from .painter import Painter

Surface = Callable[[float, float], tuple[float, float, float]]

PARTS = ("body", "light", "plate", "wheel", "window")
FINE = ("hub",)


def paint_car(canvas: Canvas, painter: Painter, scale: float) -> None:
    """Draw a box body and a tapered cabin in 3-D, seen from the front left or right, from back to front."""
    p = painter
    body = p.choose("body")
    window = p.choose("window", ("body",))
    wheel = p.choose("wheel", ("body",))
    light = p.choose("light", ("body",))
    plate = p.choose("plate", ("body", "light"))

    length, width = p.uniform(0.92, 1.08), p.uniform(0.44, 0.52)
    low, deck, roof = -0.17, p.uniform(0.02, 0.06), p.uniform(0.19, 0.26)
    yaw = math.radians(p.uniform(22, 58))
    pitch = math.radians(p.uniform(6, 16))
    frame = Frame(
        p.uniform(0.38, 0.62), p.uniform(0.42, 0.62), scale * p.uniform(0.74, 1.0), p.uniform(-0.08, 0.08), p.flip()
    )
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)

    def project(x: float, y: float, z: float) -> Point:
        """Project a point orthographically, turned by yaw and pitch.

        x is along the car (front is +), y up, z towards the viewer's side.
        """
        u, depth = x * cy - z * sy, x * sy + z * cy
        return u, -(y * cp - depth * sp) * 1.0

    def face(corners: list[tuple[float, float, float]], color: Color, part: int, fine: int = 0) -> None:
        canvas.polygon(frame([project(*c) for c in corners]), color, part, fine)

    x0, x1, z0, z1 = -length / 2, length / 2, -width / 2, width / 2
    id_body, id_light, id_plate, id_wheel, id_window = 1, 2, 3, 4, 5
    shadow = frame([project(x, low - 0.09, z) for x, z in ((x0, z0), (x1, z0), (x1, z1), (x0, z1))])
    canvas.polygon(shadow, (60, 60, 62), None)
    radius = p.uniform(0.105, 0.13)
    axles = (x0 + p.uniform(0.19, 0.23), x1 - p.uniform(0.19, 0.23))

    face([(x0, low, z1), (x1, low, z1), (x1, deck, z1), (x0, deck, z1)], shade(body, 0.92), id_body)
    face([(x1, low, z0), (x1, low, z1), (x1, deck, z1), (x1, deck, z0)], shade(body, 0.78), id_body)
    face([(x0, deck, z0), (x1, deck, z0), (x1, deck, z1), (x0, deck, z1)], shade(body, 1.1), id_body)
    for axle in axles:
        ring = [(axle + x, low + 0.015 + y, z1 + 0.005) for x, y in ellipse(0, 0, radius, radius)]
        face(ring, wheel, id_wheel)
        hub = [(axle + x, low + 0.015 + y, z1 + 0.006) for x, y in ellipse(0, 0, radius * 0.4, radius * 0.4)]
        face(hub, shade(wheel, 1.35 if sum(wheel) > 150 else 2.6), id_wheel, fine=1)

    lamp, top = p.uniform(0.095, 0.125), deck - 0.035
    for z in (z0 + 0.02, z1 - 0.02 - lamp):
        quad = [(x1 + 0.004, top - 0.085, z), (x1 + 0.004, top - 0.085, z + lamp), (x1 + 0.004, top, z + lamp)]
        face([*quad, (x1 + 0.004, top, z)], light, id_light)
    half = p.uniform(0.085, 0.105)
    quad = [(x1 + 0.005, low + 0.02, -half), (x1 + 0.005, low + 0.02, half), (x1 + 0.005, low + 0.095, half)]
    face([*quad, (x1 + 0.005, low + 0.095, -half)], plate, id_plate)

    # Cabin: bottom rectangle on the deck, top rectangle smaller; side, windscreen and roof are visible.
    b0, b1 = x0 + p.uniform(0.04, 0.2), x1 - p.uniform(0.26, 0.34)
    t0, t1, inset = b0 + p.uniform(0.06, 0.12), b1 - p.uniform(0.12, 0.18), 0.035

    def cabin_side(u: float, v: float) -> tuple[float, float, float]:
        """Return a point of the cabin's near side, u along it and v up, both in [0, 1]."""
        low_x, high_x = b0 + u * (b1 - b0), t0 + u * (t1 - t0)
        return low_x + v * (high_x - low_x), deck + v * (roof - deck), z1 - v * inset

    def windscreen(u: float, v: float) -> tuple[float, float, float]:
        low_z, high_z = z0 + u * (z1 - z0), z0 + inset + u * (z1 - z0 - 2 * inset)
        return b1 + v * (t1 - b1), deck + v * (roof - deck), low_z + v * (high_z - low_z)

    def patch(surface: Surface, u0: float, u1: float, v0: float, v1: float, color: Color, part: int) -> None:
        face([surface(u0, v0), surface(u1, v0), surface(u1, v1), surface(u0, v1)], color, part)

    patch(cabin_side, 0, 1, 0, 1, shade(body, 0.98), id_body)
    patch(windscreen, 0, 1, 0, 1, shade(body, 0.85), id_body)
    roof_corners = [(t0, roof, z0 + inset), (t1, roof, z0 + inset), (t1, roof, z1 - inset), (t0, roof, z1 - inset)]
    face(roof_corners, shade(body, 1.15), id_body)
    pillar = p.uniform(0.42, 0.56)
    patch(cabin_side, 0.07, pillar - 0.03, 0.12, 0.88, window, id_window)
    patch(cabin_side, pillar + 0.03, 0.94, 0.12, 0.88, shade(window, 1.06), id_window)
    patch(windscreen, 0.08, 0.92, 0.1, 0.9, shade(window, 0.9), id_window)
