"""Look at images: encode them, pass them through the backbone, keep what was observed.

One look serves any number of embeddings. The steps stand apart: :func:`encode` first, for all images, since on a small
card VAE and UNet take turns in memory; then passes over sub-batches, each consumed before the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..backbones.attention import Attention
from ..backbones.base import Backbone, Observation, Plan, Scores, ScoresRows, seeded_noise
from ..backbones.text import Context, capture_attention, text_conditioned
from ..batches import in_batches
from ..embeddings import CONTEXT, PartEmbeddings
from ..images import as_rgb, resize_image, resize_maps, working_size
from ..read_out import Official
from ..settings import LookSettings
from .official import official_maps, token_maps
from .read import propagate_maps, read

T = TypeVar("T")


class View(NamedTuple):
    """A crop of every image: its box, the size it is encoded at, and whether it is mirrored."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool


@dataclass(frozen=True)
class Tokens:
    """What the official read-out takes: the cross-attention layers with all tokens, and those to propagate along."""

    cross: tuple[Attention, ...]
    attention: tuple[Attention, ...]

    def to(self, device: torch.device | str) -> Tokens:
        """The same on another device."""
        return Tokens(tuple(a.to(device) for a in self.cross), tuple(a.to(device) for a in self.attention))


Seen = Observation | Scores | Tokens
Passes = Iterator[tuple[View, Seen]]
ReadOne = Callable[[Seen, PartEmbeddings, int], Tensor]


@dataclass(frozen=True)
class Look:
    """What was observed of a batch of images, on the CPU.

    Attributes:
        images: [B, H, W, 3], as they were given.
        digest: what embeddings must agree on to be read from it, see :meth:`slime.PartEmbeddings.pass_digest`.
        settings: it was made with.
        batches: slices of the batch with what every view and noise draw showed.
        previous: a look at the same images for other embeddings, of this model or another.
    """

    images: Tensor
    digest: str
    settings: LookSettings
    batches: tuple[tuple[slice, tuple[tuple[View, Seen], ...]], ...]
    previous: Look | None = None

    def find(self, digest: str) -> Look | None:
        """The latest look of this digest, here or among the previous ones."""
        if self.digest == digest:
            return self
        return None if self.previous is None else self.previous.find(digest)


