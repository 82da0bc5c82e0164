"""Read labelled images of annotation tools: COCO, Label Studio, or a folder of label maps.

One bad annotation does not lose the good ones: what is skipped is named in :attr:`AnnotatedSet.skipped`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import torch
from PIL import Image

from ..errors import SlimeError
from ..examples import BACKGROUND, IGNORE, SEPARATORS, Example, check_names
from .pixels import SUFFIXES, decode, upright_labels
from .shapes import ellipse, fill_polygons, mask_of_brush, mask_of_coco, mask_of_runs, rectangle

NAMES = "names.txt"
LABEL_MAPS = (".npy", ".png")
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class AnnotatedImage(NamedTuple):
    """An image of a set, with callables for its pixels uint8 [H, W, 3] and its label map uint8 [H, W]."""

    name: str
    pixels: Callable[[], np.ndarray]
    labels: Callable[[], np.ndarray]

    def example(self, names: Sequence[str]) -> Example:
        """Return the training example; raise SlimeError as :meth:`slime.Example.from_label_map` does."""
        image = torch.from_numpy(self.pixels()).float() / 255
        try:
            return Example.from_label_map(image, torch.from_numpy(self.labels().astype(np.int64)), names)
        except SlimeError as error:
            raise SlimeError(f"{self.name}: {error}") from error


class AnnotatedSet(NamedTuple):
    """A data set.

    Attributes:
        names: part names, label 1 first.
        images: in a fixed order.
        skipped: a line per annotation or image that cannot be used. Reading label maps may add lines.
    """

    names: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    skipped: list[str]


def read_annotations(source: str, names: Sequence[str] = (), required: bool = True) -> AnnotatedSet:
    """Read a COCO or Label Studio ``.json``, or a folder of images with label maps of the same stem and ``names.txt``.

    Label maps are ``.npy`` or indexed ``.png`` files beside the image, or in a folder ``labels``. The images of a JSON
    file lie beside it or in ``images``, under their names there or their last components.

    Args:
        source: path of the file or folder.
        names: names of the wanted parts, in this order; empty for all.
        required: whether each of them must occur.

    Raises:
        SlimeError: nothing usable, an unknown form, or an unknown name.
    """
    path = Path(source)
    if path.is_dir():
        annotated = _folder(path, names)
    elif path.suffix.lower() == ".json" and path.is_file():
        annotated = _json_file(path, names)
    else:
        raise SlimeError(f"{source} is neither a folder nor a .json file of COCO or Label Studio.")
    unknown = [name for name in names if name not in annotated.names]
    if unknown and required:
        raise SlimeError(f"There is no part {', '.join(unknown)} in {path.name}; it has: {_listed(annotated.names)}.")
    if not annotated.images:
        raise SlimeError(f"There is no labelled image in {source}. {said_of(annotated.skipped)}".strip())
    return _with_names(annotated, tuple(names)) if names else annotated


def read_examples(annotated: AnnotatedSet, most: int = 0) -> list[Example]:
    """Return the first ``most`` images as examples, 0 for all; images that cannot be used are added to ``skipped``.

    Raises:
        SlimeError: no image can be used; the first reason.
    """
    examples: list[Example] = []
    first: SlimeError | None = None
    for image in annotated.images:
        try:
            examples.append(image.example(annotated.names))
        except SlimeError as error:
            first = first or error
            annotated.skipped.append(str(error))
        if len(examples) == most:
            break
    if not examples and first is not None:
        raise first
    return examples


def said_of(skipped: Sequence[str], most: int = 3) -> str:
    """Return one sentence about skipped annotations, which names the first ones; an empty text for none."""
    if not skipped:
        return ""
    more = f" (and {len(skipped) - most} more)" if len(skipped) > most else ""
    return f"Skipped {len(skipped)}: {'; '.join(skipped[:most])}{more}."


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _with_names(annotated: AnnotatedSet, names: tuple[str, ...]) -> AnnotatedSet:
    """Return the set with the labels numbered as these names are."""
    table = np.zeros(256, np.uint8)
    for label, name in enumerate(annotated.names, start=1):
        table[label] = names.index(name) + 1 if name in names else 0
    table[IGNORE] = IGNORE

    def renumbered(image: AnnotatedImage) -> AnnotatedImage:
        return image._replace(labels=lambda: table[image.labels()])

    return annotated._replace(names=check_names(names), images=tuple(map(renumbered, annotated.images)))


def _text(file: Path) -> str:
    data = file.read_bytes()
    if data.startswith(UTF16):
        raise SlimeError(f"{file.name} is saved as UTF-16. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlimeError(f"{file.name} is not saved as UTF-8 ({error.reason}). Save it as UTF-8.") from error


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(folder: Path, wanted: Sequence[str]) -> AnnotatedSet:
    listed = [place / NAMES for place in (folder, folder / "labels") if (place / NAMES).is_file()]
    if not listed:
        raise SlimeError(f"{folder} has no {NAMES}. Write the part names into it, one per line in the order of labels.")
    lines = [_part_name(line) for line in _text(listed[0]).splitlines() if line.strip()]
    names = check_names(lines) if not wanted else tuple(lines)
    if len(names) >= IGNORE:
        raise SlimeError(f"{NAMES} has {len(names)} names; label maps of 8 bits hold at most {IGNORE - 1}.")
    images, files = [], _Files()
    for file in _files(folder):
        labels = _label_file(file, files) if file.suffix.lower() in SUFFIXES else None
        if labels is not None:
            images.append(AnnotatedImage(file.name, _decoder(file), _label_reader(labels, file)))
    return AnnotatedSet(names, tuple(images), [])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def _label_file(image: Path, files: _Files) -> Path | None:
    """Return the path of an image's label map; None for a file that is itself a label map, or has none."""
    places = [place / f"{image.stem}{end}" for place in (image.parent / "labels", image.parent) for end in LABEL_MAPS]
    return next((file for file in map(files.find, places) if file not in (None, image)), None)


