"""Segment images with learned part embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import resize_maps
from .augment import resize_image, working_size
from .batches import in_batches
from .denoiser import Denoiser, seeded_noise
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import MIN_SIDE
from .features import Features, check_finite, extract_features, key_projections
from .read import calibrate, read
from .refine import refine_maps
from .settings import SegmentSettings
from .zoom import zoom_in


@dataclass(frozen=True)
class PartMaps:
    """Result of segmentation.

    Attributes:
        probabilities: float32 [B, K, H, W] at the images' size, CPU, summing to 1 over K; class 0 is the background.
        names: part names, class k is ``names[k - 1]``.
        palette: one RGB colour a part.
        peaks: float32 [B, P], highest value of every part's map in every image, before refinement.
        sureness: what ``peaks`` average to on the examples, 0 where unknown.
    """

    probabilities: Tensor
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    peaks: Tensor
    sureness: float = 0.0

    @property
    def confidence(self) -> Tensor:
        """float32 [B]: how sure the parts are on average, relative to the examples (1: as sure as there)."""
        return self.peaks.mean(1) / (self.sureness or 1.0)

    @property
    def label_map(self) -> Tensor:
        """int64 [B, H, W]: the most probable class of every pixel."""
        return self.probabilities.argmax(1)


def segment(
    denoiser: Denoiser,
    images: Tensor,
    embeddings: PartEmbeddings | Sequence[PartEmbeddings],
    settings: SegmentSettings | None = None,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[PartMaps]:
    """Find the learned parts in images.

    Embeddings that share context, layers, timestep and size (every "instant" file of a model does) share one UNet pass.

    Args:
        denoiser: the diffusion model.
        images: [B, H, W, 3] in [0, 1], any size and aspect.
        embeddings: one or several.
        settings: see :class:`slime.settings.SegmentSettings`.
        on_batch: called after every sub-batch with the number of images done and of all.

    Returns:
        One PartMaps for every embeddings.

    Raises:
        SlimeError: bad images, or embeddings of another kind of model.
    """
    settings = settings or SegmentSettings()
    images = _check_images(images)
    several = [embeddings] if isinstance(embeddings, PartEmbeddings) else list(embeddings)
    for item in several:
        item.check_model(denoiser.family)
    several = [item.with_context(denoiser) for item in several]
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, item in enumerate(several):
        groups.setdefault(_pass_key(item), []).append(index)
    results: list[list[_Finished]] = [[] for _ in several]
    done = 0
    for indices in groups.values():
        items = [several[index] for index in indices]
        for part, found in _look(denoiser, images, items, settings):
            check_finite(found)
            pictures = images[part].to(denoiser.device)
            for index, maps in zip(indices, found, strict=True):
                full, peaks = _finish(denoiser, pictures, maps, several[index], settings)
                results[index].append(_Finished(full.float().cpu(), peaks.float().cpu()))
            done += len(pictures) * len(indices)
            if on_batch is not None:
                on_batch(done, len(images) * len(several))
    joined = []
    for batches, item in zip(results, several, strict=True):
        full, peaks = (torch.cat(kind) for kind in zip(*batches, strict=True))
        joined.append(PartMaps(full, item.names, item.palette, peaks, item.sureness))
    return joined


class _Finished(NamedTuple):
    """Probabilities at full size [B, K, H, W] and the peaks of the parts [B, P]."""

    probabilities: Tensor
    peaks: Tensor


def _finish(
    denoiser: Denoiser, pictures: Tensor, maps: Tensor, item: PartEmbeddings, settings: SegmentSettings
) -> _Finished:
    """From part maps on the grid [B, K, h, w] to probabilities at the pictures' size."""
    peaks = maps[:, 1:].amax((2, 3))
    if settings.zoom and not item.read_out.official:

        def look(crops: Tensor) -> Tensor:
            return torch.cat([found for _, (found,) in _look(denoiser, crops, [item], settings)])

        images = zip(pictures, maps, strict=True)
        found = [zoom_in(look, image, coarse, settings.zoom, settings.refine) for image, coarse in images]
        full, peaks = torch.stack([one.maps for one in found]), torch.stack([one.peaks for one in found])
    else:
        full = refine_maps(maps, pictures, settings.refine)
    present = peaks.mean(1) >= settings.min_confidence * item.sureness
    return _Finished(only_background(calibrate(full, item.read_out), ~present), peaks)


