"""What the nodes share: socket types, tensors in ComfyUI's form, errors with the node's name, previews."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.parts.draw import draw_legend, legend_below, overlay
from ..slime.parts.maps import PartMaps
from ..slime.parts.palette import Color

CATEGORY = "SLiMe"
RESULTS, FILES, EXPERTS = f"{CATEGORY}/results", f"{CATEGORY}/learned parts", f"{CATEGORY}/more"
SAMPLING = f"{CATEGORY}/sampling"
Examples = io.Custom("SLIME_EXAMPLES")
Embeddings = io.Custom("SLIME_EMBEDDINGS")
PartsSocket = io.Custom("SLIME_PARTS")
Looks = io.Custom("SLIME_LOOK")

_SCHEMA_FIELDS = set(inspect.signature(io.Schema).parameters)
_KNOWS_ADVANCED = "advanced" in inspect.signature(io.Int.Input.__init__).parameters


@dataclass(frozen=True)
class Parts:
    """Segmentation result with its images [B, H, W, 3], as it travels between nodes."""

    maps: PartMaps
    images: Tensor


def expert(made: Any) -> Any:
    """An input tucked away under "Show advanced"; cores before 0.10.0 do not know that, but their front end does."""
    if _KNOWS_ADVANCED:
        made.advanced = True
    else:
        made.extra_dict = {"advanced": True}
    return made


def bygone(made: Any) -> Any:
    """An input that only older workflows use; it is shown where it holds something else than its default."""
    made.tooltip = "Of an older workflow; now in a settings node."
    made.extra_dict = {"hidden": True}
    return made


def schema(**fields: Any) -> io.Schema:
    """A node schema without the fields that the running core does not know (search_aliases came with 0.11.0)."""
    known = {name: value for name, value in fields.items() if name in _SCHEMA_FIELDS}
    return io.Schema(**{"category": CATEGORY} | known)


def seed_input() -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFF,
        control_after_generate=False,
        tooltip="Of the noise; the same seed gives the same masks.",
    )


def clip_input() -> Any:
    return io.Clip.Input("clip", optional=True, tooltip="Needed only for embeddings in the compact text form.")


def flip_input() -> Any:
    return expert(
        io.Boolean.Input(
            "average_flip",
            default=False,
            optional=True,
            tooltip="Also look at the mirrored image and average: twice the work, little gain.",
        )
    )


def draws_input() -> Any:
    return expert(
        io.Int.Input(
            "noise_draws",
            default=1,
            min=1,
            max=16,
            optional=True,
            tooltip="Looks with other noise, averaged: one more pass each, little gain.",
        )
    )


def refine_input() -> Any:
    return io.Combo.Input(
        "refine",
        options=["off", "fast", "best"],
        default="fast",
        tooltip="Pull mask borders to the edges of the image. fast is nearly as good as best and much faster.",
    )


def confidence_input() -> Any:
    return io.Float.Input(
        "min_confidence",
        default=0.0,
        min=0.0,
        max=2.0,
        step=0.01,
        optional=True,
        tooltip="Images where the parts are less sure than this count as without the object. 1 is as sure as on the "
        "examples, 0 never decides so. 0.8 is a good start; it loses small objects.",
    )


def parts_outputs() -> list[Any]:
    return [
        PartsSocket.Output(display_name="parts", tooltip="For SLiMe Part Mask and SLiMe Overlay."),
        io.Mask.Output(display_name="mask", tooltip="All parts together, exactly 0 or 1."),
    ]


def parts_result(cls: type[io.ComfyNode], maps: PartMaps, images: Tensor) -> io.NodeOutput:
    """What goes with :func:`parts_outputs`, and a picture of it."""
    mask = to_core((maps.label_map > 0).float())
    return io.NodeOutput(Parts(maps, images), mask, ui=overlay_preview(cls, maps, images))


def overlay_preview(cls: type[io.ComfyNode], maps: PartMaps, images: Tensor) -> dict[str, Any]:
    """Images tinted by their parts, drawn and written one by one: a batch may be large."""
    shown: list[Any] = []
    for index in range(len(images)):
        part = slice(index, index + 1)
        tinted = with_legend(overlays(images[part], maps.label_map[part], maps.palette), maps.names, maps.palette)
        shown += ui.PreviewImage(tinted, cls=cls).as_dict()["images"]
    return {"images": shown, "animated": (False,)}


def say(node_id: str | None, text: str) -> None:
    """A line of text in a node."""
    server = getattr(PromptServer, "instance", None)  # there is none where nodes run without a server
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


@contextmanager
def named_errors(node: str) -> Iterator[None]:
    """Put the node's display name in front of a user's mistake."""
    try:
        yield
    except SlimeError as error:
        raise SlimeError(f"{node}: {error}") from error


def as_images(image: Tensor) -> Tensor:
    """IMAGE as float32 [B, H, W, 3] on the CPU; other nodes may hand over four channels or no batch."""
    image = image[None] if image.ndim == 3 else image
    return image[..., :3].to("cpu", torch.float32)


def as_masks(mask: Tensor) -> Tensor:
    """MASK as float32 [B, H, W] on the CPU; other nodes may hand over [H, W] or [B, 1, H, W]."""
    if mask.ndim == 4:
        mask = mask[:, 0] if mask.shape[1] == 1 else mask[..., 0]
    mask = mask[None] if mask.ndim == 2 else mask
    return mask.to("cpu", torch.float32)


def to_core(tensor: Tensor) -> Tensor:
    """A result on the device and in the type where ComfyUI keeps IMAGE and MASK."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
    return tensor.to(comfy.model_management.intermediate_device(), dtype)


