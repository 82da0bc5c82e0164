"""SLiMe Part Painter: parts painted on an image inside the node."""

from __future__ import annotations

import errno
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
from PIL import Image
from torch import Tensor

from ..slime.data.pixels import decode
from ..slime.errors import SlimeError
from ..slime.examples import MAX_PARTS, Example, merge_examples
from ..slime.parts.draw import color_labels
from ..slime.parts.runs import decode_runs
from .common import ExamplesSocket, Parts, as_images, named_errors, pixel_digest, schema, to_core
from .example import previous_input
from .initial_masks import INITIAL_MASKS, check_one_image, read_initial_masks

VERSION = 1
TEXT_LIMIT = 16 * 2**20  # characters
# The type whose widget web/slime_painter.js draws.
Painted = io.Custom("SLIME_PAINTING")
NOTHING = "SLiMe Part Painter: nothing is painted. Choose a part in the node, paint it on the image, and run again."
PROPOSED = "The masks are in the painter now. Correct them, and run again."
ANOTHER = (
    "SLiMe Part Painter: the painting belongs to another image than the connected one. Press the bin and paint "
    "again, or the arrow to take connected initial masks, and run."
)


@dataclass(frozen=True)
class Painting:
    """A painting as web/painter/painting.js saves it.

    Attributes:
        image: file in ComfyUI's folders as "subfolder/name [type]", or None.
        names, colors: of the parts, in the order of their labels.
        labels: [h, w] uint8, resized to the image later; None where nothing was painted.
        of: digest of the connected image it was painted on, or None if unknown.
    """

    image: str | None
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    labels: np.ndarray | None
    of: str | None = None

    @classmethod
    def parse(cls, text: str) -> Painting:
        """Parse a painting; raise SlimeError for text that the painter did not write."""
        with _readable():
            saved = _saved(text)
            colors = [bytes.fromhex(_short(part["color"]).removeprefix("#")) for part in saved["parts"]]
            labels = decode_runs(saved["runs"], saved["width"], saved["height"]) if saved["runs"] else None
            names = tuple(_short(part["name"]) for part in saved["parts"])
            of = _short(saved["of"]) if saved.get("of") else None
            return cls(_annotated_name(saved), names, tuple((c[0], c[1], c[2]) for c in colors), labels, of)

    def image_path(self) -> Path:
        """Return the image's path; raise SlimeError if there is none, or it is outside ComfyUI's folders."""
        if self.image is None:
            raise SlimeError("There is no image. Load one in the node, drop one on it, or connect one.")
        path = image_file(self.image)
        if path is None:
            raise SlimeError(f"The image {self.image} no longer exists. Load it again in the node.")
        return path


@contextmanager
def _readable() -> Iterator[None]:
    """Turn every error about text that the painter did not write into one SlimeError."""
    try:
        yield
    except SlimeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise SlimeError(f"The painting cannot be read ({error}). Add a new painter and paint again.") from error


def _saved(text: str) -> dict[str, Any]:
    """Parse the painter's JSON, and check its version and size."""
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"{len(text)} characters")
    saved = json.loads(text) if text else {"version": VERSION, "image": None, "parts": [], "runs": ""}
    if saved["version"] > VERSION:
        raise SlimeError("The painting was saved by a newer version of SLiMe. Update the extension.")
    if len(saved["parts"]) > MAX_PARTS:
        raise SlimeError(f"The painting has {len(saved['parts'])} parts; at most {MAX_PARTS} are possible.")
    return dict(saved)


def _short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000 or "\0" in value:
        raise ValueError(f"{str(value)[:40]} is not a name")
    return value


def _annotated_name(saved: dict[str, Any]) -> str | None:
    file = saved["image"]
    if not file:
        return None
    return f"{_short(file['subfolder'])}/{_short(file['name'])} [{_short(file['type'])}]".lstrip("/")


def image_file(name: str) -> Path | None:
    """Return the path of an image in ComfyUI's folders by its annotated name, or None if there is none.

    Raises:
        SlimeError: it is elsewhere, by ``..`` or through a link.
    """
    path = Path(folder_paths.get_annotated_filepath(name))
    folders = (folder_paths.get_input_directory, folder_paths.get_output_directory, folder_paths.get_temp_directory)
    if not any(path.resolve().is_relative_to(Path(folder()).resolve()) for folder in folders):
        raise SlimeError(f"The image {name} is outside ComfyUI's folders. Copy it into the folder input.")
    try:
        return path if path.is_file() else None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):  # a name that no file can have
            return None
        raise SlimeError(f"The image {name} cannot be opened: {error.strerror}.") from error


