"""Masks in colours or numbers with a list of them: Pascal VOC's folders (CVAT too), and Roboflow's semantic masks."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import SlimeError
from ...examples import IGNORE
from ..pixels import SUFFIXES, upright_labels
from .base import AnnotatedImage, AnnotatedSet, Files, decoder, files_of, note, part_name, part_names, text_of

MASKS, IMAGES, COLORS, NUMBERS = "SegmentationClass", "JPEGImages", "labelmap.txt", "_classes.csv"
VOID = (224, 224, 192)  # the colour of pixels to ignore
MOST_NOTED = 5  # unknown colours of a mask
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
Color = tuple[int, int, int]


def claims(folder: Path) -> bool:
    """Return whether a folder holds such a data set."""
    return (folder / MASKS).is_dir() or (folder / NUMBERS).is_file()


def read(folder: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read the masks of a folder: ``SegmentationClass/*.png`` and ``labelmap.txt``, or ``*_mask.png`` and
    ``_classes.csv``.

    Raises:
        SlimeError: a list that cannot be read.
    """
    files, pairs, skipped = Files(), list[tuple[Path, Path]](), list[str]()
    if (folder / MASKS).is_dir():
        colors = _color_list(folder / COLORS) if (folder / COLORS).is_file() else _voc_colors()
        for mask in (file for file in files_of(folder / MASKS) if file.suffix.lower() in SUFFIXES):
            places = [folder / place / f"{mask.stem}{end}" for place in (IMAGES, "images", ".") for end in SUFFIXES]
            image = next((file for file in map(files.find, places) if file is not None), None)
            if image is None:
                skipped.append(f"{MASKS}/{mask.name}: there is no image of that name in {IMAGES}")
            else:
                pairs.append((image, mask))
    else:
        colors = _number_list(folder / NUMBERS)
        for mask in (file for file in files_of(folder) if file.stem.endswith("_mask")):
            stem = mask.stem.removesuffix("_mask")
            image = next((file for end in SUFFIXES if (file := files.find(folder / f"{stem}{end}")) is not None), None)
            if image is not None:
                pairs.append((image, mask))
            else:
                skipped.append(f"{mask.name}: there is no image {stem}")
    parts = part_names(colors, wanted, folder.name)
    numbers = {colors[name]: parts.index(name) + 1 for name in parts}
    known = set(colors.values())
    images = [AnnotatedImage(image.name, decoder(image), _labels(mask, image, numbers, known, skipped))
              for image, mask in pairs]  # fmt: skip
    return AnnotatedSet(parts, tuple(images), skipped)


def _color_list(file: Path) -> dict[str, int | Color]:
    """Read CVAT's ``labelmap.txt``: lines "name:r,g,b:parts:actions"."""
    colors: dict[str, int | Color] = {}
    for line in text_of(file).splitlines():
        name, _, rest = (
            line.rpartition(":")[0].rpartition(":")[0].rpartition(":") if line.count(":") >= 3 else ("",) * 3
        )
        digits = rest.split(",")
        if line.startswith("#") or not name:
            continue
        if len(digits) != 3 or not all(digit.strip().isdecimal() and int(digit) < 256 for digit in digits):
            raise SlimeError(f'{file.name} has the line "{line}". It should be name:red,green,blue::')
        colors[part_name(name)] = (int(digits[0]), int(digits[1]), int(digits[2]))
    return colors


def _number_list(file: Path) -> dict[str, int | Color]:
    """Read Roboflow's ``_classes.csv``: "Pixel Value, Class"."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text_of(file).splitlines()) if len(row) > 1]
    except csv.Error as error:
        raise SlimeError(f"{file.name} is no table of numbers and names ({error}).") from error
    numbers = {part_name(row[1]): int(row[0]) for row in rows if row[0].isdecimal() and int(row[0]) < IGNORE}
    if not numbers:
        raise SlimeError(f'{file.name} has no lines "number, name".')
    return dict(numbers)


def _voc_colors() -> dict[str, int | Color]:
    """Return the classes of Pascal VOC with their numbers."""
    return {name: number for number, name in enumerate(VOC, start=1)}


def _labels(
    file: Path, image: Path, numbers: Mapping[int | Color, int], known: set[int | Color], skipped: list[str]
) -> Callable[[], np.ndarray]:
    def labels() -> np.ndarray:
        try:
            with Image.open(file) as mask:
                colored = any(isinstance(number, tuple) for number in known)
                if not colored and mask.mode not in ("P", "L", "1", "I", "I;16"):
                    raise SlimeError(f"{file.name} is in colours, and there is no {COLORS} that says what they mean.")
                values = np.asarray(mask.convert("RGB") if colored else mask)
        except SlimeError:
            raise
        except Exception as error:  # Pillow's plugins raise whatever the bytes lead to
            raise SlimeError(f"{file.name} cannot be read as a mask: {error}") from error
        label_map = np.zeros(values.shape[:2], np.uint8)
        label_map[(values == VOID).all(-1) if colored else values == IGNORE] = IGNORE
        for number, label in numbers.items():
            label_map[(values == number).all(-1) if colored else values == number] = label
        seen = {tuple(color) for color in np.unique(values.reshape(-1, 3), axis=0).tolist()} if colored else set(
            np.unique(values).tolist())  # fmt: skip
        for other in sorted(seen - known - {VOID, IGNORE, (0, 0, 0), 0}, key=str)[:MOST_NOTED]:
            note(skipped, f"{file.name}: {other} is not in the list of names")
        return upright_labels(label_map, image)

    return labels
