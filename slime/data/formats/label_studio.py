"""Label Studio: its JSON export is read, tasks with predictions are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlparse

import numpy as np

from ...errors import SlimeError
from ..pixels import SUFFIXES, upright_labels
from ..records import Record
from ..run_log import RunLog, write_whole
from ..shapes import ellipse, fill_polygons, mask_of_coco, rectangle
from .base import (
    AnnotatedImage,
    AnnotatedSet,
    Files,
    Format,
    decoder,
    dicts,
    note,
    part_name,
    part_names,
    plain_name,
    points_of,
    said_of,
    side_of,
    write_json,
)

BYTE = 8
SIZES = (3, 4, 8, 16)  # bits that a run's length may take in the brush's code


class LabelStudio(Format):
    """Write ``tasks.json``, one task per image with a prediction as brush labels, and ``config.xml`` for it.

    The images' addresses are their names after ``/data/local-files/?d=``, as Label Studio's local storage has them.
    """

    def finish(self, run_log: RunLog) -> None:
        write_whole(self.folder / "config.xml", self._config().encode())
        write_json(self.folder / "tasks.json", None, tasks=map(self._task, run_log.records()))

    def _config(self) -> str:
        from xml.sax.saxutils import quoteattr

        labels = "".join(
            f'    <Label value={quoteattr(name)} background="#{bytes(color).hex()}"/>\n'
            for name, color in zip(self.names, self.palette, strict=True)
        )
        return (
            '<View>\n  <Image name="image" value="$image"/>\n'
            f'  <BrushLabels name="parts" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
        )

    def _task(self, record: Record) -> dict[str, Any]:
        results = [
            {
                "id": f"{record.name}-{part.label}",
                "type": "brushlabels",
                "from_name": "parts",
                "to_name": "image",
                "original_width": record.width,
                "original_height": record.height,
                "image_rotation": 0,
                "score": part.score,
                "value": {
                    "format": "rle",
                    "rle": brush_rle(mask_of_coco(part.counts, record.height, record.width)),
                    "brushlabels": [self.names[part.label - 1]],
                },
            }
            for part in record.parts
        ]
        prediction = {"model_version": self.model, "score": record.confidence, "result": results}
        return {"data": {"image": f"/data/local-files/?d={quote(record.name)}"}, "predictions": [prediction]}


def read(tasks: Sequence[Any], path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read a JSON export of Label Studio: the regions of each task's last annotation that was not cancelled."""
    skipped, files = list[str](), Files()
    regions: list[tuple[str, str, list[dict[str, Any]]]] = []
    for index, task in enumerate(tasks):
        label = f"task {task.get('id', index + 1)}" if isinstance(task, dict) else f"task {index + 1}"
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict):
            raise SlimeError(f"{path.name} is no JSON export of Label Studio ({label} has no data). Export it as JSON.")
        name = _image_of(data)
        shapes = _regions(task, label, skipped)
        if shapes and not name:
            skipped.append(f"{label}: no field of its data is an image")
        elif shapes:
            regions.append((name, label, shapes))
    names = part_names([shape["part"] for _, _, shapes in regions for shape in shapes], wanted, path.name)
    if not names and not wanted:
        said = said_of(skipped) or "Export it as JSON."
        raise SlimeError(f"{path.name} has no brush, polygon, ellipse or rectangle labels. {said}")

    def annotated(name: str, label: str, shapes: list[dict[str, Any]]) -> AnnotatedImage:
        file = files.image((path.parent, path.parent / "images"), name)

        def labels() -> np.ndarray:
            label_map = np.zeros((shapes[0]["height"], shapes[0]["width"]), np.uint8)
            for shape in shapes:
                try:
                    label_map[_region_mask(shape, *label_map.shape)] = names.index(shape["part"]) + 1
                except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
                    note(skipped, f"{label}, region {shape['id']}: {error}")
            return upright_labels(label_map, file)

        return AnnotatedImage(name, decoder(file, name), labels)

    chosen = [(name, label, [s for s in shapes if s["part"] in names]) for name, label, shapes in regions]
    return AnnotatedSet(names, tuple(annotated(*item) for item in chosen if item[2]), skipped)