class _Files:
    """Finds files whose names may differ in upper and lower case; every folder is listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, place: Path) -> Path | None:
        """Return the file of this name, else one of the same letters, else None."""
        if place.is_file():
            return place
        if place.parent not in self._listed:
            self._listed[place.parent] = {file.name.lower(): file for file in _files(place.parent)}
        return self._listed[place.parent].get(place.name.lower())


def _label_reader(file: Path, image: Path) -> Callable[[], np.ndarray]:
    return lambda: upright_labels(_read_labels(file), image)


def _read_labels(file: Path) -> np.ndarray:
    try:
        if file.suffix.lower() == ".npy":
            labels = np.load(file, allow_pickle=False)
        else:
            with Image.open(file) as image:
                if image.mode not in ("1", "P", "L") and not image.mode.startswith("I"):
                    raise SlimeError(
                        f"{file.name} is in colours; a label map is an indexed or grey image of label numbers."
                    )
                labels = np.asarray(image)
    except SlimeError:
        raise
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise SlimeError(f"{file.name} cannot be read as a label map: {error}") from error
    if labels.ndim != 2 or labels.size == 0 or labels.dtype.kind not in "biu" or labels.min() < 0 or labels.max() > 255:
        raise SlimeError(f"{file.name} is no label map [H, W] of whole numbers from 0 to 255.")
    if set(np.unique(labels).tolist()) == {0, IGNORE}:
        raise SlimeError(
            f"{file.name} has the values 0 and 255 only, and 255 means pixels to ignore. Write the number of the part "
            f"in {NAMES} instead: 1 for the first name."
        )
    return labels.astype(np.uint8)


def _decoder(file: Path, name: str = "") -> Callable[[], np.ndarray]:
    def pixels() -> np.ndarray:
        try:
            return decode(file.read_bytes())
        except OSError as error:
            raise SlimeError(f"The image {name or file.name} cannot be opened: {error.strerror}.") from error
        except SlimeError as error:
            raise SlimeError(f"{name or file.name}: {error}") from error

    return pixels


# ---------------------------------------------------------------------------------------------------------- JSON files


def _json_file(path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    try:
        body = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SlimeError(f"{path.name} is cut off or not JSON ({error}). Export it again.") from error
    if isinstance(body, dict):
        return _coco(body, path, wanted)
    if isinstance(body, list):
        return _label_studio(body, path, wanted)
    raise SlimeError(f"{path.name} is neither a COCO file nor a JSON export of Label Studio.")


def _part_names(used: Sequence[str], wanted: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return the names of the parts to read: the wanted ones that occur, else all but the background."""
    names = [name for name in dict.fromkeys(used) if name and name.lower() != BACKGROUND]
    if wanted or not names:
        return tuple(name for name in names if name in wanted)
    try:
        return check_names(names)
    except SlimeError as error:
        raise SlimeError(f"{path.name}: {error} Or name the parts that you want.") from error


