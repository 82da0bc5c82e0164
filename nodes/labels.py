"""Labels for other tools: what was found, written as a data set, and labelled images of such sets as examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..slime.data.annotations import read_annotations
from ..slime.data.formats import FORMATS, png
from ..slime.data.journal import Journal, write_whole
from ..slime.data.records import record_of
from ..slime.errors import SlimeError
from ..slime.examples import Example, merge_examples
from ..slime.images import as_rgb
from ..slime.segment import maps_of
from .common import FILES, Examples, Parts, PartsSocket, as_bytes, named_errors, pixel_digest, schema, split_names
from .example import previous_input, shown

CHOICES = ["coco", "label-map", "masks", "label-studio", "coco-polygons", "yolo"]


class SLiMeExportLabels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeExportLabels",
            category=FILES,
            display_name="SLiMe Export Labels",
            description="Adds images and their parts to a data set in the output folder, for other tools.",
            search_aliases=["coco", "yolo", "label studio", "save dataset", "export annotations"],
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.Combo.Input(
                    "format",
                    options=CHOICES,
                    default="coco",
                    tooltip="coco: run lengths in one JSON file. label-map: indexed pictures. masks: one a part. "
                    "coco-polygons and yolo fill holes and need contourpy installed.",
                ),
                io.String.Input("folder", default="labels", tooltip="In ComfyUI's output folder. Runs add to it."),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="A file name for each image, one a line. Empty: named by their pixels. What is there "
                    "already is left as it is.",
                ),
            ],
            outputs=[io.String.Output(display_name="folder", tooltip="Where the data set lies.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, parts: Parts, format: str, folder: str, names: str = "") -> io.NodeOutput:  # noqa: A002  a socket
        with named_errors("SLiMe Export Labels"):
            place, maps = _inside(folder), parts.maps
            chosen = _names(names, parts.images)
            journal = Journal(place, {"names": list(maps.names), "formats": [format]})
            output = FORMATS[format](place, maps, "slime")
            records = []
            for index, name in enumerate(chosen):
                if name in journal.done or name in chosen[:index]:
                    continue
                labels = maps.label_map[index].numpy()
                record = record_of(name, labels, _probabilities(parts, index), float(maps.confidence[index]))
                write_whole(output.place("images", name, ".png"), png(as_bytes(as_rgb(parts.images[index]))))
                output.write(record, labels)
                records.append(record)
            journal.write(records)
            output.finish(journal)
            total = journal.close()["counts"]["pictures"]
        text = f"{len(records)} of {len(chosen)} images added, {total} in all: {place}"
        return io.NodeOutput(str(place), ui=ui.PreviewText(text))


class SLiMeLoadAnnotations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeLoadAnnotations",
            category=FILES,
            display_name="SLiMe Load Annotations",
            description="Labelled images of a COCO or Label Studio file, or of a folder of label maps, as examples.",
            search_aliases=["coco", "label studio", "load dataset", "annotations"],
            inputs=[
                io.String.Input(
                    "path",
                    default="labels/annotations.json",
                    tooltip="In ComfyUI's input or output folder: a .json file, or a folder with names.txt.",
                ),
                io.String.Input(
                    "parts", default="", tooltip="Names of the parts to take, separated by commas; empty for all."
                ),
                io.Int.Input("images", default=5, min=1, max=100, tooltip="How many labelled images to take at most."),
                previous_input(),
            ],
            outputs=[
                Examples.Output(display_name="examples", tooltip="For SLiMe Train or the next SLiMe Example."),
                io.Image.Output(display_name="preview", tooltip="The last image with its parts tinted."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, path: str, **_: object) -> object:
        try:
            file = _existing(path)
        except SlimeError:
            return path
        return max((one.stat().st_mtime_ns for one in (file.iterdir() if file.is_dir() else [file])), default=0)

    @classmethod
    def execute(cls, path: str, parts: str, images: int, previous: Sequence[Example] | None = None) -> io.NodeOutput:
        with named_errors("SLiMe Load Annotations"):
            found = read_annotations(str(_existing(path)), split_names(parts) if parts.strip() else ())
            examples = tuple(previous or ())
            for image in found.images[:images]:
                examples = merge_examples(examples, image.example(found.names))
        return shown(cls, examples)


def _inside(folder: str) -> Path:
    """A folder of the output folder, which must not be left."""
    base = Path(folder_paths.get_output_directory()).resolve()
    place = (base / folder.strip()).resolve()
    if not folder.strip() or place == base or not place.is_relative_to(base):
        raise SlimeError(f'"{folder}" is no folder inside ComfyUI\'s output folder; write a name such as labels.')
    return place


def _existing(path: str) -> Path:
    for folder in (folder_paths.get_input_directory(), folder_paths.get_output_directory()):
        base = Path(folder).resolve()
        place = (base / path.strip()).resolve()
        if place.is_relative_to(base) and place != base and place.exists():
            return place
    raise SlimeError(f'There is no "{path}" in ComfyUI\'s input or output folder.')


def _names(text: str, images: torch.Tensor) -> list[str]:
    given = [line.strip() for line in text.splitlines() if line.strip()]
    if not given:
        return [f"{pixel_digest(as_rgb(image))}.png" for image in images]
    if len(given) != len(images):
        raise SlimeError(f"got {len(given)} names for {len(images)} images; write one a line, or none.")
    return [f"{name.rsplit('.', 1)[0]}.png" for name in given]


def _probabilities(parts: Parts, index: int) -> torch.Tensor:
    """[K, h, w] of an image, as small as they come."""
    try:
        return maps_of(parts.maps)[index]
    except ValueError:
        return parts.maps.pixels(slice(index, index + 1))[0]
