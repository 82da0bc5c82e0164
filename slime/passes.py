"""Look at images: encode them, run the UNet, keep the features. One look serves any number of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import join_background, resize_maps
from .augment import resize_image, working_size
from .batches import in_batches
from .denoiser import Denoiser, seeded_noise
from .embeddings import PartEmbeddings
from .features import Features, extract_features, extract_scores, key_projections
from .read import read, read_logits
from .settings import SegmentSettings

T = TypeVar("T")


class View(NamedTuple):
    """A crop of every image: its box, the size it is encoded at, and whether it is mirrored."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool


Seen = Iterator[tuple[View, Features]]


@dataclass(frozen=True)
class Look:
    """Features of a batch of images, on the CPU.

    Attributes:
        images: [B, H, W, 3] in [0, 1], CPU.
        key: what embeddings must agree on to be read from it, see :func:`pass_key`.
        batches: slices of the batch with the features of every view and noise draw.
    """

    images: Tensor
    key: tuple[object, ...]
    batches: tuple[tuple[slice, tuple[tuple[View, Features], ...]], ...]


def look_at(
    denoiser: Denoiser,
    images: Tensor,
    items: Sequence[PartEmbeddings],
    settings: SegmentSettings,
    use: Callable[[slice, Seen], T],
    any_rows: bool = False,
) -> Iterator[T]:
    """Results of ``use`` on the features of sub-batches of images [B, H, W, 3], for embeddings of one kind.

    The features hold the scores of these embeddings, or with ``any_rows`` what the scores of any others take too, for
    one more pass over a tiny latent.
    """
    item = items[0]
    plan = item.plan().to(denoiser.device)
    views = _views(images.shape[1], images.shape[2], settings, item.working_side)
    size = views[0].size
    batch = settings.batch_size or denoiser.fitting_batch((size[0] // 8, size[1] // 8))
    # All encoding comes first: on a small card VAE and UNet take turns in memory.
    latents = [
        torch.cat(list(in_batches(len(images), batch, partial(_encode, denoiser, images, view)))) for view in views
    ]
    general = any_rows or plan.keep_cross
    projections = (
        key_projections(denoiser, plan.layers, plan.context.pooled) if any_rows and not plan.keep_cross else {}
    )
    offsets = [one.rows - one.background for one in items]
    parts = [len(one.names) for one in items]

    def passes(part: slice) -> Seen:
        for view, encoded in zip(views, latents, strict=True):
            for draw in range(settings.draws):
                noise = seeded_noise(encoded[part].shape, settings.seed + draw, encoded.device)
                latent, size = encoded[part], view.size
                if general:
                    yield view, extract_features(denoiser, latent, plan, noise, size, projections)
                else:
                    yield view, extract_scores(denoiser, latent, plan, noise, size, offsets, parts)

    yield from in_batches(len(images), batch, lambda part: use(part, passes(part)))


def read_maps(seen: Seen, items: Sequence[PartEmbeddings], size: tuple[int, int]) -> list[Tensor]:
    """Part maps [b, K, h, w] of images of ``size``, one for each of the embeddings: the mean over views and draws."""
    merged: list[Tensor] = []
    counts: list[Tensor] = []
    for view, features in seen:
        maps = [_read(features, item, index) for index, item in enumerate(items)]
        found = [_counted(one, item) for one, item in zip(maps, items, strict=True)]
        placed = [_place(one, view, size) for one in maps]
        weights = [_place(one, view, size) for one in found]
        merged = [a + b for a, b in zip(merged, placed, strict=True)] if merged else placed
        counts = [a + b for a, b in zip(counts, weights, strict=True)] if counts else weights
    return [_normal(one / count.clamp(min=1e-6)) for one, count in zip(merged, counts, strict=True)]


def _counted(maps: Tensor, item: PartEmbeddings) -> Tensor:
    """1 where a view counts; the official code divides every class by the crops in which it passed the gate."""
    if not item.read_out.official:
        return torch.ones_like(maps[:, :1])
    return (maps.amax((2, 3), keepdim=True) > 0).to(maps).expand_as(maps)


def _normal(maps: Tensor) -> Tensor:
    """Sum 1 over the classes; where no class has anything it is background."""
    total = maps.sum(1, keepdim=True)
    empty = F.pad((total < 1e-6).to(maps), (0, 0, 0, 0, 0, maps.shape[1] - 1))
    return maps / total.clamp(min=1e-6) + empty


def keep(part: slice, seen: Seen) -> tuple[slice, tuple[tuple[View, Features], ...]]:
    """For :class:`Look`: the features of a sub-batch, moved to the CPU."""
    return part, tuple((view, features.to("cpu")) for view, features in seen)


def _read(features: Features, item: PartEmbeddings, index: int) -> Tensor:
    if features.logits:
        logits = join_background(features.logits[index], len(item.names))
        propagated = features.propagated[index] if features.propagated else None
        return read_logits(features, logits, item.read_out, propagated)
    rows = item.rows.to(features.device)
    return read(features, rows, item.background, len(item.names), item.read_out)


def _views(height: int, width: int, settings: SegmentSettings, side: int) -> list[View]:
    boxes = crop_boxes(height, width, settings.crops, settings.overlap)
    mirrored = (False, True) if settings.flip else (False,)
    return [View(box, working_size(box[2], box[3], side), flipped) for box in boxes for flipped in mirrored]


def _encode(denoiser: Denoiser, images: Tensor, view: View, part: slice) -> Tensor:
    """Latents of one view of a slice of the images."""
    top, left, height, width = view.box
    crop = resize_image(images[part, top : top + height, left : left + width], view.size).to(denoiser.device)
    return denoiser.encode_images(crop.flip(2) if view.flipped else crop)


def _place(maps: Tensor, view: View, size: tuple[int, int]) -> Tensor:
    """Maps of a crop on the whole image's canvas, zero outside; a crop that is the whole image stays small."""
    maps = maps.flip(-1) if view.flipped else maps
    top, left, height, width = view.box
    if (height, width) == size:
        return maps
    canvas = torch.zeros(*maps.shape[:2], *size, device=maps.device)
    canvas[:, :, top : top + height, left : left + width] = resize_maps(maps, (height, width))
    return canvas


def pass_key(item: PartEmbeddings) -> tuple[object, ...]:
    """What the features depend on: embeddings of equal keys are read from the same UNet pass."""
    plan = item.plan()
    return (
        plan.context.rows.numpy().tobytes(),
        plan.layers,
        plan.timestep,
        plan.grouping,
        plan.keep_cross,
        item.working_side,
    )


def crop_boxes(height: int, width: int, count: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """``count`` x ``count`` boxes (top, left, height, width) that cover the image, neighbours sharing ``overlap``."""

    def spans(length: int) -> list[tuple[int, int]]:
        if count == 1:
            return [(0, length)]
        side = min(length, round(length / (count - (count - 1) * overlap)))
        return [(round(i * (length - side) / (count - 1)), side) for i in range(count)]

    return [(top, left, h, w) for top, h in spans(height) for left, w in spans(width)]
