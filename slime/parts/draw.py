"""Draw results: overlay with legend, and label map in exact colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .palette import Color

Palette = Sequence[Color]


def color_labels(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Draw a label map [H, W] in the palette's exact colours, uint8 [H, W, 3]; the background is black."""
    table = np.zeros((256, 3), np.uint8)
    table[1 : len(palette) + 1] = palette
    return table[np.clip(labels, 0, 255)]


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Palette, names: Sequence[str] = (), opacity: float = 0.55
) -> np.ndarray:
    """Tint the parts of an image and outline them, light inside and dark outside: red shows on red too.

    Args:
        image: uint8 [H, W, 3].
        labels: [H, W] of the same size.
        palette: one colour per part.
        names: part names; when given, a legend is drawn in the upper left corner.
        opacity: of the tint, 0..1.

    Returns:
        uint8 [H, W, 3].
    """
    colors = color_labels(labels, palette).astype(np.float32)
    inside = (labels > 0)[..., None]
    result = np.where(inside, image * (1 - opacity) + colors * opacity, image)
    edge = np.zeros(labels.shape, bool)
    for here, there in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        differ = labels[here] != labels[there]
        edge[here] |= differ
        edge[there] |= differ
    edge = edge[..., None]
    result = np.where(edge & inside, colors * 0.5 + 127, np.where(edge, result * 0.4, result))
    picture = Image.fromarray(result.clip(0, 255).astype(np.uint8))
    if names:
        draw_legend(picture, names, palette)
    return np.asarray(picture)


def legend_below(picture: Image.Image, names: Sequence[str], palette: Palette) -> Image.Image:
    """Return the image with a legend below it, in as many lines as the names need."""
    size = max(10, picture.width // 32)
    font = ImageFont.load_default(size)
    line, pad = round(size * 1.6), size // 2
    places: list[tuple[int, int]] = []
    x = y = pad
    for name in names[: len(palette)]:
        width = round(font.getlength(name)) + size + 3 * pad
        if x > pad and x + width > picture.width:
            x, y = pad, y + line
        places.append((x, y))
        x += width
    page = Image.new("RGB", (picture.width, picture.height + y + line), (24, 24, 28))
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for (x, y), name, color in zip(places, names, palette, strict=False):
        top = picture.height + y
        draw.rectangle([x, top, x + size, top + size], fill=color)
        draw.text((x + size + pad, top - size // 4), name, font=font, fill=(230, 230, 230))
    return page


def draw_legend(picture: Image.Image, names: Sequence[str], palette: Palette) -> None:
    """Draw a legend into the corner of an image; names that do not fit are left out."""
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(10, min(picture.size) // 32)
    font = ImageFont.load_default(size)
    line, pad = round(size * 1.35), size // 2
    shown = list(zip(names, palette, strict=False))[: max(1, (picture.height - 2 * pad) // line)]
    width = max(round(draw.textlength(name, font=font)) for name, _ in shown) + size + 3 * pad
    draw.rectangle([0, 0, min(width, picture.width), len(shown) * line + pad], fill=(0, 0, 0, 150))
    for index, (name, color) in enumerate(shown):
        y = pad // 2 + index * line
        draw.rectangle([pad, y + size // 4, pad + size, y + size // 4 + size], fill=(*color, 255))
        draw.text((2 * pad + size, y), name, font=font, fill=(255, 255, 255, 255))
