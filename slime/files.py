"""Write files that appear completely or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image

SCRATCH = ".slime-partial"  # ends the names of files that are being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Provide a temporary path beside ``path`` that no other process uses, and rename it in the end; on an error the
    temporary file is deleted and ``path`` left as it was."""
    partial = path.with_name(f".{uuid4().hex}{SCRATCH}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(data)


def png(pixels: np.ndarray, palette: Sequence[tuple[int, int, int]] | None = None) -> bytes:
    """Encode pixels uint8 [H, W] or [H, W, 3] as PNG, with a palette for label maps."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    if palette is not None:
        image.putpalette([level for color in palette for level in color])
    image.save(data, "PNG")
    return data.getvalue()
