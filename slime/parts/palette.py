"""Distinct colours for parts."""

from __future__ import annotations

Color = tuple[int, int, int]

PALETTE: tuple[Color, ...] = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
    (220, 190, 255),
    (170, 110, 40),
    (255, 250, 200),
    (128, 0, 0),
    (170, 255, 195),
    (128, 128, 0),
    (255, 215, 180),
    (0, 0, 128),
    (128, 128, 128),
)


def default_palette(count: int) -> tuple[Color, ...]:
    """Return ``count`` distinct colours; the first twenty are hand-picked, further ones are darker variants of them."""
    colors = []
    for index in range(count):
        r, g, b = PALETTE[index % len(PALETTE)]
        shade = 1.0 - 0.23 * (index // len(PALETTE))
        colors.append((int(r * shade), int(g * shade), int(b * shade)))
    return tuple(colors)
