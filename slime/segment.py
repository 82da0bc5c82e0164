"""Segment images with learned part embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import resize_maps
from .augment import resize_image, working_size
from .denoiser import Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import MIN_SIDE
from .features import Features, extract_features, key_projections
from .read import read
from .refine import refine_maps
from .settings import SegmentSettings


@dataclass(frozen=True)
class PartMaps:
    """Result of segmentation.

    Attributes:
        probabilities: float32 [B, K, H, W] at the images' size, CPU, summing to 1 over K; class 0 is the background.
        names: part names, class k is ``names[k - 1]``.
        palette: one RGB colour a part.
    """

    probabilities: Tensor
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

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
        on_batch: called after every UNet pass with the number done and the number of all.

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
    boxes = crop_boxes(images.shape[1], images.shape[2], settings.crops, settings.overlap)
    per_image = len(boxes) * (2 if settings.flip else 1)
    done, total = 0, per_image * -(-len(images) // settings.batch_size) * len(groups)
    results: list[list[Tensor]] = [[] for _ in several]
    for indices in groups.values():
        lead = several[indices[0]]
        latents = [
            _encode(denoiser, batch, boxes, lead.working_side, settings.flip)
            for batch in images.split(settings.batch_size)
        ]
        plan = lead.plan()
        projections = key_projections(denoiser, plan.layers, plan.context.pooled)
        for batch, views in zip(images.split(settings.batch_size), latents, strict=True):
            merged: list[Tensor] = []
            for view in views:
                features = extract_features(denoiser, view.latents, plan, settings.seed, view.size, projections)
                maps = [_place(_read(features, several[index]), view, batch) / len(views) for index in indices]
                merged = [old + new for old, new in zip(merged, maps, strict=True)] if merged else maps
                done += 1
                if on_batch is not None:
                    on_batch(done, total)
            for index, summed in zip(indices, merged, strict=True):
                normal = summed / summed.sum(1, keepdim=True).clamp(min=1e-6)
                results[index].append(refine_maps(normal, batch.to(normal.device), settings.refine).float().cpu())
    return [PartMaps(torch.cat(maps), item.names, item.palette) for maps, item in zip(results, several, strict=True)]


class _View(NamedTuple):
    """Encoded crop of a batch: its box in the image, the size it was encoded at, and whether it was mirrored."""

    latents: Tensor
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool


def _encode(
    denoiser: Denoiser, batch: Tensor, boxes: Sequence[tuple[int, int, int, int]], side: int, flip: bool
) -> list[_View]:
    """Latents of every crop (and its mirror image); all encoding precedes the UNet, which may push the VAE out."""
    views = []
    for box in boxes:
        top, left, height, width = box
        size = working_size(height, width, side)
        crop = resize_image(batch[:, top : top + height, left : left + width], size).to(denoiser.device)
        views.append(_View(denoiser.encode_images(crop), box, size, False))
        if flip:
            views.append(_View(denoiser.encode_images(crop.flip(2)), box, size, True))
    return views


def _read(features: Features, item: PartEmbeddings) -> Tensor:
    return read(features, item.rows.to(features.scores[0].device), item.background, item.read_out)


def _place(maps: Tensor, view: _View, batch: Tensor) -> Tensor:
    """Maps of a crop on the whole image's canvas, zero outside; a crop that is the whole image stays small."""
    maps = maps.flip(-1) if view.flipped else maps
    top, left, height, width = view.box
    if (height, width) == tuple(batch.shape[1:3]):
        return maps
    canvas = torch.zeros(*maps.shape[:2], *batch.shape[1:3], device=maps.device)
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
