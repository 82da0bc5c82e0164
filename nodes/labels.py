"""SLiMe Export Labels and SLiMe Load Annotations: data sets of other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..slime.data.annotations import read_annotations, read_examples
from ..slime.data.file_names import (
    TABLE,
    FileNames,
    changed_names,
    leads_outside,
    plain_stem,
    read_table,
    safe_path,
    write_table,
)
from ..slime.data.formats import FORMATS
from ..slime.data.formats.base import said_of
from ..slime.data.records import Record, record_of
from ..slime.data.run_log import RunLog
from ..slime.errors import SlimeError
from ..slime.examples import Example, merge_examples
from ..slime.files import png, write_whole
from ..slime.images import as_rgb
from .common import (
    FILES,
    ExamplesSocket,
    Parts,
    PartsSocket,
    as_bytes,
    named_errors,
    pixel_digest,
    schema,
    show_text,
    split_names,
)
from .example import examples_result, previous_input


def _stamp(source: Path) -> str:
    """Return a text that changes with the files of a data set."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    return str([(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()])


class _Sources:
    """Data sets that were read, and how often one of them was found changed."""

    def __init__(self) -> None:
        self._stamps: dict[Path, str] = {}
        self._changes = 0

    def add(self, source: Path) -> None:
        self._stamps[source] = _stamp(source)

    def changes(self) -> int:
        for source, stamp in self._stamps.items():
            if _stamp(source) != stamp:
                self.add(source)
                self._changes += 1
        return self._changes


_READ = _Sources()
CHOICES = [name for name in FORMATS if name != "parquet"]  # which is for data sets of many files