def only_background(maps: Tensor, where: Tensor) -> Tensor:
    """Probabilities [B, K, H, W] that are all background in the images where ``where`` [B] is true."""
    empty = torch.zeros_like(maps)
    empty[:, 0] = 1
    return torch.where(where[:, None, None, None], empty, maps)


def _look(
    denoiser: Denoiser, images: Tensor, items: Sequence[PartEmbeddings], settings: SegmentSettings
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Sub-batches of part maps [b, K, h, w], one for each of the embeddings, which share every UNet pass."""
    plan, side = items[0].plan(), items[0].working_side
    views = _views(images.shape[1], images.shape[2], settings, side)
    # All encoding comes first: on a small card VAE and UNet take turns in memory.
    size = views[0].size
    batch = settings.batch_size or denoiser.fitting_batch((size[0] // 8, size[1] // 8))
    latents = [
        torch.cat(list(in_batches(len(images), batch, partial(_encode, denoiser, images, view)))) for view in views
    ]
    projections = {} if plan.keep_cross else key_projections(denoiser, plan.layers, plan.context.pooled)

    def find(part: slice) -> tuple[slice, list[Tensor]]:
        merged: list[Tensor] = []
        for view, encoded in zip(views, latents, strict=True):
            for draw in range(settings.draws):
                noise = seeded_noise(encoded[part].shape, settings.seed + draw, encoded.device)
                features = extract_features(denoiser, encoded[part], plan, noise, view.size, projections)
                maps = [_place(_read(features, item), view, images) for item in items]
                merged = [old + new for old, new in zip(merged, maps, strict=True)] if merged else maps
        return part, [maps / maps.sum(1, keepdim=True).clamp(min=1e-6) for maps in merged]

    yield from in_batches(len(images), batch, find)


class _View(NamedTuple):
    """A crop of every image: its box, the size it is encoded at, and whether it is mirrored."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool


def _views(height: int, width: int, settings: SegmentSettings, side: int) -> list[_View]:
    boxes = crop_boxes(height, width, settings.crops, settings.overlap)
    mirrored = (False, True) if settings.flip else (False,)
    return [_View(box, working_size(box[2], box[3], side), flipped) for box in boxes for flipped in mirrored]


def _encode(denoiser: Denoiser, images: Tensor, view: _View, part: slice) -> Tensor:
    """Latents of one view of a slice of the images."""
    top, left, height, width = view.box
    crop = resize_image(images[part, top : top + height, left : left + width], view.size).to(denoiser.device)
    return denoiser.encode_images(crop.flip(2) if view.flipped else crop)


def _read(features: Features, item: PartEmbeddings) -> Tensor:
    rows = item.rows.to(features.device)
    return read(features, rows, item.background, len(item.names), item.read_out)


def _place(maps: Tensor, view: _View, images: Tensor) -> Tensor:
    """Maps of a crop on the whole image's canvas, zero outside; a crop that is the whole image stays small."""
    maps = maps.flip(-1) if view.flipped else maps
    top, left, height, width = view.box
    if (height, width) == tuple(images.shape[1:3]):
        return maps
    canvas = torch.zeros(*maps.shape[:2], *images.shape[1:3], device=maps.device)
    canvas[:, :, top : top + height, left : left + width] = resize_maps(maps, (height, width))
    return canvas


def _pass_key(item: PartEmbeddings) -> tuple[object, ...]:
    plan = item.plan()
    return (
        plan.context.rows.numpy().tobytes(),
        plan.layers,
        plan.timestep,
        plan.per_layer,
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


def _check_images(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or len(images) == 0:
        raise SlimeError(f"Images must be [B, H, W, 3]; got {list(images.shape)}.")
    if min(images.shape[1:3]) < MIN_SIDE:
        raise SlimeError(
            f"The images are {images.shape[2]}x{images.shape[1]} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed."
        )
    images = images.detach().to("cpu", torch.float32)
    images = images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images[..., :3]
    if not torch.isfinite(images).all():
        raise SlimeError("The images hold NaN or infinite values; look for the node that made them.")
    return images.clamp(0, 1)
