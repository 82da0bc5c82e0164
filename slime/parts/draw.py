"""Pictures of results: overlay with legend, label map in exact colours, loss curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .palette import Color

Palette = Sequence[Color]


def color_labels(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Label map [H, W] -> uint8 [H, W, 3] in the palette's exact colours; background black."""
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
        palette: a colour for each part.
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
    """The picture with a strip of colour patches and names under it, in as many lines as they need."""
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
    """Colour patches and names on a dark ground, in place; drops what does not fit."""
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


def loss_curve(losses: Sequence[float], width: int = 512, height: int = 256) -> np.ndarray:
    """Losses over steps as a line on a log scale where they are positive: uint8 [height, width, 3]."""
    picture = Image.new("RGB", (width, height), (24, 24, 28))
    draw = ImageDraw.Draw(picture)
    values = np.asarray([value for value in losses if np.isfinite(value)], dtype=np.float64)
    if len(values) == 0:
        return np.asarray(picture)
    shown = np.log10(values) if (values > 0).all() else values
    low, high = float(shown.min()), float(shown.max())
    margin = 34
    xs = margin + (width - 2 * margin) * np.arange(len(shown)) / max(len(shown) - 1, 1)
    ys = height - margin - (height - 2 * margin) * (shown - low) / max(high - low, 1e-9)
    font = ImageFont.load_default(12)
    for level in np.linspace(0, 1, 4):
        y = height - margin - (height - 2 * margin) * level
        value = low + (high - low) * level
        draw.line([(margin, y), (width - margin, y)], fill=(60, 60, 66))
        draw.text((2, y - 7), f"{10**value if (values > 0).all() else value:.2g}", font=font, fill=(170, 170, 176))
    draw.line([*zip(xs.tolist(), ys.tolist(), strict=True)], fill=(120, 200, 120), width=2)
    draw.text(
        (margin, height - 18),
        f"loss, {len(values)} evaluations, last {values[-1]:.4g}",
        font=font,
        fill=(200, 200, 206),
    )
    return np.asarray(picture)
