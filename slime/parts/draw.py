"""Draw results: overlay with legend, and label map in exact colours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .palette import Color

Palette = Sequence[Color]
# Fonts of Linux, Windows and macOS for what Pillow's own, which has ASCII alone, lacks: European letters, then Chinese,
# Japanese and Korean.
WIDE_FONTS = (
    *("DejaVuSans.ttf", "segoeui.ttf", "Arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc"),
    *("msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
)
NO_CHARACTER = "\U0010ffff"  # drawn as what a font has not


def drawable(name: str, number: int, size: int) -> tuple[str, Any]:
    """Return the text and the font to draw a part's name with; its number where no font here has the characters."""
    for font in _fonts(size):
        missing = bytes(font.getmask(NO_CHARACTER))
        if not any(bytes(font.getmask(character)) == missing for character in name if not character.isspace()):
            return name, font
    return str(number), _fonts(size)[0]


@cache
def _fonts(size: int) -> list[Any]:
    """Return Pillow's own font, and those of WIDE_FONTS that are installed."""
    fonts: list[Any] = [ImageFont.load_default(size)]
    for file in WIDE_FONTS:
        try:
            fonts.append(ImageFont.truetype(file, size))
        except OSError:
            continue
    return fonts


def color_labels(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Draw a label map [H, W] in the palette's exact colours, uint8 [H, W, 3]; the background is black."""
    table = np.zeros((256, 3), np.uint8)
    table[1 : len(palette) + 1] = palette
    return table[np.clip(labels, 0, 255)]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.55) -> np.ndarray:
    """Tint the parts of an image and outline them, light inside and dark outside: red shows on red too.

    Args:
        image: uint8 [H, W, 3].
        labels: [H, W] of the same size.
        palette: one colour per part.
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
    return result.clip(0, 255).astype(np.uint8)


def legend_below(picture: Image.Image, names: Sequence[str], palette: Palette) -> Image.Image:
    """Return the image with a legend below it, in as many lines as the names need."""
    size = max(10, picture.width // 32)
    texts = [drawable(name, number, size) for number, name in enumerate(names[: len(palette)], start=1)]
    line, pad = round(size * 1.6), size // 2
    places: list[tuple[int, int]] = []
    x = y = pad
    for text, font in texts:
        width = round(font.getlength(text)) + size + 3 * pad
        if x > pad and x + width > picture.width:
            x, y = pad, y + line
        places.append((x, y))
        x += width
    page = Image.new("RGB", (picture.width, picture.height + y + line), (24, 24, 28))
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for (x, y), (text, font), color in zip(places, texts, palette, strict=False):
        top = picture.height + y
        draw.rectangle([x, top, x + size, top + size], fill=color)
        draw.text((x + size + pad, top - size // 4), text, font=font, fill=(230, 230, 230))
    return page


def draw_legend(picture: Image.Image, names: Sequence[str], palette: Palette) -> None:
    """Draw a legend into the corner of an image; names that do not fit are left out."""
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(10, min(picture.size) // 32)
    line, pad = round(size * 1.35), size // 2
    texts = [drawable(name, number, size) for number, name in enumerate(names, start=1)]
    shown = list(zip(texts, palette, strict=False))[: max(1, (picture.height - 2 * pad) // line)]
    width = max(round(font.getlength(text)) for (text, font), _ in shown) + size + 3 * pad
    draw.rectangle([0, 0, min(width, picture.width), len(shown) * line + pad], fill=(0, 0, 0, 150))
    for index, ((text, font), color) in enumerate(shown):
        y = pad // 2 + index * line
        draw.rectangle([pad, y + size // 4, pad + size, y + size // 4 + size], fill=(*color, 255))
        draw.text((2 * pad + size, y), text, font=font, fill=(255, 255, 255, 255))
