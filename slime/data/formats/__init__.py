"""Data sets of other tools: a module per format, which reads it, writes it, or both.

A format that is written is a subclass of :class:`.base.Format` and a line in ``FORMATS``; a form of folders that is
read is a module with ``claims(folder)`` and ``read(folder, wanted parts)``, and a place in ``FOLDERS``.
"""

from . import label_maps, voc, yolo
from .base import AnnotatedImage, AnnotatedSet, Format
from .coco import Coco, CocoPolygons
from .label_maps import LabelMaps, Masks
from .label_studio import LabelStudio
from .parquet import Parquet, table
from .yolo import Yolo

__all__ = ["FOLDERS", "FORMATS", "AnnotatedImage", "AnnotatedSet", "Format", "table"]

FORMATS: dict[str, type[Format]] = {
    "label-map": LabelMaps,
    "coco": Coco,
    "coco-polygons": CocoPolygons,
    "yolo": Yolo,
    "label-studio": LabelStudio,
    "masks": Masks,
    "parquet": Parquet,
}
FOLDERS = (label_maps, yolo, voc)
