"""Outlines of masks, and Label Studio's run lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BYTE = 8
SIZES = (3, 4, 8, 16)  # bits that a run's length may take in Label Studio's code


def outlines(mask: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Pieces of a mask bool [H, W]: outer polygon and holes, each float [N, 2] of x, y in pixels, half-way between
    pixels in and out."""
    from contourpy import FillType, contour_generator

    padded = np.pad(mask, 1).astype(np.float64)
    filled = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    height, width = mask.shape
    for points, offsets in zip(*filled, strict=True):
        # Pixel centres lie at .5; the padding is one pixel.
        rings = [(points[a:b] - 0.5).clip(0, (width, height)) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        yield rings[0], rings[1:]


def brush_rle(mask: np.ndarray) -> list[int]:
    """A mask bool [H, W] in Label Studio's encoding of brush labels: thi.ng's rle-pack of the RGBA values 0 or 255.

    A stream of bits: the number of values (32 bits), bits a value less 1 (5), four sizes less 1 (4 each); then for
    every run a bit (1: one value repeated, 0: values as they are), which size its length has (2), its length less 1,
    the value or values. Only repeated runs are written here.
    """
    flat = np.asarray(mask, bool).ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [flat.size]])) * 4
    values = flat[starts]
    longest = 1 << SIZES[-1]
    bits = [_bits(flat.size * 4, 32), _bits(7, 5), *(_bits(size - 1, 4) for size in SIZES)]
    for length, value in zip(lengths.tolist(), values.tolist(), strict=True):
        while length:
            run = min(length, longest)
            kind = next(i for i, size in enumerate(SIZES) if run <= 1 << size)
            bits += ["1", _bits(kind, 2), _bits(run - 1, SIZES[kind]), "11111111" if value else "00000000"]
            length -= run
    joined = "".join(bits)
    joined += "0" * (-len(joined) % BYTE)
    return list(int(joined, 2).to_bytes(len(joined) // BYTE, "big"))


def mask_of_brush(code: list[int], height: int, width: int) -> np.ndarray:
    """bool [H, W] from such a code, as Label Studio's own editor writes it too.

    Raises:
        ValueError: it is of another size, or cut.
    """
    bits, place = int.from_bytes(bytes(code), "big"), len(code) * BYTE

    def read(count: int) -> int:
        nonlocal place
        if count > place:
            raise ValueError("the brush's code is cut")
        place -= count
        return (bits >> place) & ((1 << count) - 1)

    total, word, sizes = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    if total != height * width * 4:
        raise ValueError(f"the brush's code holds {total} values, not {height} x {width} x 4")
    values, done = np.empty(total, np.uint8), 0
    while done < total:
        repeated = read(1)
        end = done + read(sizes[read(2)]) + 1
        if repeated:
            values[done:end] = read(word)
        else:
            values[done:end] = [read(word) for _ in range(end - done)]
        done = end
    return values.reshape(height, width, 4)[..., 3] > 0


def _bits(value: int, count: int) -> str:
    return format(value, f"0{count}b")