def _part_name(value: Any) -> str:
    """Return a part name that nodes can list: "door, double door" becomes "door / double door"."""
    return SEPARATORS.sub(" / ", re.sub(r"\s+", " ", str(value or "")).replace(", ", ",")).strip(" /")


def _entries(body: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = body.get(key)
    if not isinstance(entries, list):
        raise SlimeError(f"{path.name} is no COCO file of instances: it has no list {key}.")
    return _dicts(entries)


def _id(value: Any) -> str:
    """Return an id as text: some tools write 7 as "7" or 7.0 elsewhere."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _coco(body: Mapping[str, Any], path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    skipped, files = list[str](), _Files()
    categories = {_id(entry.get("id")): _part_name(entry.get("name")) for entry in _entries(body, "categories", path)}
    images = {_id(entry.get("id")): entry for entry in _entries(body, "images", path)}
    of_image: dict[str, list[tuple[str, Any, str]]] = {image: [] for image in images}
    used: set[str] = set()
    for index, entry in enumerate(_entries(body, "annotations", path)):
        label = f"annotation {entry.get('id', f'number {index + 1}')}"
        image, category = _id(entry.get("image_id")), _id(entry.get("category_id"))
        if image not in images:
            skipped.append(f"{label}: the image {image} is not listed")
        elif category not in categories:
            skipped.append(f"{label}: the category {category} is not listed")
        else:
            used.add(category)
            try:
                of_image[image].append((category, _coco_shape(entry.get("segmentation")), label))
            except (ValueError, TypeError) as error:
                skipped.append(f"{label}: {error}")
    names = _part_names([name for number, name in categories.items() if number in used], wanted, path)
    twins = [name for name, count in Counter(categories[number] for number in used).items() if count > 1]
    if set(twins) & set(names):
        raise SlimeError(f"{path.name} has several categories named {', '.join(twins)}. Give them different names.")

    def annotated(key: str) -> AnnotatedImage | None:
        image, shapes = images[key], [item for item in of_image[key] if categories[item[0]] in names]
        if not shapes:
            return None
        name = _plain(str(image.get("file_name", "")))
        try:
            height, width = (_side(image.get(side)) for side in ("height", "width"))
            checked = [item for item in shapes if _fits(item[1], height, width, item[2], skipped)]
        except ValueError as error:
            skipped.append(f"image {name or key}: {error}")
            return None
        file = _find(path.parent, name, files)

        def labels() -> np.ndarray:
            label_map = np.zeros((height, width), np.uint8)
            for category, shape, label in checked:
                try:
                    label_map[_coco_mask(shape, height, width)] = names.index(categories[category]) + 1
                except (ValueError, IndexError, OverflowError) as error:
                    _note(skipped, f"{label}: {error}")
            return upright_labels(label_map, file)

        return AnnotatedImage(name, _decoder(file, name), labels) if checked else None

    found = [annotated(key) for key in images]
    return AnnotatedSet(names, tuple(image for image in found if image is not None), skipped)


def _note(skipped: list[str], line: str) -> None:
    if line not in skipped:
        skipped.append(line)


def _side(value: Any) -> int:
    try:
        side = int(float(value))
    except (TypeError, ValueError, OverflowError):
        side = 0
    if not 0 < side <= 100_000:
        raise ValueError(f"it has no width and height in pixels ({value!r})")
    return side


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
    polygons = [_points(piece) for piece in pieces if isinstance(piece, list) and len(piece) >= 6]
    if not polygons:
        raise ValueError("its outline has fewer than three points")
    return polygons


def _points(flat: Sequence[Any]) -> np.ndarray:
    return np.asarray(flat[: len(flat) // 2 * 2], np.float64).reshape(-1, 2)


def _coco_mask(shape: Any, height: int, width: int) -> np.ndarray:
    """Decode a COCO segmentation to a mask bool [H, W]: run lengths, compressed or not, or polygons."""
    if isinstance(shape, list):
        return fill_polygons(shape, height, width)
    counts = shape["counts"]
    return mask_of_coco(counts, height, width) if isinstance(counts, str) else mask_of_runs(counts, height, width)


def _label_studio(tasks: Sequence[Any], path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read a JSON export of Label Studio: the regions of each task's last annotation that was not cancelled."""
    skipped, files = list[str](), _Files()
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
    names = _part_names([shape["part"] for _, _, shapes in regions for shape in shapes], wanted, path)
    if not names and not wanted:
        said = said_of(skipped) or "Export it as JSON."
        raise SlimeError(f"{path.name} has no brush, polygon, ellipse or rectangle labels. {said}")

    def annotated(name: str, label: str, shapes: list[dict[str, Any]]) -> AnnotatedImage:
        file = _find(path.parent, name, files)

        def labels() -> np.ndarray:
            label_map = np.zeros((shapes[0]["height"], shapes[0]["width"]), np.uint8)
            for shape in shapes:
                try:
                    label_map[_region_mask(shape, *label_map.shape)] = names.index(shape["part"]) + 1
                except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
                    _note(skipped, f"{label}, region {shape['id']}: {error}")
            return upright_labels(label_map, file)

        return AnnotatedImage(name, _decoder(file, name), labels)

    chosen = [(name, label, [s for s in shapes if s["part"] in names]) for name, label, shapes in regions]
    return AnnotatedSet(names, tuple(annotated(*item) for item in chosen if item[2]), skipped)


def _image_of(data: Mapping[str, Any]) -> str:
    """Return the name of a task's image: of the field "image", else of the first that names an image file."""
    texts = {key: _name_of(value) for key, value in data.items() if isinstance(value, str) and value.strip()}
    images = [name for name in texts.values() if PurePosixPath(name).suffix.lower() in SUFFIXES]
    return texts["image"] if texts.get("image") else (images[0] if images else next(iter(texts.values()), ""))


def _regions(task: Mapping[str, Any], label: str, skipped: list[str]) -> list[dict[str, Any]]:
    """Return the labelled regions of a task: kind, part, value, and the image's height and width."""
    answers = _dicts(task.get("annotations"))
    finished = [answer for answer in answers if not answer.get("was_cancelled") and answer.get("result")]
    guesses = _dicts(task.get("predictions"))
    answer = finished[-1] if finished else (guesses[-1] if guesses and not answers else {})
    results = _dicts(answer.get("result"))
    parts = {str(item.get("id")): _part_of(item) for item in results if _part_of(item)}
    regions = []
    for item in results:
        value = item.get("value")
        kind = next((kind for kind, key in REGIONS.items() if isinstance(value, dict) and key <= value.keys()), None)
        part = _part_of(item) or parts.get(str(item.get("id")))
        if kind is None or part is None:
            continue  # keypoints, choices, texts, relations
        try:
            sides = {side: _side(item.get(f"original_{side}")) for side in ("height", "width")}
        except ValueError as error:
            skipped.append(f"{label}, region {item.get('id')}: {error}")
            continue
        regions.append({"kind": kind, "part": part, "value": value, "id": item.get("id"), **sides})
    return regions


def _dicts(entries: Any) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


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
    return _part_name(labels[0]) if labels else None


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
            outline = _points([number for point in value["points"] for number in point[:2]]) * scale
        case "ellipse":
            outline = ellipse(sides("x", "y"), sides("radiusX", "radiusY"), angle)
        case _:
            outline = rectangle(sides("x", "y"), sides("width", "height"), angle)
    if len(outline) < 3:
        raise ValueError("its outline has fewer than three points")
    return fill_polygons([outline], height, width)


# --------------------------------------------------------------------------------------------------------------- names


def _name_of(address: str) -> str:
    """Return the file that a task's address names: local storage, an upload, or a path."""
    if re.match(r"^[a-zA-Z]:\\", address) or address.startswith("\\\\"):
        return _plain(address)
    parsed = urlparse(address)
    local = parse_qs(parsed.query).get("d")
    return _plain(unquote(local[0] if local else parsed.path))


def _plain(name: str) -> str:
    """Return a relative path with slashes, without drive, ".." and query."""
    parts = [part for part in re.split(r"[\\/]+", name.strip()) if part not in ("", ".", "..") and ":" not in part]
    return "/".join(parts)


def _find(folder: Path, name: str, files: _Files) -> Path:
    """Return the path of a named file below a folder or its ``images``, by its whole name or its last component."""
    spellings = dict.fromkeys([name, unquote(name), name.partition("?")[0]])
    places = [base / spelling for spelling in spellings for base in (folder, folder / "images") if spelling]
    lasts = dict.fromkeys(PurePosixPath(spelling).name for spelling in spellings if spelling)
    # Label Studio puts a random prefix before the names of uploads.
    lasts |= dict.fromkeys(last.partition("-")[2] for last in lasts if "-" in last)
    places += [base / last for last in lasts for base in (folder, folder / "images") if last]
    return next((file for file in map(files.find, places) if file is not None), folder / (name or "?"))