def split_names(text: str) -> list[str]:
    """ "wheel, window" -> ["wheel", "window"]; commas and semicolons of any script and line breaks separate."""
    return [name.strip() for name in re.split("[,;\\n\u060c\u061b\u3001\uff0c\uff1b]", text) if name.strip()]


def overlays(images: Tensor, labels: Tensor, palette: Sequence[Color], opacity: float = 0.55) -> Tensor:
    """Images [B, H, W, 3] tinted by label maps [B, H, W]: IMAGE [B, H, W, 3]."""
    pictures = [
        overlay(as_bytes(image), label.numpy(), palette, opacity=opacity)
        for image, label in zip(images, labels, strict=True)
    ]
    return torch.from_numpy(np.stack(pictures)).float() / 255


def with_legend(images: Tensor, names: Sequence[str], palette: Sequence[Color], inside: bool = False) -> Tensor:
    """Images [B, H, W, 3] with the parts' names: under them, for showing, or in a corner, which keeps the size."""
    pictures = [to_picture(image) for image in images]
    if inside:
        for picture in pictures:
            draw_legend(picture, names, palette)
    else:
        pictures = [legend_below(picture, names, palette) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255


def live_preview(image: Tensor, maps: Tensor, palette: Sequence[Color]) -> Image.Image:
    """A view [h, w, 3] tinted by its part maps [K, h', w'], for the progress preview."""
    grown = torch.nn.functional.interpolate(maps[None].float(), size=image.shape[:2], mode="bilinear")[0]
    return Image.fromarray(overlay(as_bytes(image), grown.argmax(0).numpy(), palette))


def to_picture(image: Tensor) -> Image.Image:
    """[h, w, 3] in [0, 1] for the progress preview."""
    return Image.fromarray(as_bytes(image))


def pixel_digest(image: Tensor) -> str:
    """Tells images [h, w, 3] apart by their pixels: a name says nothing of what another node makes."""
    return hashlib.sha256(as_bytes(image).tobytes()).hexdigest()[:16]


def as_bytes(image: Tensor) -> np.ndarray:
    """uint8 [h, w, 3] of an image in [0, 1]."""
    return (image.float().cpu().clamp(0, 1) * 255).round().byte().numpy()