def look_at(
    backbone: Backbone,
    images: Tensor,
    items: Sequence[PartEmbeddings],
    settings: LookSettings,
    use: Callable[[slice, Passes], T],
    any_rows: bool = False,
    on_encoded: Callable[[float], None] = lambda _: None,
    latents: Tensor | None = None,
) -> Iterator[T]:
    """Results of ``use`` on what sub-batches of images [B, H, W, 3] show, for embeddings of one pass.

    These embeddings' rows are scored in the pass itself where the backbone can; with ``any_rows`` the features are
    kept, which serve any others too.

    ``latents`` [B, C, h, w] are the images encoded, at any size; crops are encoded from the images all the same.

    ``on_encoded`` hears how many images were encoded, after every sub-batch; an image of n views counts 1/n a view.

    Where memory runs out a sub-batch is halved and tried again. ``use`` belongs to what is tried: passes are lazy, so
    most of the memory is taken while it consumes them.
    """
    item, info = items[0], backbone.info
    plan = item.plan().to(backbone.device)
    views = view_boxes(images.shape[1], images.shape[2], settings, item.side, info.multiple)
    size = views[0].size
    batch = settings.batch_size or backbone.fitting_batch((size[0] // info.cell, size[1] // info.cell))

    def advance(count: int) -> None:
        on_encoded(count / len(views))

    if latents is None or settings.crops > 1:
        encoded = [encode(backbone, images, view, batch, advance) for view in views]
    else:
        encoded = [_fitted(latents, view, info.cell, backbone.device) for view in views]
        on_encoded(len(images))
    see = _way_of_seeing(backbone, plan, items, any_rows)

    def passes(part: slice) -> Passes:
        for view, latents in zip(views, encoded, strict=True):
            for draw in range(settings.draws):
                noise = seeded_noise(latents[part].shape, settings.seed + draw, latents.device)
                yield view, see(latents[part], noise)

    yield from in_batches(len(images), batch, lambda part: use(part, passes(part)))


def encode(
    backbone: Backbone, images: Tensor, view: View, batch: int, on_encoded: Callable[[int], None] = lambda _: None
) -> Tensor:
    """One view of all images, encoded in sub-batches: [B, C, h, w]."""
    top, left, height, width = view.box

    def one(part: slice) -> Tensor:
        crop = as_rgb(images[part, top : top + height, left : left + width].to("cpu"))
        crop = resize_image(crop, view.size).to(backbone.device)
        latents = backbone.encode_images(crop.flip(2) if view.flipped else crop)
        on_encoded(len(crop))
        return latents

    return torch.cat(list(in_batches(len(images), batch, one)))


def _fitted(latents: Tensor, view: View, cell: int, device: torch.device) -> Tensor:
    """Encoded images [B, C, h, w] of any size as a view of them that is the whole image."""
    size = (view.size[0] // cell, view.size[1] // cell)
    latents = latents.to(device, torch.float32)
    if latents.shape[2:] != size:
        latents = F.interpolate(latents, size, mode="bilinear", align_corners=False)
    return latents.flip(-1) if view.flipped else latents


def _way_of_seeing(
    backbone: Backbone, plan: Plan, items: Sequence[PartEmbeddings], any_rows: bool
) -> Callable[[Tensor, Tensor], Seen]:
    """The one pass that serves these embeddings best."""
    if isinstance(items[0].read_out, Official):
        return partial(_see_tokens, backbone, plan)
    # Rows that replace the context's own are read as keys like any others.
    rows = [offsets(item) for item in items]
    if any_rows or not isinstance(backbone, ScoresRows):
        return lambda latents, noise: backbone.observe(latents, plan, noise)
    return lambda latents, noise: backbone.score(latents, plan, noise, rows, [len(item.names) for item in items])


def offsets(item: PartEmbeddings) -> Tensor:
    """Rows [G, P, D] as offsets from the background's."""
    return item.rows - item.plan().condition["context"][0].float() if item.mode == CONTEXT else item.rows


def _see_tokens(backbone: Backbone, plan: Plan, latents: Tensor, noise: Tensor) -> Tokens:
    denoiser = text_conditioned(backbone, "The official read-out")
    context = Context.of(plan.condition)
    capture = capture_attention(denoiser, latents, plan.timestep, noise, context, plan.layers)
    cross = tuple(capture.cross[name] for name in plan.layers.read)
    return Tokens(cross, tuple(capture.self_[name] for name in plan.layers.propagate))


def keep(part: slice, passes: Passes) -> tuple[slice, tuple[tuple[View, Seen], ...]]:
    """For :class:`Look`: what a sub-batch shows, moved to the CPU."""
    return part, tuple((view, seen.to("cpu")) for view, seen in passes)


def read_maps(
    passes: Passes, items: Sequence[PartEmbeddings], size: tuple[int, int], read_one: ReadOne | None = None
) -> list[Tensor]:
    """Part maps [b, K, h, w] of images of ``size``, one for each of the embeddings: the mean over views and draws.

    ``read_one`` gives the maps of one view by the embeddings of an index; the embeddings' own read-out by default.
    """
    read_one = read_one or _read
    merged: list[Tensor] = []
    counts: list[Tensor] = []
    for view, seen in passes:
        maps = [read_one(seen, item, index) for index, item in enumerate(items)]
        found = [_counted(one, item) for one, item in zip(maps, items, strict=True)]
        placed = [_place(one, view, size) for one in maps]
        weights = [_place(one, view, size) for one in found]
        merged = [a + b for a, b in zip(merged, placed, strict=True)] if merged else placed
        counts = [a + b for a, b in zip(counts, weights, strict=True)] if counts else weights
    return [_normal(one / count.clamp(min=1e-6)) for one, count in zip(merged, counts, strict=True)]


def _read(seen: Seen, item: PartEmbeddings, index: int) -> Tensor:
    if isinstance(item.read_out, Official):
        if not isinstance(seen, Tokens):
            raise ValueError("the official read-out needs the tokens")
        grid = max((a.height, a.width) for a in (*seen.cross, *seen.attention))
        return official_maps(token_maps(seen.cross, len(item.names) + 1, grid), seen.attention)
    if isinstance(seen, Scores):
        propagated = seen.propagated[index] if seen.propagated else None
        return propagate_maps(seen.logits[index].softmax(1), seen.attention, item.read_out, propagated)
    if isinstance(seen, Tokens):
        raise ValueError("tokens are for the official read-out")
    return read(seen, offsets(item), item.read_out)


def _counted(maps: Tensor, item: PartEmbeddings) -> Tensor:
    """1 where a view counts; the official code divides every class by the crops in which it passed the gate."""
    if not isinstance(item.read_out, Official):
        return torch.ones_like(maps[:, :1])
    return (maps.amax((2, 3), keepdim=True) > 0).to(maps).expand_as(maps)


def _normal(maps: Tensor) -> Tensor:
    """Sum 1 over the classes; where no class has anything it is background."""
    total = maps.sum(1, keepdim=True)
    empty = torch.nn.functional.pad((total < 1e-6).to(maps), (0, 0, 0, 0, 0, maps.shape[1] - 1))
    return maps / total.clamp(min=1e-6) + empty


def view_boxes(height: int, width: int, settings: LookSettings, side: int, multiple: int) -> list[View]:
    """Every view of an image of this size."""
    boxes = crop_boxes(height, width, settings.crops, settings.overlap)
    mirrored = (False, True) if settings.flip else (False,)
    return [View(box, working_size(box[2], box[3], side, multiple), flipped) for box in boxes for flipped in mirrored]


def _place(maps: Tensor, view: View, size: tuple[int, int]) -> Tensor:
    """Maps of a crop on the whole image's canvas, zero outside; a crop that is the whole image stays small."""
    maps = maps.flip(-1) if view.flipped else maps
    top, left, height, width = view.box
    if (height, width) == size:
        return maps
    canvas = torch.zeros(*maps.shape[:2], *size, device=maps.device)
    canvas[:, :, top : top + height, left : left + width] = resize_maps(maps, (height, width))
    return canvas


def crop_boxes(height: int, width: int, count: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """``count`` x ``count`` boxes (top, left, height, width) that cover the image, neighbours sharing ``overlap``."""

    def spans(length: int) -> list[tuple[int, int]]:
        if count == 1:
            return [(0, length)]
        side = min(length, round(length / (count - (count - 1) * overlap)))
        return [(round(i * (length - side) / (count - 1)), side) for i in range(count)]

    return [(top, left, h, w) for top, h in spans(height) for left, w in spans(width)]
