"""Label Studio: its JSON export is read, tasks with predictions are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from ...errors import SlimeError
from ...files import write_whole
from ..pixels import SUFFIXES, upright_labels
from ..records import Record
from ..run_log import RunLog
from ..shapes import ellipse, fill_polygons, mask_of_coco, rectangle
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


class _Task(NamedTuple):
    """Regions of one image of a task."""

    image: str
    label: str
    regions: list[dict[str, Any]]


def read(tasks: Sequence[Any], path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read a JSON export: the regions of each task's last annotation that has some and was not cancelled."""
    skipped = list[str]()
    found: list[_Task] = []
    with_data = 0
    for index, task in enumerate(tasks):
        label = f"task {task.get('id', index + 1)}" if isinstance(task, dict) else f"task {index + 1}"
        data = task.get("data") if isinstance(task, dict) else None
        if isinstance(data, dict):
            with_data += 1
            found += _images_of(data, label, _regions(task, label, skipped), skipped)
        else:
            skipped.append(f"{label}: it has no data")
    if not with_data:
        raise SlimeError(f"{path.name} is no JSON export of Label Studio (its tasks have no data). Export it as JSON.")
    names = part_names([region["part"] for task in found for region in task.regions], wanted, path.name)
    if not names and not wanted:
        said = said_of(skipped) or "Export it as JSON."
        raise SlimeError(f"{path.name} has no brush, polygon, ellipse or rectangle labels. {said}")
    files, folders = Files(task.image for task in found), (path.parent, path.parent / "images")

    def annotated(task: _Task) -> AnnotatedImage | None:
        regions = [region for region in task.regions if region["part"] in names]
        if not regions:
            return None
        file = files.image(folders, task.image)
        size = Counter(region["size"] for region in regions).most_common(1)[0][0]

        def labels() -> np.ndarray:
            masks = [(region["part"], partial(_region_mask, region, *size), f"{task.label}, region {region['id']}")
                     for region in regions]  # fmt: skip
            return upright_labels(draw(masks, names, size, task.image, skipped), file)

        return AnnotatedImage(task.image, decoder(file, task.image), labels)

    images = [annotated(task) for task in found]
    return AnnotatedSet(names, tuple(image for image in images if image is not None), skipped)


def _images_of(
    data: Mapping[str, Any], label: str, regions: list[dict[str, Any]], skipped: list[str]
) -> Iterator[_Task]:
    """Yield the images of a task with their regions: the field "image", else the first that names an image file.

    Where regions belong to several images, fields are told apart by the names of the image tags.
    """
    texts = {key: _name_of(value) for key, value in data.items() if isinstance(value, str) and value.strip()}
    images = {key: name for key, name in texts.items() if PurePosixPath(name).suffix.lower() in SUFFIXES}
    tags = dict.fromkeys(region["tag"] for region in regions)
    if len(tags) > 1 and len(images) > 1:
        for tag in tags:
            mine = [region for region in regions if region["tag"] == tag]
            if tag in images:
                yield _Task(images[tag], label, mine)
            else:
                skipped.append(f"{label}: {len(mine)} regions of the image tag {tag}, which no field is named like")
        return
    name = texts.get("image") or next(iter(images.values()), "") or next(iter(texts.values()), "")
    if regions and not name:
        skipped.append(f"{label}: no field of its data is an image")
    elif regions:
        yield _Task(name, label, regions)


def _regions(task: Mapping[str, Any], label: str, skipped: list[str]) -> list[dict[str, Any]]:
    """Return the labelled regions of a task: kind, part, value, tag, and the image's size."""
    answers = dicts(task.get("annotations"))
    finished = [answer for answer in answers if not answer.get("was_cancelled") and answer.get("result")]
    guesses = dicts(task.get("predictions"))[-1:] if not answers else []
    for answer in [*reversed(finished), *guesses]:
        lines = list[str]()
        regions = _regions_of(dicts(answer.get("result")), label, lines)
        if regions or lines:
            skipped.extend(lines)
            return regions
    return []


def _regions_of(results: list[dict[str, Any]], label: str, skipped: list[str]) -> list[dict[str, Any]]:
    parts = {str(item.get("id")): _part_of(item) for item in results if _part_of(item)}
    regions = []
    for item in results:
        value, where = item.get("value"), f"{label}, region {item.get('id')}"
        if not isinstance(value, dict) or any(key in value for key in OTHERS):
            continue  # keypoints, choices, texts, relations
        kind = next((kind for kind, key in REGIONS.items() if key <= value.keys()), None)
        part = _part_of(item) or parts.get(str(item.get("id")))
        try:
            if kind is None and not ("bitmasklabels" in value or "imageDataURL" in value):
                continue
            if kind is None:
                raise ValueError("a bitmask, which is not read; use brush labels")
            if part is None:
                raise ValueError("it has no label")
            if item.get("item_index"):
                raise ValueError("it is on a further image of a list, which is not read")
            size = (side_of(item.get("original_height")), side_of(item.get("original_width")))
            if any(
                isinstance(names, list) and len(names) > 1 for key, names in value.items() if key.endswith("labels")
            ):
                skipped.append(f"{where}: it has several labels, of which the first is taken")
        except ValueError as error:
            skipped.append(f"{where}: {error}")
            continue
        tag = str(item.get("to_name") or "image")
        regions.append({"kind": kind, "part": part, "value": value, "id": item.get("id"), "tag": tag, "size": size})
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
        ValueError: it is of another size, cut, or no bytes.
        TypeError, OverflowError: likewise.
    """
    if not isinstance(code, list):
        raise ValueError("the brush's code is not a list of bytes")
    flat = np.unpackbits(np.array(code, np.uint8))
    bits, place = (flat + ord("0")).tobytes().decode(), 0

    def read(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError("the brush's code is cut")
        place += count
        return int(bits[place - count : place], 2)

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
            end = min(end, total)
            if word != BYTE or place + (end - done) * word > len(bits):
                raise ValueError("the brush's code is cut, or not of bytes")
            values[done:end] = np.packbits(flat[place : place + (end - done) * word])
            place += (end - done) * word
        done = end
    return values.reshape(height, width, 4)[..., 3] > 0


def _bits(value: int, count: int) -> str:
    return format(value, f"0{count}b")


def _name_of(address: str) -> str:
    """Return the file that a task's address names: local storage, an upload, or a path."""
    _, local, name = address.partition("?d=")
    if local:
        return plain_name(unquote(name))
    if re.match(r"(https?|s3|gs|azure-blob)://", address):
        return plain_name(unquote(re.split(r"[?#]", address, maxsplit=1)[0].split("//", 1)[1].partition("/")[2]))
    return plain_name(address)
