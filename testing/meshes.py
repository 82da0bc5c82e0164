"""Meshes with parts, built by code: cars and horses of boxes and tubes, each of its own shape and colours.

A part has the colour of the main part as often as one of its own, so that colour alone does not tell parts apart.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from slime.mesh.surface import Surface

PARTS = {"car": ("body", "wheel", "window", "light"), "horse": ("head", "torso", "leg", "tail")}
DOMAINS = tuple(PARTS)


class Builder:
    """Collects triangles with a part and a colour each."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.corners: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.colors: list[Tensor] = []
        self.main = torch.tensor(self.rng.uniform(0.05, 0.95, 3), dtype=torch.float32)

    def color(self) -> Tensor:
        """Return the main part's colour or, as often, another one."""
        own = torch.tensor(self.rng.uniform(0.05, 0.95, 3), dtype=torch.float32)
        return own if self.rng.random() < 0.5 else self.main

    def add(self, triangles: Tensor, part: int, color: Tensor) -> None:
        self.corners.append(triangles)
        self.labels.append(torch.full((len(triangles),), part))
        self.colors.append(color.expand(len(triangles), 3, 3))

    def grid(self, rows: Tensor, part: int, color: Tensor) -> None:
        """Add a surface through points [r, c, 3]."""
        a, b, c, d = rows[:-1, :-1], rows[1:, :-1], rows[1:, 1:], rows[:-1, 1:]
        quads = torch.cat([torch.stack([a, b, c], -2).flatten(0, 1), torch.stack([a, c, d], -2).flatten(0, 1)])
        self.add(quads, part, color)

    def box(self, low: list[float], high: list[float], part: int, color: Tensor, steps: int = 8) -> None:
        """Add a box, every side of steps x steps quads."""
        lo, hi = torch.tensor(low), torch.tensor(high)
        u, v = torch.meshgrid(torch.linspace(0, 1, steps + 1), torch.linspace(0, 1, steps + 1), indexing="ij")
        for axis in range(3):
            for end in (0.0, 1.0):
                unit = torch.stack([torch.full_like(u, end), u, v], -1).roll(axis, -1)
                self.grid(lo + unit * (hi - lo), part, color)

    def tube(self, start: list[float], end: list[float], radii: tuple[float, float], part: int, color: Tensor) -> None:
        """Add a closed tube between two points."""
        a, b = torch.tensor(start), torch.tensor(end)
        along = torch.nn.functional.normalize(b - a, dim=0)
        side = torch.linalg.cross(along, torch.tensor([0.3, 0.5, 0.8]))
        side = torch.nn.functional.normalize(side, dim=0)
        other = torch.linalg.cross(along, side)
        angles = torch.linspace(0, 2 * math.pi, 25)
        ring = angles.cos()[:, None] * side + angles.sin()[:, None] * other  # [25, 3]
        share = torch.cat([torch.zeros(1), torch.linspace(0, 1, 9), torch.ones(1)])
        radius = radii[0] + share * (radii[1] - radii[0])
        radius[0] = radius[-1] = 1e-4
        self.grid(a + share[:, None, None] * (b - a) + radius[:, None, None] * ring, part, color)

    def surface(self) -> tuple[Surface, Tensor]:
        """Return the mesh and the part of every face."""
        corners, colors = torch.cat(self.corners), torch.cat(self.colors)
        vertices = corners.flatten(0, 1)
        return Surface.of(vertices, torch.arange(len(vertices)).view(-1, 3), colors), torch.cat(self.labels)


def build(domain: str, seed: int) -> tuple[Surface, Tensor]:
    """Return a mesh and the part int64 [M] of every face, 1.. as in ``PARTS[domain]``."""
    builder = Builder(np.random.default_rng([DOMAINS.index(domain), seed, 77]))
    (_car if domain == "car" else _horse)(builder)
    return builder.surface()


def _car(b: Builder) -> None:
    length, width, height = b.rng.uniform(1.8, 2.4), b.rng.uniform(0.8, 1.0), b.rng.uniform(0.35, 0.5)
    radius, cabin = b.rng.uniform(0.2, 0.28), b.rng.uniform(0.35, 0.5)
    paint, rubber, glass, lamp = b.main, b.color(), b.color(), b.color()
    x, z = length / 2, width / 2
    b.box([-x, radius, -z], [x, radius + height, z], 1, paint, 16)
    top = radius + height
    b.box([-0.5 * x, top, -0.85 * z], [0.55 * x, top + cabin, 0.85 * z], 3, glass, 12)
    b.box([-0.52 * x, top + cabin, -0.88 * z], [0.57 * x, top + cabin + 0.06, 0.88 * z], 1, paint, 12)
    for along in (-0.6 * x, 0.6 * x):
        for side in (-1, 1):
            b.tube([along, radius, side * (z - 0.05)], [along, radius, side * (z + 0.12)], (radius, radius), 2, rubber)
    for side in (-1, 1):
        middle, wide = radius + 0.65 * height, 0.2 * z
        b.box([x, middle - 0.09, side * 0.7 * z - wide], [x + 0.05, middle + 0.09, side * 0.7 * z + wide], 4, lamp, 4)


def _horse(b: Builder) -> None:
    length, leg, thick = b.rng.uniform(1.2, 1.6), b.rng.uniform(0.7, 1.0), b.rng.uniform(0.26, 0.36)
    skin, mane, hoof, face = b.main, b.color(), b.color(), b.color()
    x = length / 2
    b.tube([-x, leg + thick, 0.0], [x, leg + thick, 0.0], (thick, 0.9 * thick), 2, skin)
    neck = [x + 0.45, leg + thick + b.rng.uniform(0.5, 0.8), 0.0]
    b.tube([x - 0.1, leg + 1.3 * thick, 0.0], neck, (0.65 * thick, 0.5 * thick), 2, skin)
    back, nose = [neck[0] - 0.1, neck[1] + 0.1, 0.0], [neck[0] + 0.5, neck[1] - 0.2, 0.0]
    b.tube(back, nose, (0.6 * thick, 0.35 * thick), 1, face)
    for along in (-0.8 * x, 0.8 * x):
        for side in (-0.5, 0.5):
            b.tube([along, leg + 0.5 * thick, side * thick], [along, 0.0, side * thick], (0.11, 0.08), 3, hoof)
    b.tube([-x, leg + 1.4 * thick, 0.0], [-x - 0.45, leg * 0.7, 0.0], (0.09, 0.05), 4, mane)
