"""YOLO's segmentation labels: a text file of polygons per image, as Ultralytics, CVAT and others have them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from ...embeddings import PartEmbeddings
from ...errors import SlimeError
from ...files import write_whole
from ...parts.maps import PartMaps
from ..file_names import read_table
from ..pixels import SUFFIXES, upright_size
from ..records import Record
from ..run_log import RunLog
from ..shapes import fill_polygons, outlines
from .base import AnnotatedImage, AnnotatedSet, Files, Format, decoder, draw, part_name, part_names, text_of

_Shape = tuple[int, np.ndarray, str]  # class, points in [0, 1] [N, 2], and where it stands
logger = logging.getLogger(__name__)
LISTS = ("classes.txt", "obj.names")  # of names, one per line
NO_LABELS = (*LISTS, "names.txt", "notes.txt")
SUBSETS = ("train", "val", "valid", "test")  # entries of data.yaml


class Yolo(Format):
    """Write ``labels/*.txt`` of YOLO-seg, and ``data.yaml``; classes count from 0, holes are filled."""

    def __init__(self, folder: Path, parts: PartEmbeddings | PartMaps, *more: Any) -> None:
        super().__init__(folder, parts, *more)
        self._with_holes: list[str] = []

    def write(self, record: Record, labels: np.ndarray) -> None:
        lines, holes = [], 0
        for part in record.parts:
            for outer, inner in outlines(labels == part.label):
                holes += len(inner)
                points = outer[:-1] / (record.width, record.height)
                if len(points) > 2:
                    lines.append(f"{part.label - 1} " + " ".join(f"{value:.6f}" for value in points.ravel()))
        if holes:
            self._with_holes.append(record.name)
        write_whole(self.place("labels", record.name, ".txt"), "".join(f"{line}\n" for line in lines).encode())

    def finish(self, run_log: RunLog) -> None:
        if self._with_holes:
            count, first = len(self._with_holes), self._with_holes[0]
            logger.warning("SLiMe: parts of %d images (%s ...) have holes; YOLO's polygons fill them.", count, first)
        names = "".join(f"  {label}: {json.dumps(name, ensure_ascii=False)}\n" for label, name in enumerate(self.names))
        text = "# Put the images into images/, or say where they are.\npath: .\ntrain: images\nval: images\nnames:\n"
        write_whole(self.folder / "data.yaml", (text + names).encode())


def claims(folder: Path) -> bool:
    """Return whether a folder holds such a data set."""
    return any((folder / name).is_file() for name in LISTS) or _yaml_in(folder) is not None


def read(path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read a folder, or its ``data.yaml``: every image below it that has a label file.

    Raises:
        SlimeError: no names, or a file that cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    names, roots = _description(path, folder)
    skipped, found = list[str](), dict[Path, list[_Shape]]()
    renamed = {name: file for kind, name, file in read_table(folder) if kind == "image"}
    files, labelled = Files(), set[Path]()
    for image in sorted({file for root in roots for file in root.rglob("*") if file.suffix.lower() in SUFFIXES}):
        labels = _label_file(image, folder, files, renamed)
        if labels is not None:
            labelled.add(labels)
            if shapes := _shapes(labels, names, skipped):
                found[image] = shapes
    lone = [file for root in roots for file in (root / "labels").rglob("*.txt") if file not in labelled]
    skipped += [f"{file.name}: there is no image of that name" for file in lone if file.name.lower() not in NO_LABELS]
    used = sorted({number for shapes in found.values() for number, *_ in shapes})
    parts = part_names([part_name(names[number]) for number in used], wanted, folder.name)
    numbers = {number: part_name(names[number]) for number in used if part_name(names[number]) in parts}

    def annotated(image: Path, shapes: list[_Shape]) -> AnnotatedImage:
        chosen = [shape for shape in shapes if shape[0] in numbers]
        inner = next((root for root in (folder / "images", folder) if root in image.parents), image.parent)
        name = image.relative_to(inner).as_posix()

        def labels() -> np.ndarray:
            height, width = upright_size(image)
            masks = [
                (numbers[number], partial(_mask, points, height, width), where) for number, points, where in chosen
            ]
            return draw(masks, parts, (height, width), name, skipped)

        return AnnotatedImage(name, decoder(image), labels)

    images = [annotated(*item) for item in found.items() if any(shape[0] in numbers for shape in item[1])]
    return AnnotatedSet(parts, tuple(images), skipped)


def _mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    return fill_polygons([points * (width, height)], height, width)


def _yaml_in(folder: Path) -> Path | None:
    files = sorted(file for file in folder.glob("*.y*ml") if file.suffix.lower() in (".yaml", ".yml"))
    return next((file for file in files if "names" in file.read_text(encoding="utf-8", errors="replace")), None)


def _description(path: Path, folder: Path) -> tuple[list[str], list[Path]]:
    """Return the names of the classes, and the folders that may hold images."""
    file = path if path.is_file() else _yaml_in(folder)
    if file is None:
        listed = next(folder / name for name in LISTS if (folder / name).is_file())
        return [line.strip() for line in text_of(listed).splitlines() if line.strip()], [folder]
    try:
        body = yaml.load(text_of(file), yaml.BaseLoader)  # texts alone: "no" is a name, not False
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SlimeError(f"{file.name} is not valid YAML ({str(error).splitlines()[0]}).") from error
    names = body.get("names") if isinstance(body, dict) else None
    if isinstance(names, dict) and names and all(str(key).isdecimal() for key in names):
        numbered = {int(str(key)): name for key, name in names.items()}
        if max(numbered) < 10_000:
            names = [numbered.get(number, "") for number in range(max(numbered) + 1)]
    if not isinstance(names, list) or not names:
        raise SlimeError(f"{file.name} has no list of names. It should say names: [wheel, window].")
    base = folder / str(body.get("path") or ".")
    subsets = [body.get(subset) for subset in SUBSETS]
    entries = [text for entry in subsets for text in (entry if isinstance(entry, list) else [entry])]
    outside = [base / text for text in entries if isinstance(text, str) and _is_folder_outside(base / text, folder)]
    return [str(name) for name in names], [folder, *outside]


def _is_folder_outside(place: Path, folder: Path) -> bool:
    try:
        return place.is_dir() and not place.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def _label_file(image: Path, folder: Path, files: Files, renamed: Mapping[str, str]) -> Path | None:
    """Return the label file of an image: in the folder "labels" for "images", or beside it."""
    parts = image.parts
    inner = image.relative_to(folder / "images") if (folder / "images") in image.parents else None
    if inner is not None and inner.as_posix() in renamed:
        return files.find(folder / "labels" / f"{renamed[inner.as_posix()]}.txt")
    places = [image.parent / "labels" / f"{image.stem}.txt", image.with_suffix(".txt")]
    if image.is_relative_to(folder):
        places.insert(0, folder / "labels" / image.relative_to(folder).with_suffix(".txt"))
    for index in (i for i, part in enumerate(parts[:-1]) if part.lower() == "images"):
        places.insert(0, Path(*parts[:index], "labels", *parts[index + 1 :]).with_suffix(".txt"))
    return next((file for file in map(files.find, places) if file is not None and file.name not in NO_LABELS), None)


def _shapes(file: Path, names: Sequence[str], skipped: list[str]) -> list[_Shape]:
    """Return the polygons of a label file."""
    shapes = []
    try:
        text = text_of(file)
    except (SlimeError, OSError) as error:
        skipped.append(str(error))
        return []
    for number, line in enumerate(text.splitlines(), start=1):
        where, words = f"{file.name}, line {number}", line.split()
        if not words:
            continue
        try:
            numbers = [float(word) for word in words]
            if not numbers[0].is_integer() or not 0 <= numbers[0] < len(names) or not part_name(names[int(numbers[0])]):
                raise ValueError(f"there is no class {words[0]} in the list of names")
            if len(numbers) < 7:
                raise ValueError("it is a box, not an outline" if len(numbers) in (5, 6) else "it is no outline")
            even = len(numbers) - 1 - (len(numbers) - 1) % 2  # a confidence may come last
            points = np.array(numbers[1 : 1 + even]).reshape(-1, 2)
            if not np.isfinite(points).all() or np.abs(points).max() > 2:
                raise ValueError("its points are not in [0, 1]")
        except (ValueError, OverflowError) as error:
            skipped.append(f"{where}: {error}")
            continue
        shapes.append((int(numbers[0]), points, where))
    return shapes
