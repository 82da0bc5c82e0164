"""Shared by the nodes: socket types, tensors in ComfyUI's form, errors with the node's name, previews."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.examples import SEPARATORS
from ..slime.parts.draw import legend_below, overlay
from ..slime.parts.maps import PartMaps
from ..slime.parts.palette import Color

CATEGORY = "SLiMe"
RESULTS, FILES, ADVANCED = f"{CATEGORY}/results", f"{CATEGORY}/files", f"{CATEGORY}/advanced"
SAMPLING, SAM3, MESH = f"{CATEGORY}/sampling", f"{CATEGORY}/sam3", f"{CATEGORY}/mesh"
ExamplesSocket = io.Custom("SLIME_EXAMPLES")
EmbeddingsSocket = io.Custom("SLIME_EMBEDDINGS")
PartsSocket = io.Custom("SLIME_PARTS")

_SCHEMA_FIELDS = set(inspect.signature(io.Schema).parameters)
_KNOWS_ADVANCED = "advanced" in inspect.signature(io.Int.Input.__init__).parameters


@dataclass(frozen=True)
class Parts:
    """Segmentation result with its images [B, H, W, 3], the value of a SLIME_PARTS socket."""

    maps: PartMaps
    images: Tensor


def advanced(item: Any) -> Any:
    """Hide an input under "Show advanced"; cores before 0.10.0 lack the field, but their front end reads it."""
    if _KNOWS_ADVANCED:
        item.advanced = True
    else:
        item.extra_dict = {"advanced": True}
    return item


def schema(**fields: Any) -> io.Schema:
    """Return a node schema without fields that the running core lacks (search_aliases came with 0.11.0).

    ``search_aliases`` is one text, separated by commas.
    """
    if aliases := fields.pop("search_aliases", ""):
        fields["search_aliases"] = aliases.split(", ")
    known = {name: value for name, value in fields.items() if name in _SCHEMA_FIELDS}
    return io.Schema(**{"category": CATEGORY} | known)


def seed_input(tooltip: str = "Seed of the noise. The same seed gives the same masks.") -> Any:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip=tooltip)


def clip_input() -> Any:
    return io.Clip.Input("clip", optional=True, tooltip="Only needed for embeddings that were loaded from a text.")


def refine_input() -> Any:
    return io.Combo.Input(
        "refine",
        options=["off", "fast", "best"],
        default="fast",
        tooltip="Align mask borders with the edges of the image. best works at full size: four times slower, no better "
        "in our tests.",
    )


def smoothing_input(name: str) -> Any:
    tooltip = "How strongly earlier frames count; 0 = off."
    return io.Float.Input(name, default=0.7, min=0.0, max=0.95, step=0.05, tooltip=tooltip)


def confidence_input() -> Any:
    return io.Float.Input(
        "min_confidence",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip="Below this confidence, the masks of an image are empty. 1 is the confidence on the examples, 0 = off. "
        "Try 0.8; small objects may be lost.",
    )


def parts_outputs() -> list[Any]:
    return [
        PartsSocket.Output(display_name="parts", tooltip="For the SLiMe nodes that take parts."),
        io.Mask.Output(display_name="mask", tooltip="All parts together, exactly 0 or 1."),
    ]


def parts_result(cls: type[io.ComfyNode], maps: PartMaps, images: Tensor) -> io.NodeOutput:
    """Return the values of :func:`parts_outputs`, and a preview."""
    mask = to_core((maps.label_map > 0).float())
    return io.NodeOutput(Parts(maps, images), mask, ui=overlay_preview(cls, maps, images))


def overlay_preview(cls: type[io.ComfyNode], maps: PartMaps, images: Tensor) -> dict[str, Any]:
    """Draw a batch with its legends, and save it for the node's preview."""
    tinted = overlays(images, maps.label_map, maps.palette)
    return save_previews(cls, (legend_below(picture, maps.names, maps.palette) for picture in tinted))


