"""COCO instances, with run lengths or polygons, as COCO, CVAT, Roboflow, Label Studio and others write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import SlimeError
from ..pixels import upright_labels
from ..records import Record
from ..run_log import RunLog
from ..shapes import fill_polygons, mask_of_coco, mask_of_runs, outlines
from .base import (
    AnnotatedImage,
    AnnotatedSet,
    Files,
    Format,
    decoder,
    dicts,
    draw,
    part_name,
    part_names,
    plain_name,
    points_of,
    side_of,
    write_json,
)


class Coco(Format):
    """Write ``annotations.json``: COCO instances, one annotation per part, with run lengths or ``polygons``."""

    polygons = False

    def finish(self, run_log: RunLog) -> None:
        def images() -> Iterator[dict[str, Any]]:
            for number, one in enumerate(run_log.records(), start=1):
                yield {"id": number, "file_name": one.name, "height": one.height, "width": one.width}

        def annotations() -> Iterator[dict[str, Any]]:
            number = 0
            for image, one in enumerate(run_log.records(), start=1):
                for part in one.parts:
                    number += 1
                    yield {
                        "id": number,
                        "image_id": image,
                        "category_id": part.label,
                        "segmentation": self._shape(one, part),
                        "area": part.area,
                        "bbox": list(part.bbox),
                        "iscrowd": 0,
                        "score": part.score,
                    }

        categories = [{"id": i, "name": name, "supercategory": "part"} for i, name in enumerate(self.names, start=1)]
        info = {"description": "Parts segmented by SLiMe", "version": self.model}
        fixed = {"info": info, "licenses": [], "categories": categories}
        write_json(self.folder / "annotations.json", fixed, images=images(), annotations=annotations())

    def _shape(self, record: Record, part: Any) -> Any:
        if not self.polygons:
            return {"size": [record.height, record.width], "counts": part.counts}
        rings = [outer for outer, _ in outlines(mask_of_coco(part.counts, record.height, record.width))]
        return [ring[:-1].round(2).ravel().tolist() for ring in rings if len(ring) > 3]


class CocoPolygons(Coco):
    """Write COCO polygons, for tools that read no run lengths; holes are filled."""

    polygons = True


def _entries(body: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = body.get(key)
    if not isinstance(entries, list):
        raise SlimeError(f"{path.name} is no COCO file of instances: it has no list {key}.")
    return dicts(entries)


def _image_folders(path: Path) -> list[Path]:
    """Return where tools put the images of a file: beside it, in "images", or beside its folder "annotations".

    CVAT has them in "images", perhaps in a folder of the subset; "instances_val2017.json" of COCO means "val2017".
    """
    folder, subset = path.parent, path.stem.removeprefix("instances_")
    folders = [folder, folder / "images"]
    if folder.name.lower() == "annotations":
        folders += [folder.parent / name for name in ("images", f"images/{subset}", subset, ".")]
    return folders


def _by_id(entries: list[dict[str, Any]], what: str, kind: str, skipped: list[str]) -> dict[str, dict[str, Any]]:
    """Return entries by their ids; an id with two of ``what`` is left out, and told."""
    found: dict[str, dict[str, Any]] = {}
    twice = set[str]()
    for entry in entries:
        number = _id(entry.get("id"))
        if found.setdefault(number, entry).get(what) != entry.get(what):
            twice.add(number)
            skipped.append(f"{kind} id {number} stands for {found[number].get(what)} and for {entry.get(what)}")
    return {number: entry for number, entry in found.items() if number not in twice}


def _id(value: Any) -> str:
    """Return an id as text: some tools write 7 as "7" or 7.0 elsewhere."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read(body: Mapping[str, Any], path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read the parsed content of a file: the images that have annotations of wanted categories, or of any.

    Raises:
        SlimeError: a list is missing, or two wanted categories have one name.
    """
    skipped = list[str]()
    categories = {number: part_name(entry.get("name")) for number, entry in
                  _by_id(_entries(body, "categories", path), "name", "category", skipped).items()}  # fmt: skip
    images = _by_id(_entries(body, "images", path), "file_name", "image", skipped)
    files, folders = (
        Files(plain_name(str(image.get("file_name", ""))) for image in images.values()),
        _image_folders(path),
    )
    of_image: dict[str, list[tuple[str, Any, str]]] = {image: [] for image in images}
    used: set[str] = set()
    for index, entry in enumerate(_entries(body, "annotations", path)):
        label = f"annotation {entry.get('id', f'number {index + 1}')}"
        image, category = _id(entry.get("image_id")), _id(entry.get("category_id"))
        if image not in images:
            skipped.append(f"{label}: the image {image} is not listed")
        elif category not in categories:
            skipped.append(f"{label}: the category {category} is not listed")
        elif not categories[category]:
            skipped.append(f"{label}: its category {category} has no name")
        else:
            used.add(category)
            try:
                of_image[image].append((category, _coco_shape(entry.get("segmentation")), label))
            except (ValueError, TypeError, OverflowError) as error:
                skipped.append(f"{label}: {error}")
    names = part_names([name for number, name in categories.items() if number in used], wanted, path.name)
    twins = [name for name, count in Counter(categories[number] for number in used).items() if count > 1]
    if set(twins) & set(names):
        raise SlimeError(f"{path.name} has several categories named {', '.join(twins)}. Give them different names.")

    def annotated(key: str) -> AnnotatedImage | None:
        image, shapes = images[key], [item for item in of_image[key] if categories[item[0]] in names]
        if not shapes:
            return None
        name = plain_name(str(image.get("file_name", "")))
        try:
            height, width = (side_of(image.get(side)) for side in ("height", "width"))
            checked = [item for item in shapes if _fits(item[1], height, width, item[2], skipped)]
        except ValueError as error:
            skipped.append(f"image {name or key}: {error}")
            return None
        file = files.image(folders, name)

        def labels() -> np.ndarray:
            masks = [(categories[category], partial(_coco_mask, shape, height, width), label)
                     for category, shape, label in checked]  # fmt: skip
            return upright_labels(draw(masks, names, (height, width), name, skipped), file)

        return AnnotatedImage(name, decoder(file, name), labels) if checked else None

    found = [annotated(key) for key in images]
    return AnnotatedSet(names, tuple(image for image in found if image is not None), skipped)


def _fits(shape: Any, height: int, width: int, label: str, skipped: list[str]) -> bool:
    """Return whether run lengths are of the image's size; a line in ``skipped`` if not."""
    size = shape.get("size") if isinstance(shape, dict) else None
    if size is None or size == [height, width]:
        return True
    skipped.append(f"{label}: its run lengths are of the size {size}, the image of {[height, width]}")
    return False


def _coco_shape(shape: Any) -> Any:
    """Return polygons as arrays [N, 2], or run lengths as they are; raise ValueError for anything else."""
    if isinstance(shape, dict):
        if not isinstance(shape.get("counts"), list | str):
            raise ValueError("its run lengths have no counts")
        return shape
    if not isinstance(shape, list) or not shape:
        raise ValueError("it has no outline, only a box" if not shape else "its segmentation is of no known form")
    pieces = shape if isinstance(shape[0], list) else [shape]
    polygons = [points_of(piece) for piece in pieces if isinstance(piece, list) and len(piece) >= 6]
    if not polygons:
        raise ValueError("its outline has fewer than three points")
    return polygons


def _coco_mask(shape: Any, height: int, width: int) -> np.ndarray:
    """Decode a COCO segmentation to a mask bool [H, W]: run lengths, compressed or not, or polygons."""
    if isinstance(shape, list):
        return fill_polygons(shape, height, width)
    counts = shape["counts"]
    return mask_of_coco(counts, height, width) if isinstance(counts, str) else mask_of_runs(counts, height, width)
