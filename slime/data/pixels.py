"""Decode the bytes of an image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import SlimeError

TURNED = 0x0112  # the EXIF tag of the orientation
WIDE = {"I;16": 257, "I;16B": 257, "I;16L": 257, "I": 257, "F": 1 / 255}  # modes of PIL, and one of 256 levels in them
ROTATIONS = {  # of ImageOps.exif_transpose that exchange height and width
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
    except Exception as error:  # Pillow's plugins raise whatever the bytes lead to
        raise SlimeError(f"Pillow cannot read this image: {error}") from error


def upright_labels(labels: np.ndarray, file: Path) -> np.ndarray:
    """Turn a label map [H, W] as EXIF turns its image, where it has the size of the image before that.

    Tools differ in which of the two they label; where the sizes do not tell, labels are taken to be upright.
    """
    try:
        with Image.open(file) as image:
            turn = ROTATIONS.get(image.getexif().get(TURNED, 1))
            stored = (image.height, image.width)
    except Exception:  # as below
        return labels  # decoding the image reports it
    if turn is None or labels.shape != stored or stored[0] == stored[1]:
        return labels
    return np.ascontiguousarray(np.asarray(Image.fromarray(labels).transpose(turn)))


def upright_size(file: Path) -> tuple[int, int]:
    """Return height and width of an image as it is shown; raise SlimeError if it cannot be read."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(TURNED, 1) in ROTATIONS
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # Pillow's plugins raise whatever the bytes lead to
        raise SlimeError(f"{file.name}: Pillow cannot read this image: {error}") from error
