"""Procedural scenes with captions and exact part masks: cars, horses and faces.

A scene is drawn twice from the same random numbers: once in colour (2x supersampled) and once as integer labels. The
colour of every part is drawn independently and named in the caption ("a red car with blue windows ... on sand"), so a
text-to-image model can only paint the scene by knowing where each part is. Label ids follow the paper's data sets:
0 is the background, 1.. are the entries of ``PARTS[domain]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
SUPERSAMPLING = 2

PARTS: dict[str, tuple[str, ...]] = {
    "car": ("body", "light", "plate", "wheel", "window"),
    "horse": ("head", "neck+torso", "leg", "tail"),
    "face": ("skin", "eye", "mouth", "nose", "brow", "ear", "neck", "cloth", "hair"),
}
DOMAINS = tuple(PARTS)

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
# Ground or wall below the horizon, sky or wall above it.
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sand": ((214, 190, 140), (150, 195, 230)),
    "grass": ((105, 155, 80), (160, 205, 240)),
    "snow": ((228, 233, 240), (185, 200, 220)),
    "asphalt": ((95, 97, 104), (170, 180, 190)),
    "water": ((70, 125, 165), (205, 220, 230)),
    "earth": ((130, 95, 70), (225, 200, 170)),
}

Point = tuple[float, float]
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One rendered picture: image uint8 [H, W, 3], labels uint8 [H, W], its caption and its domain."""

    image: np.ndarray
    labels: np.ndarray
    caption: str
    domain: str


@dataclass(frozen=True)
class Variation:
    """What a stress set changes: object scale, a bar over the object, or background in the object's own colours."""

    scale: float = 1.0
    occlusion: bool = False
    camouflage: bool = False


VARIATIONS = {
    "plain": Variation(),
    "small": Variation(scale=1 / 3),
    "occlusion": Variation(occlusion=True),
    "camouflage": Variation(camouflage=True),
}


class Canvas:
    """Draws a polygon in colour and, at once, in its label. Coordinates are in units of the image's side, y down."""

    def __init__(self, size: int) -> None:
        self.side = size * SUPERSAMPLING
        self.color = Image.new("RGB", (self.side, self.side))
        self.label = Image.new("L", (self.side, self.side))
        self._draw_color = ImageDraw.Draw(self.color)
        self._draw_label = ImageDraw.Draw(self.label)

    def polygon(self, points: list[Point], color: Color, label: int | None) -> None:
        """Fill a polygon; ``label`` None leaves the labels as they are."""
        xy = [(x * self.side, y * self.side) for x, y in points]
        self._draw_color.polygon(xy, fill=color)
        if label is not None:
            self._draw_label.polygon(xy, fill=label)

    def finish(self, size: int) -> tuple[Image.Image, np.ndarray]:
        image = self.color.resize((size, size), Image.Resampling.BOX)
        offset = SUPERSAMPLING // 2
        labels = np.asarray(self.label)[offset::SUPERSAMPLING, offset::SUPERSAMPLING].copy()
        return image, labels


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
    """A tapered capsule from ``start`` (radius r0) to ``end`` (radius r1)."""
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


class Painter:
    """Random choices of one scene: the generator, the colour of every part and the words that name them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.names: dict[str, str] = {}
        self.colors: dict[str, Color] = {}

    def choose(self, part: str, differs_from: tuple[str, ...] = ()) -> Color:
        """Draw a colour name for ``part``, unlike those of its neighbours, and jitter it."""
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


def paint_car(canvas: Canvas, painter: Painter, scale: float) -> None:
    """A box body and a tapered cabin in 3-D, seen from the front left or right, drawn back to front."""
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
        """x along the car (front is +), y up, z towards the viewer's side; orthographic, turned by yaw and pitch."""
        u, depth = x * cy - z * sy, x * sy + z * cy
        return u, -(y * cp - depth * sp) * 1.0

    def face(corners: list[tuple[float, float, float]], color: Color, part: int) -> None:
        canvas.polygon(frame([project(*c) for c in corners]), color, part)

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
        face(hub, shade(wheel, 1.35 if sum(wheel) > 150 else 2.6), id_wheel)

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
        """Point of the cabin's near side, u along it and v up, both in [0, 1]."""
        low_x, high_x = b0 + u * (b1 - b0), t0 + u * (t1 - t0)
        return low_x + v * (high_x - low_x), deck + v * (roof - deck), z1 - v * inset

    def windscreen(u: float, v: float) -> tuple[float, float, float]:
        low_z, high_z = z0 + u * (z1 - z0), z0 + inset + u * (z1 - z0 - 2 * inset)
        return b1 + v * (t1 - b1), deck + v * (roof - deck), low_z + v * (high_z - low_z)

    def patch(surface, u0: float, u1: float, v0: float, v1: float, color: Color, part: int) -> None:
        face([surface(u0, v0), surface(u1, v0), surface(u1, v1), surface(u0, v1)], color, part)

    patch(cabin_side, 0, 1, 0, 1, shade(body, 0.98), id_body)
    patch(windscreen, 0, 1, 0, 1, shade(body, 0.85), id_body)
    roof_corners = [(t0, roof, z0 + inset), (t1, roof, z0 + inset), (t1, roof, z1 - inset), (t0, roof, z1 - inset)]
    face(roof_corners, shade(body, 1.15), id_body)
    pillar = p.uniform(0.42, 0.56)
    patch(cabin_side, 0.07, pillar - 0.03, 0.12, 0.88, window, id_window)
    patch(cabin_side, pillar + 0.03, 0.94, 0.12, 0.88, shade(window, 1.06), id_window)
    patch(windscreen, 0.08, 0.92, 0.1, 0.9, shade(window, 0.9), id_window)


