"""Read labelled images of annotation tools: COCO, Label Studio, or a folder of label maps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..errors import SlimeError
from ..examples import Example, check_names
from .pixels import SUFFIXES, decode
from .shapes import mask_of_brush, mask_of_coco

NAMES = "names.txt"


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
    """Part names, label 1 first, and images in a fixed order."""

    names: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]


def read_annotations(source: str, names: Sequence[str] = (), required: bool = True) -> AnnotatedSet:
    """Read a COCO or Label Studio ``.json``, or a folder of images with label maps of the same stem and ``names.txt``.

    Label maps are ``.npy`` or indexed ``.png`` files beside the image, or in a folder ``labels``. Images of JSON files
    are looked for beside the file and in ``images``.

    Args:
        names: of the parts wanted, in this order; empty for all there are.
        required: whether each of them must be there.

    Raises:
        SlimeError: nothing there, an unknown form, an unknown name.
    """
    path = Path(source)
    if path.is_dir():
        found = _folder(path)
    elif path.suffix.lower() == ".json" and path.is_file():
        body = json.loads(path.read_text(encoding="utf-8"))
        found = _coco(body, path.parent) if isinstance(body, dict) else _label_studio(body, path.parent)
    else:
        raise SlimeError(f"{source} is neither a folder nor a .json file of COCO or Label Studio.")
    if not found.images:
        raise SlimeError(f"There is no labelled image in {source}.")
    return _of_names(found, tuple(names), required) if names else found


def _of_names(found: AnnotatedSet, names: tuple[str, ...], required: bool) -> AnnotatedSet:
    unknown = [name for name in names if name not in found.names]
    if unknown and required:
        raise SlimeError(f"There is no part {', '.join(unknown)}; there are: {', '.join(found.names)}.")
    table = np.zeros(256, np.uint8)
    for label, name in enumerate(found.names, start=1):
        table[label] = names.index(name) + 1 if name in names else 0
    table[255] = 255

    def renamed(one: AnnotatedImage) -> AnnotatedImage:
        return one._replace(labels=lambda: table[one.labels()])

    return AnnotatedSet(check_names(names), tuple(map(renamed, found.images)))


def _folder(folder: Path) -> AnnotatedSet:
    listed = [place / NAMES for place in (folder, folder / "labels") if (place / NAMES).is_file()]
    if not listed:
        raise SlimeError(f"{folder} has no {NAMES}, which names the parts, one a line in the order of the labels.")
    names = check_names([line for line in listed[0].read_text(encoding="utf-8").splitlines() if line.strip()])
    images = []
    for file in sorted(folder.iterdir()):
        labels = _labels_beside(file) if file.suffix.lower() in SUFFIXES else None
        if labels is not None:
            images.append(AnnotatedImage(file.name, _decoder(file), lambda labels=labels: _read_labels(labels)))  # type: ignore[misc]
    return AnnotatedSet(names, tuple(images))


def _labels_beside(image: Path) -> Path | None:
    """Return the path of an image's label map; None for a file that is itself a label map."""
    if image.suffix.lower() == ".png":
        others = [image.with_suffix(suffix) for suffix in SUFFIXES - {".png"}]
        if any(other.is_file() for other in others) and _is_indexed(image):
            return None
    places = [image.with_suffix(".npy"), image.parent / "labels" / f"{image.stem}.npy"]
    places += [image.with_suffix(".png"), image.parent / "labels" / f"{image.stem}.png"]
    return next((place for place in places if place.is_file() and place != image), None)


def _is_indexed(file: Path) -> bool:
    with Image.open(file) as image:
        return image.mode in ("P", "L")


