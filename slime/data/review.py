"""Write an HTML page of the images with the lowest confidence and their parts: one file, no server."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest

import numpy as np
from PIL import Image

from ..parts.draw import overlay
from ..parts.palette import Color
from .records import Record

SIDE = 480  # of a shown image
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 24px; background: #16181d; color: #ecf0f1; }
h1 { font-size: 20px; } ul { list-style: none; padding: 0; } .key li { display: inline-block; margin-right: 14px; }
.key span { display: inline-block; width: 12px; height: 12px; margin-right: 5px; border-radius: 2px; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 18px; }
figure { margin: 0; background: #22252c; padding: 10px; border-radius: 8px; }
img { width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { margin-top: 6px; overflow-wrap: anywhere; } small { color: #aab2bd; display: block; }
"""


def least_confident(records: Iterable[Record], count: int) -> list[Record]:
    """Return records in the order of their confidence, the lowest first."""
    return nsmallest(count, records, key=lambda record: (record.confidence, record.name))


def review_page(
    records: Sequence[Record], pixels: Callable[[str], np.ndarray], names: Sequence[str], palette: Sequence[Color]
) -> str:
    """Return the HTML of these records: images with their parts tinted.

    Args:
        pixels: uint8 [H, W, 3] of an image by its name.
    """
    pairs = zip(names, palette, strict=True)
    key = "".join(
        f'<li><span style="background:#{bytes(color).hex()}"></span>{html.escape(name)}</li>' for name, color in pairs
    )
    found = "".join(_figure(record, pixels(record.name), names, palette) for record in records)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>SLiMe: masks to review</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{len(records)} images of the lowest confidence, lowest first</h1>\n"
        f'<ul class="key">{key}</ul>\n<div class="images">\n{found}</div>\n</body></html>\n'
    )


def _figure(record: Record, pixels: np.ndarray, names: Sequence[str], palette: Sequence[Color]) -> str:
    image = Image.fromarray(overlay(pixels, record.labels(), palette, opacity=0.5))
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    shown = base64.b64encode(data.getvalue()).decode()
    parts = ", ".join(f"{names[part.label - 1]} {part.score:.2f}" for part in record.parts) or "no part"
    name = html.escape(record.name)
    return (
        f'<figure><img src="data:image/jpeg;base64,{shown}" alt="{name}"><figcaption>{name}'
        f"<small>confidence {record.confidence:.2f} (examples: 1). {html.escape(parts)}</small></figcaption></figure>\n"
    )
