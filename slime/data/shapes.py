"""Masks as COCO's run lengths, as polygons, and as outlines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..errors import SlimeError

FINE = 4  # grid of polygons, per pixel


def coco_rle(mask: np.ndarray) -> str:
    """Encode a mask bool [H, W] as COCO's compressed run lengths, as pycocotools does.

    Runs go down the columns, out and in by turns. From the fourth on a length is told as its difference to the last but
    one, in digits of five bits, the lowest first; a sixth bit says that more follow.
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    runs = [0, *runs] if flat.size and flat[0] else runs
    text = []
    for index, run in enumerate(runs):
        value, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text.append(chr(48 + digit + 32 * more))
    return "".join(text)


def mask_of_coco(code: str, height: int, width: int) -> np.ndarray:
    """Decode COCO's compressed run lengths to a mask bool [H, W].

    Raises:
        ValueError: they are of another size.
    """
    runs: list[int] = []
    place = 0
    while place < len(code):
        value = shift = 0
        more = True
        while more:
            if place == len(code):
                raise ValueError(f"its run lengths do not fit {height} x {width} pixels: they are cut")
            digit = ord(code[place]) - 48
            value, more = value | (digit & 31) << shift, bool(digit & 32)
            place, shift = place + 1, shift + 5
            if shift > 35:
                raise ValueError(f"its run lengths do not fit {height} x {width} pixels")
            if not more and digit & 16:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return mask_of_runs(runs, height, width)


def mask_of_runs(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """Decode run lengths down the columns, outside first, to a mask bool [H, W].

    Raises:
        ValueError: they are of another size.
    """
    lengths = np.asarray(runs)
    if (
        lengths.ndim != 1
        or lengths.dtype.kind not in "iu"
        or (lengths < 0).any()
        or (lengths > height * width).any()
        or lengths.sum() != height * width
    ):
        raise ValueError(f"its run lengths do not fit {height} x {width} pixels")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def fill_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Fill polygons, float [N, 2] of x, y in pixels each, in a mask bool [H, W]: pixels covered by at least half.

    Raises:
        ValueError: points that are not finite.
    """
    mask = np.zeros((height, width), bool)
    for points in polygons:
        if not np.isfinite(points).all():
            raise ValueError("its outline has numbers that are not finite")
        low = np.clip(np.floor(points.min(0)), 0, (width, height)).astype(int)
        high = np.clip(np.ceil(points.max(0)), 0, (width, height)).astype(int)
        (left, top), (columns, rows) = low, high - low
        if columns < 1 or rows < 1:
            continue
        fine = Image.new("L", (int(columns) * FINE, int(rows) * FINE))
        # Pillow also draws the outline, half a pixel wide on each side: the -0.5 and the fine grid make that small.
        corners = ((points - low) * FINE - 0.5).clip(-(2**20), 2**20)
        ImageDraw.Draw(fine).polygon([(float(x), float(y)) for x, y in corners], fill=255)
        covered = np.asarray(fine.reduce(FINE)) >= 128
        mask[top : top + rows, left : left + columns] |= covered
    return mask


def rectangle(corner: np.ndarray, size: np.ndarray, degrees: float) -> np.ndarray:
    """Return the corners [4, 2] of a rectangle that is turned clockwise around its upper left corner."""
    return corner + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size @ _turn(degrees)


def ellipse(centre: np.ndarray, radii: np.ndarray, degrees: float) -> np.ndarray:
    """Return the outline [64, 2] of an ellipse that is turned clockwise around its centre."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii @ _turn(degrees)


def _turn(degrees: float) -> np.ndarray:
    """Return the matrix that turns row vectors x, y clockwise on the screen."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def outlines(mask: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Yield the regions of a mask bool [H, W]: outer polygon and holes, each float [N, 2] of x, y in pixels."""
    try:
        from contourpy import FillType, contour_generator
    except ImportError as error:
        raise SlimeError(
            "Polygons need contourpy to be exported. Install it into ComfyUI's Python and restart: python -m pip "
            "install contourpy (portable build: python_embeded\\python.exe -m pip install contourpy). Or choose the "
            "format coco."
        ) from error

    padded = np.pad(mask, 1).astype(np.float64)
    filled = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    height, width = mask.shape
    for points, offsets in zip(*filled, strict=True):
        # Pixel centres lie at .5; the padding is one pixel.
        rings = [(points[a:b] - 0.5).clip(0, (width, height)) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        yield rings[0], rings[1:]
