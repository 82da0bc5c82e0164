"""SLiMe Part Painter: parts painted on an image inside the node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image, ImageOps
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.examples import MAX_PARTS, Example, merge_examples
from ..slime.parts.draw import color_labels
from ..slime.parts.runs import decode_runs
from .common import Examples, Parts, as_images, named_errors, pixel_digest, say, schema, to_core
from .found_parts import FOUND, read_found

VERSION = 1
TEXT_LIMIT = 16 * 2**20  # characters
# The type whose widget web/slime_painter.js draws.
Painted = io.Custom("SLIME_PAINTING")
NOTHING = (
    "SLiMe Part Painter: nothing is painted yet. Choose a part in the node, paint it on the image, and queue again."
)
PROPOSED = "What was found stands here now. Correct it, and run again."
ANOTHER = (
    "SLiMe Part Painter: the connected image is another one than the painting was made on. Take what was found, or "
    "paint anew, and queue again."
)


@dataclass(frozen=True)
class Painting:
    """What web/painter/painting.js saves.

    Attributes:
        image: file below ComfyUI's folders as "subfolder/name [type]", or None.
        names, colors: of the parts, in the order of their labels.
        labels: [h, w] uint8, or None where nothing was painted; stretched to the image.
        of: digest of the connected image it was painted on, or None where that is not known.
    """

    image: str | None
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    labels: np.ndarray | None
    of: str | None = None

    @classmethod
    def parse(cls, text: str) -> Painting:
        """Raises SlimeError for text that the painter did not write."""
        with _readable():
            saved = _saved(text)
            colors = [bytes.fromhex(_short(part["color"]).removeprefix("#")) for part in saved["parts"]]
            labels = decode_runs(saved["runs"], saved["width"], saved["height"]) if saved["runs"] else None
            names = tuple(_short(part["name"]) for part in saved["parts"])
            of = _short(saved["of"]) if saved.get("of") else None
            return cls(_place(saved), names, tuple((c[0], c[1], c[2]) for c in colors), labels, of)

    def image_path(self) -> Path:
        """Raises SlimeError where there is no image, no longer, or outside ComfyUI's folders."""
        if self.image is None:
            raise SlimeError("there is no image. Load one in the node, drop one on it, or connect one.")
        path = image_file(self.image)
        if path is None:
            raise SlimeError(f"the image {self.image} is not there any more. Load it again in the node.")
        return path


@contextmanager
def _readable() -> Iterator[None]:
    """One error for text that the painter did not write."""
    try:
        yield
    except SlimeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise SlimeError(f"the painting cannot be read ({error}). Delete the node and paint anew.") from error


def _saved(text: str) -> dict[str, Any]:
    """The painter's JSON, before anything is made of it."""
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"{len(text)} characters")
    saved = json.loads(text) if text else {"version": VERSION, "image": None, "parts": [], "runs": ""}
    if saved["version"] > VERSION:
        raise SlimeError("the painting was saved by a newer version of SLiMe; update the extension.")
    if len(saved["parts"]) > MAX_PARTS:
        raise SlimeError(f"{len(saved['parts'])} parts are listed; at most {MAX_PARTS} are possible.")
    return dict(saved)


def _short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000 or "\0" in value:
        raise ValueError(f"{str(value)[:40]} is not a name")
    return value


def _place(saved: dict[str, Any]) -> str | None:
    file = saved["image"]
    if not file:
        return None
    return f"{_short(file['subfolder'])}/{_short(file['name'])} [{_short(file['type'])}]".lstrip("/")


def image_file(place: str) -> Path | None:
    """Path of an image below ComfyUI's folders by its annotated name, or None where there is none.

    Raises:
        SlimeError: it lies elsewhere, be it by ``..`` or behind a link.
    """
    path = Path(folder_paths.get_annotated_filepath(place))
    ways = (folder_paths.get_input_directory, folder_paths.get_output_directory, folder_paths.get_temp_directory)
    if not any(path.resolve().is_relative_to(Path(folder()).resolve()) for folder in ways):
        raise SlimeError(f"the image {place} lies outside ComfyUI's own folders. Copy it into the folder input.")
    return path if path.is_file() else None


class SLiMePartPainter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartPainter",
            essentials_category="Image Tools",
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
                io.MultiType.Input(
                    "found",
                    list(FOUND),
                    optional=True,
                    tooltip="Rough parts to correct: SLiMe parts of one image, masks, SEGS or bounding boxes. Queue "
                    "once to see them here.",
                ),
            ],
            outputs=[
                Examples.Output(display_name="examples", tooltip="For SLiMe Train or the next example."),
                io.Image.Output(display_name="image", tooltip="The image that was painted on."),
                io.Image.Output(display_name="label_map", tooltip="The parts in their exact colours on black."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, painting: str, **others: Any) -> str:
        """Runs again when the image file changes."""
        try:
            with _readable():
                place = _place(_saved(painting))
            path = image_file(place) if place else None
        except SlimeError:  # said when the node runs
            path = None
        stamp = path.stat().st_mtime_ns if path is not None else ""
        return hashlib.sha256(f"{painting}{stamp}".encode(errors="replace")).hexdigest()

    @classmethod
    def execute(
        cls,
        painting: str,
        image: Tensor | None = None,
        previous: Sequence[Example] | None = None,
        found: Any = None,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Part Painter"):
            painted = Painting.parse(painting)
            if image is None and isinstance(found, Parts):
                image = found.images
            pixels = read_picture(painted.image_path()) if image is None else _one(image)
            shown: dict[str, Any] = {}
            digest = None if image is None else pixel_digest(pixels[0])
            if image is not None:
                shown["slime_painter"] = ui.PreviewImage(pixels, cls=cls).as_dict()["images"]
                shown["slime_of"] = [digest]
            if found is not None:
                shown["slime_found"] = [read_found(found, (pixels.shape[1], pixels.shape[2])).for_painter()]
            if painted.labels is None or not painted.labels.any():
                # The image reaches the canvas all the same; what follows waits.
                if found is None:
                    return io.NodeOutput(None, None, None, ui=shown, block_execution=NOTHING)
                say(getattr(cls.hidden, "unique_id", None), PROPOSED)
                return io.NodeOutput(*[ExecutionBlocker(None)] * 3, ui=shown)
            if digest is not None and painted.of not in (None, digest):
                return io.NodeOutput(None, None, None, ui=shown, block_execution=ANOTHER)
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


def read_picture(path: Path) -> torch.Tensor:
    """[1, H, W, 3] in [0, 1], turned as the camera says, as browsers show it."""
    try:
        with Image.open(path) as file:
            pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SlimeError(f"{path.name} cannot be read as an image ({error}). Load another one in the node.") from error
    return torch.from_numpy(pixels).float()[None] / 255


def _one(image: torch.Tensor) -> torch.Tensor:
    images = as_images(image)
    if len(images) != 1:
        raise SlimeError(f"got a batch of {len(images)} images; connect one image, and paint a node for each.")
    return images
