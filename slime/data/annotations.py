"""Read labelled images of annotation tools.

One bad annotation does not lose the good ones: what is skipped is named in :attr:`AnnotatedSet.skipped`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import SlimeError
from ..examples import IGNORE, Example, check_names
from .formats import FOLDERS, AnnotatedSet, coco, label_studio, yolo
from .formats.base import renumbered, said_of, text_of

KNOWN = "a .json file of COCO or Label Studio, a data.yaml of YOLO, or a folder"
# What other tools write that cannot be read, by the end of the name.
EXPORT_AGAIN = {
    ".xml": "XML of CVAT or Pascal VOC. Export it as COCO, or give the folder with SegmentationClass",
    ".csv": "a table. Export it as COCO or JSON",
    ".zip": "an archive. Unpack it, and give the file or folder inside",
    ".txt": "text. Give the folder of the data set, or its data.yaml",
    ".jsonl": "JSON lines. Export it as COCO or JSON",
    ".tsv": "a table. Export it as COCO or JSON",
}


def read_annotations(source: str, names: Sequence[str] = (), required: bool = True) -> AnnotatedSet:
    """Read a COCO or Label Studio ``.json``, a ``data.yaml`` of YOLO, or a folder.

    A folder holds label maps or masks with ``names.txt``, YOLO's labels, Pascal VOC's or Roboflow's masks, or one of
    these JSON files. The images of a JSON file lie beside it or in ``images``, under their names there or their last
    components.

    Args:
        source: path of the file or folder.
        names: names of the wanted parts, in this order; empty for all.
        required: whether each of them must occur.

    Raises:
        SlimeError: nothing usable, an unknown form, or an unknown name.
    """
    path = Path(source)
    annotated = _read(path, names)
    unknown = [name for name in names if name not in annotated.names]
    if unknown and required:
        raise SlimeError(f"There is no part {', '.join(unknown)} in {path.name}; it has: {_listed(annotated.names)}.")
    if not annotated.images:
        raise SlimeError(f"There is no labelled image in {source}. {said_of(annotated.skipped)}".strip())
    if not names:
        return annotated
    table = {label: names.index(name) + 1 for label, name in enumerate(annotated.names, start=1) if name in names}
    return renumbered(annotated, check_names(names), table | {IGNORE: IGNORE})


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
        if most and len(examples) == most:
            break
    if not examples and first is not None:
        raise first
    return examples


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read(path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    try:
        if path.is_dir():
            return _folder(path, wanted)
        suffix = path.suffix.lower()
        if not path.is_file():
            raise SlimeError(f"There is nothing at {path}. Give {KNOWN}.")
        if suffix in (".yaml", ".yml"):
            return yolo.read(path, wanted)
        if suffix == ".json":
            return _json_file(path, wanted)
        what = EXPORT_AGAIN.get(suffix, f"not a known form. Give {KNOWN}")
        raise SlimeError(f"{path.name} is {what}.")
    except OSError as error:
        raise SlimeError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


def _folder(folder: Path, wanted: Sequence[str]) -> AnnotatedSet:
    for form in FOLDERS:
        if form.claims(folder):
            return form.read(folder, wanted)
    files = sorted(file for file in folder.glob("*.json")) or sorted(folder.glob("annotations/*.json"))
    if len(files) == 1:
        return _json_file(files[0], wanted)
    inner = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.json"))
    if inner:
        shown = ", ".join(inner[:5]) + (" ..." if len(inner) > 5 else "")
        raise SlimeError(f"{folder} has several .json files, or has them in its folders: {shown}. Give one of them.")
    raise SlimeError(
        f"{folder} has no names.txt, data.yaml, SegmentationClass or .json file. For label maps, write names.txt: one "
        "part name per line, in the order of the labels."
    )


def _json_file(path: Path, wanted: Sequence[str]) -> AnnotatedSet:
    try:
        body = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise SlimeError(f"{path.name} is cut off or not JSON ({error}). Export it again.") from error
    if isinstance(body, dict) and "shapes" in body and "imagePath" in body:
        raise SlimeError(f"{path.name} is a file of LabelMe or X-AnyLabeling. Export the data set as COCO instances.")
    if isinstance(body, dict):
        return coco.read(body, path, wanted)
    if isinstance(body, list):
        return label_studio.read(body, path, wanted)
    raise SlimeError(f"{path.name} is neither a COCO file nor a JSON export of Label Studio.")