def paint_horse(canvas: Canvas, painter: Painter, scale: float) -> None:
    """Side view with random gait, neck and tail."""
    p = painter
    torso = p.choose("neck+torso")
    head = p.choose("head", ("neck+torso",))
    leg = p.choose("leg", ("neck+torso",))
    tail = p.choose("tail", ("neck+torso", "leg"))
    frame = Frame(
        p.uniform(0.4, 0.6), p.uniform(0.42, 0.56), scale * p.uniform(0.72, 1.02), p.uniform(-0.12, 0.12), p.flip()
    )
    id_head, id_torso, id_leg, id_tail = 1, 2, 3, 4

    def part(points: list[Point], color: Color, label: int) -> None:
        canvas.polygon(frame(points), color, label)

    half, girth = p.uniform(0.21, 0.25), p.uniform(0.1, 0.125)
    canvas.polygon(frame(ellipse(0, 0.385, 0.32, 0.035)), (70, 70, 66), None)

    def draw_leg(x: float, swing: float, color: Color) -> None:
        knee = (x + 0.16 * math.sin(swing), 0.06 + 0.16 * math.cos(swing))
        bend = swing + p.uniform(-0.35, 0.25)
        hoof = (knee[0] + 0.16 * math.sin(bend), knee[1] + 0.16 * math.cos(bend))
        part(limb((x, 0.06), knee, 0.05, 0.034), color, id_leg)
        part(limb(knee, hoof, 0.034, 0.029), color, id_leg)
        part(limb(hoof, (hoof[0] + 0.02, hoof[1] + 0.012), 0.036, 0.03), shade(color, 0.7), id_leg)

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


def paint_face(canvas: Canvas, painter: Painter, scale: float) -> None:
    """A frontal portrait with a slight turn; hair of several cuts."""
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
    ids = {name: i + 1 for i, name in enumerate(PARTS["face"])}

    def part(points: list[Point], color: Color, name: str) -> None:
        canvas.polygon(frame(points), color, ids[name])

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
        part(ellipse(x + turn * 0.2, level, ey * 0.42, ey * 0.42), (15, 15, 18), "eye")
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


PAINT = {"car": paint_car, "horse": paint_horse, "face": paint_face}
PLURAL = {
    "window": "windows",
    "wheel": "wheels",
    "light": "lights",
    "leg": "legs",
    "eye": "eyes",
    "brow": "brows",
    "ear": "ears",
}


def describe(domain: str, painter: Painter, place: str) -> str:
    """The caption: every part but the object's main one is named, in random order, each with probability 0.9."""
    main = {"car": "body", "horse": "neck+torso", "face": "skin"}[domain]
    others = [part for part in painter.names if part != main]
    painter.rng.shuffle(others)
    named = [f"{painter.names[part]} {PLURAL.get(part, part)}" for part in others if painter.rng.random() < 0.9]
    text = f"a {painter.names[main]} {domain}"
    return f"{text} with {', '.join(named)} on {place}" if named else f"{text} on {place}"


def render(domain: str, seed: int, variation: Variation = VARIATIONS["plain"], size: int = SIZE) -> Scene:
    """Draw one scene. The same arguments give the same pixels.

    Args:
        domain: "car", "horse" or "face".
        seed: any non-negative integer.
        variation: see ``VARIATIONS``.
        size: side of the square image in pixels.
    """
    rng = np.random.default_rng([DOMAINS.index(domain), seed])
    painter = Painter(rng)
    place = str(rng.choice(list(PLACES)))

    canvas = Canvas(size)
    PAINT[domain](canvas, painter, variation.scale)
    foreground, mask = canvas.color, canvas.label.point(lambda v: 255 if v else 0)

    backdrop = Canvas(size)
    paint_background(backdrop, painter, place, list(painter.colors.values()) if variation.camouflage else [])
    backdrop.color.paste(foreground, mask=mask)
    backdrop.label = canvas.label
    if variation.occlusion:
        paint_bar(backdrop, painter)
    caption = describe(domain, painter, place)
    image, labels = backdrop.finish(size)
    return Scene(light_up(image, rng), labels, caption, domain)


def paint_bar(canvas: Canvas, painter: Painter) -> None:
    """A slanted bar (label background) across the middle of the picture."""
    x, half, slant = painter.uniform(0.3, 0.7), painter.uniform(0.06, 0.1), painter.uniform(-0.25, 0.25)
    color = list(COLORS.values())[int(painter.rng.integers(len(COLORS)))]
    points = [(x - half - slant, 0.0), (x + half - slant, 0.0), (x + half + slant, 1.0), (x - half + slant, 1.0)]
    xy = [(a * canvas.side, b * canvas.side) for a, b in points]
    ImageDraw.Draw(canvas.color).polygon(xy, fill=color)
    ImageDraw.Draw(canvas.label).polygon(xy, fill=0)


def light_up(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Uneven lighting, slight blur and sensor noise."""
    size = image.width
    field = Image.fromarray(rng.uniform(0.82, 1.12, (3, 3)).astype(np.float32))
    light = np.asarray(field.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.6)))), dtype=np.float32)
    pixels = pixels * light + rng.normal(0, 3.0, (size, size, 1)).astype(np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)