class SLiMePartPainter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartPainter",
            essentials_category="Image Tools",
            display_name="SLiMe Part Painter",
            description="Paint several parts on one image, each in its colour and with its name.",
            search_aliases="paint, paint mask, draw mask, mask editor, label image, annotate, teach, wheel",
            inputs=[
                Painted.Input("painting", tooltip="The painted parts; they are saved in the workflow."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="An image to paint on, instead of one loaded in the node. Run once to see it here, "
                    "unless it comes from Load Image.",
                ),
                previous_input(),
                io.MultiType.Input(
                    "initial_masks",
                    list(INITIAL_MASKS),
                    optional=True,
                    tooltip="Masks to correct: SLiMe parts of one image, masks, SEGS or bounding boxes. Run once to "
                    "see them here.",
                ),
            ],
            outputs=[
                ExamplesSocket.Output(display_name="examples", tooltip="For SLiMe Train or the next example."),
                io.Image.Output(display_name="image", tooltip="The image that was painted on."),
                io.Image.Output(display_name="label_map", tooltip="The parts in their exact colours on black."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, painting: str | None = None, **others: Any) -> str:
        """Return a key that changes with the painting and the image file."""
        del others
        try:
            with _readable():
                name = _annotated_name(_saved(painting or ""))
            path = image_file(name) if name else None
        except SlimeError:  # execute reports it
            path = None
        stamp = path.stat().st_mtime_ns if path is not None else ""
        return hashlib.sha256(f"{painting}{stamp}".encode(errors="replace")).hexdigest()

    @classmethod
    def execute(
        cls,
        painting: str,
        image: Tensor | None = None,
        previous: Sequence[Example] | None = None,
        initial_masks: Any = None,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Part Painter"):
            painted = Painting.parse(painting)
            if image is None and isinstance(initial_masks, Parts):
                check_one_image(initial_masks)
                image = initial_masks.images
            pixels = read_image(painted.image_path()) if image is None else _single(image)
            digest = None if image is None else pixel_digest(pixels[0])
            shown = _for_painter(cls, pixels, digest, initial_masks)
            if painted.labels is None or not painted.labels.any():
                # The image reaches the painter all the same; later nodes wait.
                if initial_masks is None:
                    shown["slime_message"] = [NOTHING]
                    return io.NodeOutput(None, None, None, ui=shown, block_execution=NOTHING)
                shown["slime_message"] = [PROPOSED]
                return io.NodeOutput(*[ExecutionBlocker(None)] * 3, ui=shown)
            if digest is not None and painted.of not in (None, digest):
                shown["slime_message"] = [ANOTHER]
                return io.NodeOutput(None, None, None, ui=shown, block_execution=ANOTHER)
            labels = _resized(painted.labels, pixels.shape[1], pixels.shape[2])
            example = _example(pixels[0], labels, painted)
            examples = merge_examples(previous or (), example)
        label_image = torch.from_numpy(color_labels(labels, painted.colors)).float()[None] / 255
        return io.NodeOutput(examples, to_core(pixels), to_core(label_image), ui=shown)


def _for_painter(cls: type[io.ComfyNode], pixels: Tensor, digest: str | None, initial_masks: Any) -> dict[str, Any]:
    """Return what web/slime_painter.js gets: the connected image and its digest, and the initial masks."""
    shown: dict[str, Any] = {}
    if digest is not None:
        shown["slime_image"] = ui.PreviewImage(pixels, cls=cls).as_dict()["images"]
        shown["slime_digest"] = [digest]
    if initial_masks is not None:
        size = (pixels.shape[1], pixels.shape[2])
        shown["slime_initial_masks"] = [read_initial_masks(initial_masks, size)]
    return shown


def _example(image: torch.Tensor, labels: np.ndarray, painted: Painting) -> Example:
    """Make the example; parts that are listed but not painted are left out."""
    present = [label for label in range(1, len(painted.names) + 1) if (labels == label).any()]
    table = np.zeros(256, np.int64)
    table[present] = range(1, len(present) + 1)
    return Example.from_label_map(image, torch.from_numpy(table[labels]), [painted.names[i - 1] for i in present])


def _resized(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def read_image(path: Path) -> torch.Tensor:
    """Read an image file as [1, H, W, 3] in [0, 1], rotated by its EXIF data as browsers do."""
    try:
        return torch.from_numpy(decode(path.read_bytes())).float()[None] / 255
    except (OSError, SlimeError) as error:
        reason = error.__cause__ or error
        raise SlimeError(f"{path.name} cannot be read as an image ({reason}). Load another one in the node.") from error


def _single(image: torch.Tensor) -> torch.Tensor:
    images = as_images(image)
    if len(images) != 1:
        raise SlimeError(f"The image is a batch of {len(images)}. Connect one image, and use one painter per image.")
    return images
