"""SLiMe Part Painter: parts painted on an image inside the node."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageOps

from ..slime.errors import SlimeError
from ..slime.examples import Example, merge_examples
from ..slime.visualize import color_labels
from .common import Examples, as_images, named_errors, schema, to_core

VERSION = 1
# The type whose widget web/slime_painter.js draws.
Painted = io.Custom("SLIME_PAINTING")
NOTHING = (
    "SLiMe Part Painter: nothing is painted yet. Choose a part in the node, paint it on the image, and queue again."
)


@dataclass(frozen=True)
class Painting:
    """What web/painter/painting.js saves.

    Attributes:
        image: file below ComfyUI's folders as "subfolder/name [type]", or None.
        names, colors: of the parts, in the order of their labels.
        labels: [h, w] uint8, or None where nothing was painted; stretched to the image.
    """

    image: str | None
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    labels: np.ndarray | None

    @classmethod
    def parse(cls, text: str) -> Painting:
        """Raises SlimeError for text that the painter did not write."""
        try:
            saved = json.loads(text) if text else {"version": VERSION, "image": None, "parts": [], "runs": ""}
            if saved["version"] > VERSION:
                raise SlimeError("the painting was saved by a newer version of SLiMe; update the extension.")
            file = saved["image"]
            place = f"{file['subfolder']}/{file['name']} [{file['type']}]".lstrip("/") if file else None
            colors = [bytes.fromhex(part["color"].removeprefix("#")) for part in saved["parts"]]
            labels = decode_runs(saved["runs"], saved["width"], saved["height"]) if saved["runs"] else None
            names = tuple(part["name"] for part in saved["parts"])
            return cls(place, names, tuple((c[0], c[1], c[2]) for c in colors), labels)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SlimeError(f"the painting cannot be read ({error}). Delete the node and paint anew.") from error

    def image_path(self) -> Path:
        """Raises SlimeError where there is no image, or no longer."""
        if self.image is None:
            raise SlimeError("there is no image. Load one in the node, drop one on it, or connect one.")
        if not folder_paths.exists_annotated_filepath(self.image):
            raise SlimeError(f"the image {self.image} is not there any more. Load it again in the node.")
        return Path(folder_paths.get_annotated_filepath(self.image))


def decode_runs(runs: str, width: int, height: int) -> np.ndarray:
    """Label map [height, width] of LabelMap.encode in web/painter/label_map.js.

    Raises:
        ValueError: where the runs do not make up the size.
    """
    try:
        data = base64.b64decode(runs, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    labels: list[int] = []
    counts: list[int] = []
    position = 0
    while position < len(data):
        labels.append(data[position])
        count = shift = 0
        more = True
        while more:
            position += 1
            if position >= len(data):
                raise ValueError("it is cut short")
            count |= (data[position] & 127) << shift
            more, shift = data[position] > 127, shift + 7
        counts.append(count)
        position += 1
    if sum(counts) != width * height:
        raise ValueError(f"{sum(counts)} pixels instead of {width} x {height}")
    return np.repeat(np.array(labels, np.uint8), counts).reshape(height, width)


class SLiMePartPainter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartPainter",
            display_name="SLiMe Part Painter",
            description="Paint several parts on one image, each in its colour and with its name.",
            search_aliases=["paint mask", "draw mask", "mask editor", "label image", "annotate"],
            inputs=[
                Painted.Input("painting", tooltip="The painted parts; they travel inside the workflow."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="An image to paint on instead of one loaded in the node. Queue once to see it here, unless "
                    "it comes from Load Image.",
                ),
                Examples.Input(
                    "previous",
                    optional=True,
                    tooltip="Other examples. The same image adds parts to it, another is one more example.",
                ),
            ],
            outputs=[
                Examples.Output(display_name="examples", tooltip="For SLiMe Train or the next example."),
                io.Image.Output(display_name="image", tooltip="The image that was painted on."),
                io.Image.Output(display_name="label_map", tooltip="The parts in their exact colours on black."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, painting: str, **others: Any) -> str:
        """Runs again when the image file changes."""
        place = Painting.parse(painting).image
        if place is None or not folder_paths.exists_annotated_filepath(place):
            return painting
        stamp = Path(folder_paths.get_annotated_filepath(place)).stat().st_mtime_ns
        return hashlib.sha256(f"{painting}{stamp}".encode()).hexdigest()

    @classmethod
    def execute(cls, painting, image=None, previous=None) -> io.NodeOutput:
        with named_errors("SLiMe Part Painter"):
            painted = Painting.parse(painting)
            pixels = _read(painted.image_path()) if image is None else _one(image)
            shown = None if image is None else {"slime_painter": ui.PreviewImage(pixels, cls=cls).as_dict()["images"]}
            if painted.labels is None or not painted.labels.any():
                # The image reaches the canvas all the same; what follows says that nothing is painted.
                return io.NodeOutput(None, None, None, ui=shown, block_execution=NOTHING)
            labels = _stretched(painted.labels, pixels.shape[1], pixels.shape[2])
            example = _example(pixels[0], labels, painted)
            examples = merge_examples(previous or (), example)
        picture = torch.from_numpy(color_labels(labels, painted.colors)).float()[None] / 255
        return io.NodeOutput(examples, to_core(pixels), to_core(picture), ui=shown)


def _example(image: torch.Tensor, labels: np.ndarray, painted: Painting) -> Example:
    """Parts in the list that are not painted here are left out."""
    present = [label for label in range(1, len(painted.names) + 1) if (labels == label).any()]
    table = np.zeros(256, np.int64)
    table[present] = range(1, len(present) + 1)
    return Example.from_label_map(image, torch.from_numpy(table[labels]), [painted.names[i - 1] for i in present])


def _stretched(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def _read(path: Path) -> torch.Tensor:
    """[1, H, W, 3] in [0, 1], turned as the camera says, as browsers show it."""
    with Image.open(path) as file:
        pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    return torch.from_numpy(pixels).float()[None] / 255


def _one(image: torch.Tensor) -> torch.Tensor:
    images = as_images(image)
    if len(images) != 1:
        raise SlimeError(f"got a batch of {len(images)} images; connect one image, and paint a node for each.")
    return images