class SLiMeExportLabels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeExportLabels",
            category=FILES,
            display_name="SLiMe Export Labels",
            description="Saves images and their parts as a data set in the output folder, for other tools. Runs add "
            "to it.",
            search_aliases="coco, yolo, label studio, save dataset, export annotations",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.Combo.Input(
                    "format",
                    options=CHOICES,
                    default="coco",
                    tooltip="coco: run lengths in one JSON file. label-map: indexed images. masks: one image per part. "
                    "label-studio: tasks with predictions. coco-polygons and yolo fill holes, and need contourpy "
                    "installed.",
                ),
                io.String.Input(
                    "folder", default="labels", tooltip="Folder in ComfyUI's output folder. Runs add to it."
                ),
                io.String.Input(
                    "file_names",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One file name per line, one line per image. Empty: names derived from the pixels. Images "
                    "that are already in the data set are skipped and keep their old labels.",
                ),
            ],
            outputs=[io.String.Output(display_name="folder", tooltip="Path of the data set.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, parts: Parts, format: str, folder: str, file_names: str = "") -> io.NodeOutput:
        with named_errors("SLiMe Export Labels"):
            target = _output_folder(folder)
            try:
                text = _export(target, parts, format, _file_names(file_names, parts.images))
            except OSError as error:
                raise SlimeError(
                    f"{error.filename or target} cannot be written ({error.strerror}). Free disk space, or make "
                    "ComfyUI's output folder writable."
                ) from error
        return io.NodeOutput(str(target), ui=ui.PreviewText(text))


class SLiMeLoadAnnotations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeLoadAnnotations",
            category=FILES,
            display_name="SLiMe Load Annotations",
            description="Loads labelled images of COCO, Label Studio, YOLO, Pascal VOC or a folder of label maps "
            "or masks, as examples.",
            search_aliases="coco, label studio, yolo, cvat, roboflow, load dataset, annotations",
            inputs=[
                io.String.Input(
                    "path",
                    default="labels/annotations.json",
                    tooltip="A .json file of COCO or Label Studio, a data.yaml of YOLO, or the folder of a data set, "
                    "in ComfyUI's input or output folder.",
                ),
                io.String.Input(
                    "parts", default="", tooltip="Names of the parts to load, separated by commas. Empty = all parts."
                ),
                io.Int.Input(
                    "max_images",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="Maximum number of labelled images to load; the first ones of the data set are taken.",
                ),
                previous_input(),
            ],
            outputs=[
                ExamplesSocket.Output(display_name="examples", tooltip="For SLiMe Train or the next SLiMe Example."),
                io.Image.Output(display_name="preview", tooltip="The last image with its parts tinted."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, path: str | None = None, **_: object) -> object:
        if path is None:  # it comes by a link and is not known here
            return _READ.changes()
        try:
            return _stamp(_existing(path))
        except SlimeError:  # execute reports it
            return path

    @classmethod
    def execute(
        cls, path: str, parts: str, max_images: int, previous: Sequence[Example] | None = None
    ) -> io.NodeOutput:
        with named_errors("SLiMe Load Annotations"):
            source = _existing(path)
            _READ.add(source)
            annotated = read_annotations(str(source), split_names(parts) if parts.strip() else ())
            examples = tuple(previous or ())
            for example in read_examples(annotated, max_images):
                examples = merge_examples(examples, example)
        show_text(getattr(cls.hidden, "unique_id", None), said_of(annotated.skipped))
        return examples_result(cls, examples)


def _export(target: Path, parts: Parts, kind: str, names: Sequence[str]) -> str:
    """Add images and their labels to a data set, and return what was done."""
    maps = parts.maps
    log = RunLog(target, {"names": list(maps.names), "formats": [kind]})
    output = FORMATS[kind](target, maps, "slime")
    unique = FileNames(names, {name: safe_path(name) for name in log.done})
    known = {name: file for _, name, file in read_table(target)}
    records, renamed, before = list[Record](), list[tuple[str, str, str]](), len(log.done)
    for index, given in enumerate(names):
        name = known.get(given) or f"{unique(given)}.png"
        if name in log.done or name in [record.name for record in records]:
            continue
        labels = maps.label_map[index].numpy()
        record = record_of(name, labels, maps.source.coarse(slice(index, index + 1))[0], float(maps.confidence[index]))
        data, path = png(as_bytes(as_rgb(parts.images[index]))), output.place("images", name, ".png")
        if path.exists() and path.read_bytes() != data:
            raise SlimeError(f"{path} exists already and is another image. Choose another folder or file name.")
        write_whole(path, data)
        output.write(record, labels)
        records.append(record)
        renamed += [("image", given, name)] if name != given else []
    log.write(records)
    output.finish(log)
    write_table(target, [*renamed, *changed_names((), unique, maps.names if kind == "masks" else ())])
    log.close()
    kept = (
        f", {len(names) - len(records)} were there already and keep their old labels"
        if len(records) < len(names)
        else ""
    )
    other = f", {len(renamed)} under another name ({TABLE} says which)" if renamed else ""
    return f"{len(records)} of {len(names)} images added{kept}{other}; {before + len(records)} in all: {target}"


def _output_folder(folder: str) -> Path:
    """Return a folder inside the output folder."""
    base = Path(folder_paths.get_output_directory()).resolve()
    path = (base / folder.strip()).resolve()
    if not folder.strip() or path == base or not path.is_relative_to(base):
        raise SlimeError(f'"{folder}" is not a folder inside ComfyUI\'s output folder. Write a name such as labels.')
    return path


def _existing(path: str) -> Path:
    for folder in (folder_paths.get_input_directory(), folder_paths.get_output_directory()):
        base = Path(folder).resolve()
        found = (base / path.strip()).resolve()
        if found.is_relative_to(base) and found != base and found.exists():
            return found
    raise SlimeError(
        f'There is no "{path}" in ComfyUI\'s input or output folder. Copy the data set into one of them, and give the '
        "path from there, such as labels/annotations.json."
    )


def _file_names(text: str, images: torch.Tensor) -> list[str]:
    given = [line.strip() for line in text.splitlines() if line.strip()]
    if not given:
        return [f"{pixel_digest(as_rgb(image))}.png" for image in images]
    if len(given) != len(images):
        raise SlimeError(f"file_names has {len(given)} names for {len(images)} images. Write one per line, or none.")
    names = [f"{plain_stem(name)}.png" for name in given]
    outside = next((name for name in given if leads_outside(name)), None)
    if outside is not None:
        raise SlimeError(f'file_names has "{outside}", which leads outside the folder. Write names or relative paths.')
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise SlimeError(f"file_names has {twice} twice. Write another name for each image.")
    return names