def save_previews(cls: type[io.ComfyNode], pictures: Iterable[Image.Image]) -> dict[str, Any]:
    """Save pictures one at a time, and return what shows them in the node."""
    saved: list[Any] = []
    for picture in pictures:
        saved += ui.PreviewImage(to_tensor(picture)[None], cls=cls).as_dict()["images"]
    return {"images": saved, "animated": (False,)}


def show_text(node_id: str | None, text: str) -> None:
    """Show a line of text in a node."""
    server = getattr(PromptServer, "instance", None)  # there is none where nodes run without a server
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def progress(total: int = 1) -> Callable[[int, int], None]:
    """Return a function of the work done and its total: it moves the node's progress bar, and stops a cancelled run."""
    bar = comfy.utils.ProgressBar(total)

    def report(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return report


@contextmanager
def named_errors(node: str) -> Iterator[None]:
    """Prefix the message of a SlimeError with the node's display name."""
    try:
        yield
    except SlimeError as error:
        raise SlimeError(f"{node}: {error}") from error


def as_images(image: Tensor) -> Tensor:
    """Return IMAGE as float32 [B, H, W, 3] on the CPU; other nodes may give four channels or no batch.

    Raises:
        SlimeError: a mask.
    """
    if image.ndim < 3 or (image.ndim == 3 and image.shape[-1] > 4):
        raise SlimeError("A mask is connected to an image input. Use Convert Mask to Image, or connect the image.")
    image = image[None] if image.ndim == 3 else image
    return image[..., :3].to("cpu", torch.float32)


def as_masks(mask: Tensor) -> Tensor:
    """Return MASK as float32 [B, H, W] on the CPU; other nodes may give [H, W] or [B, 1, H, W]."""
    if mask.ndim == 4:
        mask = mask[:, 0] if mask.shape[1] == 1 else mask[..., 0]
    mask = mask[None] if mask.ndim == 2 else mask
    return mask.to("cpu", torch.float32)


def to_core(tensor: Tensor) -> Tensor:
    """Move a result to the device and type in which ComfyUI keeps IMAGE and MASK."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
    return tensor.to(comfy.model_management.intermediate_device(), dtype)


def split_names(text: str) -> list[str]:
    """Split "wheel, window" at commas, semicolons and line breaks."""
    return [name for part in SEPARATORS.split(text) if (name := part.strip())]


def overlays(images: Tensor, labels: Tensor, palette: Sequence[Color], opacity: float = 0.55) -> Iterator[Image.Image]:
    """Yield the images [B, H, W, 3] tinted by label maps [B, H, W], one at a time: a batch may be large."""
    for image, label in zip(images, labels, strict=True):
        yield Image.fromarray(overlay(as_bytes(image), label.numpy(), palette, opacity=opacity))


def live_preview(image: Tensor, maps: Tensor, palette: Sequence[Color]) -> Image.Image:
    """Tint an image [h, w, 3] by its part maps [K, h', w'], for the live preview."""
    grown = torch.nn.functional.interpolate(maps[None].float(), size=image.shape[:2], mode="bilinear")[0]
    return Image.fromarray(overlay(as_bytes(image), grown.argmax(0).numpy(), palette))


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image [h, w, 3] in [0, 1]."""
    return Image.fromarray(as_bytes(image))


def to_tensor(picture: Image.Image) -> Tensor:
    """Convert a picture to an image [h, w, 3] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).float() / 255


def pixel_digest(image: Tensor) -> str:
    """Return a digest of the pixels of an image [h, w, 3], which may come from any node."""
    return hashlib.sha256(as_bytes(image).tobytes()).hexdigest()[:16]


def as_bytes(image: Tensor) -> np.ndarray:
    """Convert an image [h, w, 3] in [0, 1] to uint8."""
    return (image.float().cpu().clamp(0, 1) * 255).round().byte().numpy()
