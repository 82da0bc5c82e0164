"""Write files for annotation and training tools from records."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import SlimeError
from ..parts.palette import Color
from .records import Record, part_rle
from .run_log import RunLog, partial_path, write_whole
from .shapes import brush_rle, mask_of_coco, outlines

logger = logging.getLogger(__name__)


class Named(Protocol):
    """Embeddings, or part maps."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> tuple[Color, ...]: ...


class Format:
    """Base class of output formats.

    Args:
        folder: output folder.
        parts: the part names and colours.
        model: id of the embeddings, for formats with such a field.
    """

    def __init__(self, folder: Path, parts: Named, model: str) -> None:
        self.folder, self.names, self.palette, self.model = folder, parts.names, parts.palette, model

    def write(self, record: Record, labels: np.ndarray) -> None:
        """Write the files of one image, each completely or not at all. Called from several threads."""

    def finish(self, run_log: RunLog) -> None:
        """Write what is made of all records, after the last one."""

    def place(self, kind: str, name: str, suffix: str) -> Path:
        """Return the path of a file of an image; raise SlimeError for a name that leads out of the folder."""
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise SlimeError(f'An image is called "{name}", which would be written outside {self.folder}.')
        return self.folder / kind / path.with_suffix(suffix)


class LabelMaps(Format):
    """Write ``labels/*.png``, indexed images whose values are the labels, and ``names.txt``, one part per line."""

    def write(self, record: Record, labels: np.ndarray) -> None:
        write_whole(self.place("labels", record.name, ".png"), png(labels, [(0, 0, 0), *self.palette]))

    def finish(self, run_log: RunLog) -> None:
        write_whole(self.folder / "labels" / "names.txt", "".join(f"{name}\n" for name in self.names).encode())


class Masks(Format):
    """Write ``masks/PART/*.png``: 255 inside the part."""

    def write(self, record: Record, labels: np.ndarray) -> None:
        for label, part in enumerate(self.names, start=1):
            folder = f"masks/{''.join(x if x.isalnum() or x in ' -_+.' else '_' for x in part)}"
            write_whole(self.place(folder, record.name, ".png"), png((labels == label).astype(np.uint8) * 255))


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
        _write_json(self.folder / "annotations.json", fixed, images=images(), annotations=annotations())

    def _shape(self, record: Record, part: Any) -> Any:
        if not self.polygons:
            return part_rle(record, part)
        rings = [outer for outer, _ in outlines(mask_of_coco(part.counts, record.height, record.width))]
        return [ring[:-1].round(2).ravel().tolist() for ring in rings if len(ring) > 3]


class CocoPolygons(Coco):
    """Write COCO polygons, for tools that read no run lengths; holes are filled."""

    polygons = True


class Yolo(Format):
    """Write ``labels/*.txt`` of YOLO-seg, and ``data.yaml``; classes count from 0, holes are filled."""

    def __init__(self, folder: Path, parts: Named, model: str) -> None:
        super().__init__(folder, parts, model)
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


class LabelStudio(Format):
    """Write ``tasks.json``, one task per image with a prediction as brush labels, and ``config.xml`` for it.

    The images' addresses are their names after ``/data/local-files/?d=``, as Label Studio's local storage has them.
    """

    def finish(self, run_log: RunLog) -> None:
        write_whole(self.folder / "config.xml", self._config().encode())
        _write_json(self.folder / "tasks.json", None, tasks=map(self._task, run_log.records()))

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
        return {"data": {"image": f"/data/local-files/?d={record.name}"}, "predictions": [prediction]}


class Parquet(Format):
    """Write ``parts-*.parquet``: one row per image, its parts as a list with COCO's run lengths; 20,000 rows a file."""

    ROWS = 20_000

    def finish(self, run_log: RunLog) -> None:
        import pyarrow.parquet as parquet

        records, number = run_log.records(), 0
        while (rows := list(islice(records, self.ROWS))) or not number:
            data = io.BytesIO()
            parquet.write_table(table(rows, self.names), data)
            write_whole(self.folder / f"parts-{number:05d}.parquet", data.getvalue())
            number += 1


def table(records: Sequence[Record], names: Sequence[str], errors: Sequence[tuple[str, str]] = ()) -> Any:
    """Return a pyarrow table of records, and of the names and reasons of images that failed."""
    import pyarrow as pa

    integer, text, real = pa.int64(), pa.string(), pa.float64()
    part = [("name", text), ("label", integer), ("score", real), ("area", integer), ("bbox", pa.list_(integer))]
    whole = [("image", text), ("height", integer), ("width", integer), ("confidence", real)]
    parts = ("parts", pa.list_(pa.struct([*part, ("counts", text)])))
    rows = [
        asdict(record)
        | {"image": record.name, "parts": [asdict(p) | {"name": names[p.label - 1]} for p in record.parts]}
        for record in records
    ]
    rows += [{"image": name, "error": reason} for name, reason in errors]
    return pa.Table.from_pylist(rows, schema=pa.schema([*whole, parts, ("error", text)]))


FORMATS: dict[str, type[Format]] = {
    "label-map": LabelMaps,
    "coco": Coco,
    "coco-polygons": CocoPolygons,
    "yolo": Yolo,
    "label-studio": LabelStudio,
    "masks": Masks,
    "parquet": Parquet,
}


def png(pixels: np.ndarray, palette: Sequence[tuple[int, int, int]] | None = None) -> bytes:
    """Encode pixels uint8 [H, W] or [H, W, 3] as PNG, with a palette for label maps."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    if palette is not None:
        image.putpalette([level for color in palette for level in color])
    image.save(data, "PNG")
    return data.getvalue()


def _write_json(path: Path, fixed: dict[str, Any] | None, **lists: Iterable[dict[str, Any]]) -> None:
    """Write an object of ``fixed`` entries and lists, item by item; without ``fixed`` the one list alone."""
    partial = partial_path(path)
    with partial.open("w", encoding="utf-8") as file:
        if fixed is not None:
            file.write(json.dumps(fixed, ensure_ascii=False)[:-1] + ",")
        for index, (name, items) in enumerate(lists.items()):
            file.write(("," if index else "") + (f'"{name}":[' if fixed is not None else "["))
            for place, item in enumerate(items):
                file.write(("," if place else "") + "\n" + json.dumps(item, separators=(",", ":"), ensure_ascii=False))
            file.write("\n]")
        file.write("}\n" if fixed is not None else "\n")
    partial.replace(path)
