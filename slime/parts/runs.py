"""Encode label maps as short text: run lengths, as web/painter/label_map.js writes and reads them."""

from __future__ import annotations

import base64
import binascii

import numpy as np

LONGEST_SIDE, MOST_PIXELS = 32768, 2**27


def encode_runs(labels: np.ndarray) -> str:
    """Encode a label map [h, w] of integers below 256."""
    flat = labels.ravel()
    starts = [*np.flatnonzero(np.diff(flat.astype(int), prepend=-1)).tolist(), len(flat)]
    data = bytearray()
    for start, end in zip(starts, starts[1:], strict=False):
        data.append(int(flat[start]))
        count = end - start
        while count > 127:
            data.append(count & 127 | 128)
            count >>= 7
        data.append(count)
    return base64.b64encode(bytes(data)).decode()


def decode_runs(runs: str, width: int, height: int) -> np.ndarray:
    """Decode a text of :func:`encode_runs` into a label map uint8 [height, width].

    Raises:
        ValueError: the runs do not add up to the size, or it exceeds the limits; nothing is allocated then.
    """
    if not all(isinstance(side, int) and 1 <= side <= LONGEST_SIDE for side in (width, height)):
        raise ValueError(f"a size of {width} x {height}")
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels")
    try:
        data = base64.b64decode(runs, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    starts, position, total = [], 0, 0
    while position < len(data):
        label, count, shift, more = data[position], 0, 0, True
        while more:
            position += 1
            if position >= len(data) or shift > 28:
                raise ValueError("it is cut short" if position >= len(data) else "a run has no end")
            count |= (data[position] & 127) << shift
            more, shift = data[position] > 127, shift + 7
        starts.append((label, count))
        total += count
        if total > width * height:
            break
        position += 1
    if total != width * height:
        raise ValueError(f"{total} pixels instead of {width} x {height}")
    labels, counts = np.array(starts).T
    return np.repeat(labels.astype(np.uint8), counts).reshape(height, width)
