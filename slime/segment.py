"""Segment images with learned part embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import in_batches
from .denoiser import Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import MIN_SIDE
from .features import check_finite
from .passes import Look, keep, look_at, pass_key, read_maps
from .read import calibrate
from .refine import refine_maps
from .settings import SegmentSettings
from .zoom import zoom_in

FULL_SIZE_VALUES = 2**25  # of probabilities refined at once: 128 MB, of which the filter takes a multiple


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
        groups.setdefault(pass_key(item), []).append(index)
    results: list[list[_Finished]] = [[] for _ in several]
    done = 0
    for indices in groups.values():
        items = [several[index] for index in indices]
        for part, found in _part_maps(denoiser, images, items, settings):
            pictures = images[part].to(denoiser.device)
            for index, maps in zip(indices, found, strict=True):
                results[index] += _finish_all(pictures, maps, several[index], settings, denoiser)
            done += len(pictures) * len(indices)
            if on_batch is not None:
                on_batch(done, len(images) * len(several))
    return [_join(batches, item) for batches, item in zip(results, several, strict=True)]


def look(
    denoiser: Denoiser, images: Tensor, embeddings: PartEmbeddings, settings: SegmentSettings | None = None
) -> Look:
    """The part of :func:`segment` that needs the UNet; :func:`read_look` does the rest, for any like embeddings.

    ``refine``, ``min_confidence`` and ``zoom`` of the settings do not count here.

    Raises:
        SlimeError: as :func:`segment`.
    """
    images = _check_images(images)
    embeddings.check_model(denoiser.family)
    item = embeddings.with_context(denoiser)
    batches = tuple(look_at(denoiser, images, [item], settings or SegmentSettings(), keep, any_rows=True))
    return Look(images, pass_key(item), batches)


def read_look(
    seen: Look, embeddings: PartEmbeddings, settings: SegmentSettings | None = None, device: torch.device | None = None
) -> PartMaps:
    """Parts from features at hand: no encoding, no UNet.

    Args:
        seen: from :func:`look`.
        embeddings: of the same kind: same context, layers, timestep and size.
        settings: ``refine`` and ``min_confidence`` count; ``zoom`` would need the UNet.
        device: where to compute; the CPU by default.

    Raises:
        SlimeError: embeddings of another kind than those the look was made for, or in the compact form.
    """
    if pass_key(embeddings) != seen.key:
        raise SlimeError(
            "These embeddings need another look at the image (another text, layers, timestep or model family than "
            "those it was made with). Make a look with them, or use SLiMe Segment."
        )
    settings = replace(settings or SegmentSettings(), zoom=0)
    size, device = (seen.images.shape[1], seen.images.shape[2]), device or torch.device("cpu")
    results: list[_Finished] = []
    for part, features in seen.batches:
        (maps,) = read_maps(((view, one.to(device)) for view, one in features), [embeddings], size)
        check_finite([maps])
        results += _finish_all(seen.images[part].to(device), maps, embeddings, settings)
    return _join(results, embeddings)


def _join(batches: Sequence[_Finished], item: PartEmbeddings) -> PartMaps:
    full, peaks = (torch.cat(kind) for kind in zip(*batches, strict=True))
    return PartMaps(full, item.names, item.palette, peaks, item.sureness)


def _part_maps(
    denoiser: Denoiser, images: Tensor, items: Sequence[PartEmbeddings], settings: SegmentSettings
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Sub-batches of part maps [b, K, h, w], one for each of the embeddings, which share every UNet pass."""
    size = (images.shape[1], images.shape[2])
    for part, found in look_at(
        denoiser, images, items, settings, lambda part, seen: (part, read_maps(seen, items, size))
    ):
        check_finite(found)
        yield part, found


class _Finished(NamedTuple):
    """Probabilities at full size [B, K, H, W] and the peaks of the parts [B, P]."""

    probabilities: Tensor
    peaks: Tensor


def _finish_all(
    pictures: Tensor,
    maps: Tensor,
    item: PartEmbeddings,
    settings: SegmentSettings,
    denoiser: Denoiser | None = None,
) -> Iterator[_Finished]:
    """:func:`_finish` for as many pictures at once as their size at full resolution allows."""
    values = maps.shape[1] * pictures.shape[1] * pictures.shape[2]
    size = min(max(1, FULL_SIZE_VALUES // values), len(pictures))
    yield from in_batches(
        len(pictures), size, lambda part: _finish(pictures[part], maps[part], item, settings, denoiser)
    )


def _finish(
    pictures: Tensor,
    maps: Tensor,
    item: PartEmbeddings,
    settings: SegmentSettings,
    denoiser: Denoiser | None = None,
) -> _Finished:
    """From part maps on the grid [B, K, h, w] to probabilities at the pictures' size, on the CPU."""
    peaks = maps[:, 1:].amax((2, 3))
    if settings.zoom and denoiser is not None and not item.read_out.official:

        def closer(crops: Tensor) -> Tensor:
            return torch.cat([found for _, (found,) in _part_maps(denoiser, crops, [item], settings)])

        images = zip(pictures, maps, strict=True)
        found = [zoom_in(closer, image, coarse, settings.zoom, settings.refine) for image, coarse in images]
        full, peaks = torch.stack([one.maps for one in found]), torch.stack([one.peaks for one in found])
    else:
        full = refine_maps(maps, pictures, settings.refine)
    present = peaks.mean(1) >= settings.min_confidence * item.sureness
    full = only_background(calibrate(full, item.read_out), ~present)
    return _Finished(full.float().cpu(), peaks.float().cpu())


def only_background(maps: Tensor, where: Tensor) -> Tensor:
    """Probabilities [B, K, H, W] that are all background in the images where ``where`` [B] is true."""
    empty = torch.zeros_like(maps)
    empty[:, 0] = 1
    return torch.where(where[:, None, None, None], empty, maps)


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
