"""Data sets of other tools: a module per format, which reads it, writes it, or both.

A format that is written is a subclass of :class:`.base.Format` and a line in ``FORMATS``; a form of folders that is
read is a :class:`.base.FolderReader` and a place in ``FOLDERS``.
"""

from .base import AnnotatedImage, AnnotatedSet, Format, png
from .coco import Coco, CocoPolygons
from .label_maps import FOLDER as LABEL_MAPS
from .label_maps import LabelMaps, Masks
from .label_studio import LabelStudio
from .parquet import Parquet, table
from .voc import FOLDER as VOC
from .yolo import FOLDER as YOLO
from .yolo import Yolo

__all__ = ["FOLDERS", "FORMATS", "AnnotatedImage", "AnnotatedSet", "Format", "png", "table"]

FORMATS: dict[str, type[Format]] = {
    "label-map": LabelMaps,
    "coco": Coco,
    "coco-polygons": CocoPolygons,
    "yolo": Yolo,
    "label-studio": LabelStudio,
    "masks": Masks,
    "parquet": Parquet,
}
FOLDERS = (LABEL_MAPS, YOLO, VOC)
