"""Decode the bytes of an image."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from ..errors import SlimeError

WIDE = {"I;16": 257, "I;16B": 257, "I;16L": 257, "I": 257, "F": 1 / 255}  # modes of PIL, and one of 256 levels in them
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}


def decode(data: bytes) -> np.ndarray:
    """Decode to uint8 [H, W, 3] as Load Image does: turned by EXIF, the first frame of several, without transparency.

    Grey of 16 bits is taken for 0..65535, of floats for 0..1.

    Raises:
        SlimeError: no image, a broken one, or a larger one than Pillow allows.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.seek(0)
            upright = ImageOps.exif_transpose(image)
            if upright.mode in WIDE:
                levels = np.asarray(upright, np.float64) / WIDE[upright.mode]
                upright = Image.fromarray(np.nan_to_num(levels).round().clip(0, 255).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SlimeError(f"This is no image that Pillow can read: {error}") from error