def _read_labels(file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        labels = np.load(file, allow_pickle=False)
    else:
        with Image.open(file) as image:
            if image.mode not in ("P", "L"):
                raise SlimeError(
                    f"{file.name} is in colours; a label map is an indexed or grey image of label numbers."
                )
            labels = np.asarray(image)
    if labels.ndim != 2 or labels.min() < 0 or labels.max() > 255:
        raise SlimeError(f"{file.name} is no label map [H, W] of numbers 0 to 255.")
    return labels.astype(np.uint8)


def _decoder(file: Path) -> Callable[[], np.ndarray]:
    return lambda: decode(file.read_bytes())


def _coco(body: Mapping[str, Any], folder: Path) -> AnnotatedSet:
    try:
        kinds = {kind["id"]: str(kind["name"]) for kind in sorted(body["categories"], key=lambda kind: kind["id"])}
        of_image: dict[int, list[Any]] = {image["id"]: [] for image in body["images"]}
        for annotation in body["annotations"]:
            of_image[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError) as error:
        raise SlimeError(f"This is no COCO file of instances: {error!r} is missing.") from error
    used = {annotation["category_id"] for found in of_image.values() for annotation in found}
    names = check_names([name for number, name in kinds.items() if number in used])
    label = {number: names.index(name) + 1 for number, name in kinds.items() if number in used}

    def annotated(image: Mapping[str, Any]) -> AnnotatedImage:
        file, shape = _find(folder, image["file_name"]), (int(image["height"]), int(image["width"]))

        def labels() -> np.ndarray:
            found = np.zeros(shape, np.uint8)
            for annotation in of_image[image["id"]]:
                found[_coco_mask(annotation["segmentation"], *shape)] = label[annotation["category_id"]]
            return found

        return AnnotatedImage(image["file_name"], _decoder(file), labels)

    return AnnotatedSet(names, tuple(annotated(image) for image in body["images"] if of_image[image["id"]]))


def _coco_mask(shape: Any, height: int, width: int) -> np.ndarray:
    """Decode a COCO segmentation to a mask bool [H, W]: run lengths, compressed or not, or polygons."""
    if isinstance(shape, list):
        return _filled(shape, height, width)
    counts = shape["counts"]
    if isinstance(counts, str | bytes):
        return mask_of_coco(counts if isinstance(counts, str) else counts.decode(), height, width)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _filled(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise SlimeError("Polygons of a COCO file need pycocotools: pip install pycocotools") from error
    return np.asarray(mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))), bool)


def _label_studio(tasks: Sequence[Mapping[str, Any]], folder: Path) -> AnnotatedSet:
    """Read a JSON export of Label Studio: brushes, polygons and rectangles of each task's last annotation."""
    results = []
    for task in tasks:
        annotations = task.get("annotations") or task.get("predictions") or []
        shapes = [one for one in (annotations[-1]["result"] if annotations else []) if _label_of(one) is not None]
        if shapes:
            results.append((task, shapes))
    names = list(dict.fromkeys(str(_label_of(shape)) for _, shapes in results for shape in shapes))
    if not names:
        raise SlimeError("This Label Studio file has no brush, polygon or rectangle labels; export it as JSON.")

    def annotated(task: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]]) -> AnnotatedImage:
        address = next(value for value in task["data"].values() if isinstance(value, str))
        name = _name_of(address)

        def labels() -> np.ndarray:
            found = np.zeros((shapes[0]["original_height"], shapes[0]["original_width"]), np.uint8)
            for shape in shapes:
                found[_label_studio_mask(shape)] = names.index(str(_label_of(shape))) + 1
            return found

        return AnnotatedImage(name, _decoder(_find(folder, name)), labels)

    return AnnotatedSet(check_names(names), tuple(annotated(*pair) for pair in results))


def _label_of(result: Mapping[str, Any]) -> Any:
    value = result.get("value", {})
    kinds = ("brushlabels", "polygonlabels", "rectanglelabels")
    return next((value[kind][0] for kind in kinds if value.get(kind)), None)


def _label_studio_mask(result: Mapping[str, Any]) -> np.ndarray:
    height, width, value = result["original_height"], result["original_width"], result["value"]
    if "rle" in value:
        return mask_of_brush(value["rle"], height, width)
    canvas = Image.new("1", (width, height))
    if "points" in value:
        points = value["points"]
    else:
        x, y, w, h = (value[side] for side in ("x", "y", "width", "height"))
        points = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    scaled = [(px * width / 100, py * height / 100) for px, py in points]
    ImageDraw.Draw(canvas).polygon(scaled, fill=1)
    return np.asarray(canvas, bool)


def _name_of(address: str) -> str:
    """Return the file that a task's address names: local storage, an upload, or a path."""
    parsed = urlparse(address)
    local = parse_qs(parsed.query).get("d")
    return unquote(local[0] if local else parsed.path).lstrip("/")


def _find(folder: Path, name: str) -> Path:
    """Return the path of a named file below a folder or its ``images``, by its whole name or its last component."""
    last = Path(name).name
    places = [folder / name, folder / "images" / name, folder / last, folder / "images" / last]
    # Label Studio puts a random prefix before the names of uploads.
    places += [place / last.partition("-")[2] for place in (folder, folder / "images") if "-" in last]
    return next((place for place in places if place.is_file()), places[0])