def _image_of(data: Mapping[str, Any]) -> str:
    """Return the name of a task's image: of the field "image", else of the first that names an image file."""
    texts = {key: _name_of(value) for key, value in data.items() if isinstance(value, str) and value.strip()}
    images = [name for name in texts.values() if PurePosixPath(name).suffix.lower() in SUFFIXES]
    return texts["image"] if texts.get("image") else (images[0] if images else next(iter(texts.values()), ""))


def _regions(task: Mapping[str, Any], label: str, skipped: list[str]) -> list[dict[str, Any]]:
    """Return the labelled regions of a task: kind, part, value, and the image's height and width."""
    answers = dicts(task.get("annotations"))
    finished = [answer for answer in answers if not answer.get("was_cancelled") and answer.get("result")]
    guesses = dicts(task.get("predictions"))
    answer = finished[-1] if finished else (guesses[-1] if guesses and not answers else {})
    results = dicts(answer.get("result"))
    parts = {str(item.get("id")): _part_of(item) for item in results if _part_of(item)}
    regions = []
    for item in results:
        value = item.get("value")
        kind = next((kind for kind, key in REGIONS.items() if isinstance(value, dict) and key <= value.keys()), None)
        part = _part_of(item) or parts.get(str(item.get("id")))
        if kind is None or part is None:
            continue  # keypoints, choices, texts, relations
        try:
            sides = {side: side_of(item.get(f"original_{side}")) for side in ("height", "width")}
        except ValueError as error:
            skipped.append(f"{label}, region {item.get('id')}: {error}")
            continue
        regions.append({"kind": kind, "part": part, "value": value, "id": item.get("id"), **sides})
    return regions


# Kinds of regions by the keys of their values, the most special first.
REGIONS: dict[str, set[str]] = {
    "brush": {"rle"},
    "polygon": {"points"},
    "ellipse": {"x", "y", "radiusX", "radiusY"},
    "rectangle": {"x", "y", "width", "height"},
}
OTHERS = ("keypointlabels", "choices", "text")


def _part_of(item: Mapping[str, Any]) -> str | None:
    value = item.get("value")
    if not isinstance(value, dict) or any(key in value for key in OTHERS):
        return None
    labels = next((one for key, one in value.items() if key.endswith("labels") and isinstance(one, list) and one), None)
    return part_name(labels[0]) if labels else None


def _region_mask(region: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Decode a region, whose numbers are percentages of the image's sides, to a mask bool [H, W]."""
    value, scale = region["value"], np.array([width, height]) / 100

    def sides(first: str, second: str) -> np.ndarray:
        return np.array([float(value[first]), float(value[second])]) * scale

    angle = float(value.get("rotation") or 0)
    match region["kind"]:
        case "brush":
            return mask_of_brush(value["rle"], height, width)
        case "polygon":
            outline = points_of([number for point in value["points"] for number in point[:2]]) * scale
        case "ellipse":
            outline = ellipse(sides("x", "y"), sides("radiusX", "radiusY"), angle)
        case _:
            outline = rectangle(sides("x", "y"), sides("width", "height"), angle)
    if len(outline) < 3:
        raise ValueError("its outline has fewer than three points")
    return fill_polygons([outline], height, width)


def brush_rle(mask: np.ndarray) -> list[int]:
    """Encode a mask bool [H, W] as Label Studio's brush label: thi.ng's rle-pack of the RGBA values 0 or 255.

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
    """Decode a Label Studio brush label to a mask bool [H, W]; its own editor writes the same code.

    Raises:
        ValueError: it is of another size, or cut.
    """
    if not isinstance(code, list):
        raise ValueError("the brush's code is not a list of bytes")
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


def _name_of(address: str) -> str:
    """Return the file that a task's address names: local storage, an upload, or a path."""
    if re.match(r"^[a-zA-Z]:\\", address) or address.startswith("\\\\"):
        return plain_name(address)
    try:
        parsed = urlparse(address)
    except ValueError:
        return plain_name(address)
    local = parse_qs(parsed.query).get("d")
    return plain_name(local[0] if local else unquote(parsed.path))
