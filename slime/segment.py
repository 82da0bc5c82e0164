"""Find learned parts in images: :func:`segment`, or its halves :func:`extract` and :func:`decode`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backbones.base import Backbone
from .batches import check_finite, in_batches
from .decode.closeups import Closeup, candidate_windows, choose_closeups, closeup_peaks, needs_closeups, window_images
from .decode.lazy_maps import LazyMaps
from .embeddings import LINEAR, PartEmbeddings
from .errors import SlimeError
from .extraction import Crop, EncodedImages, encode_crops, merge_passes
from .images import as_rgb, check_images
from .parts.maps import PartMaps
from .settings import SegmentSettings

OnBatch = Callable[[int, int], None]


class Segmenter:
    """A backbone with learned embeddings, ready to segment: ``segmenter(images)``.

    Args:
        backbone: of the kind the embeddings were learned on.
        embeddings: one set of parts.
        settings: see :class:`slime.settings.SegmentSettings`.

    Raises:
        SlimeError: embeddings of another kind of model.
    """

    def __init__(self, backbone: Backbone, embeddings: PartEmbeddings, settings: SegmentSettings | None = None) -> None:
        embeddings.check_model(backbone)
        self.backbone, self.settings = backbone, settings or SegmentSettings()
        self.embeddings = embeddings.completed(backbone)

    def __call__(self, images: Tensor) -> PartMaps:
        """Segment images [B, H, W, 3] in [0, 1] of any size and aspect; see :func:`segment`."""
        return segment(self.backbone, images, self.embeddings, self.settings)[0]


def segment(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings | Sequence[PartEmbeddings],
    settings: SegmentSettings | None = None,
    *,
    on_batch: OnBatch | None = None,
    latents: Tensor | None = None,
) -> list[PartMaps]:
    """Segment the trained parts in images.

    Embeddings of one :meth:`slime.PartEmbeddings.extraction_key` (every "instant" file of a model) share their passes.
    The result keeps a reference to the images, and small maps; see :class:`slime.parts.maps.PartMaps`.

    Args:
        backbone: the model.
        images: [B, H, W, 3] in [0, 1], any size and aspect.
        embeddings: one or several.
        settings: see :class:`slime.settings.SegmentSettings`.
        on_batch: called after every batch with the work done and the total: two units per image and embeddings, for
            encoding and for the pass. Close-ups add to the total while it runs.
        latents: [B, C, h, w], the images as the backbone encodes them, where they are at hand; saves the encoding.

    Returns:
        One PartMaps for each of the embeddings.

    Raises:
        SlimeError: bad images or latents, or embeddings of another kind of model.
    """
    settings = settings or SegmentSettings()
    several = _checked(backbone, images, embeddings, latents)
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(several):
        groups.setdefault(item.extraction_key(), []).append(index)
    progress = _Progress(on_batch, 2 * len(images) * len(several))
    results: dict[int, PartMaps] = {}
    for indices in groups.values():
        items = [several[index] for index in indices]
        all_maps = _maps_of(backbone, images, items, settings, latents, progress)
        for index, item, maps in zip(indices, items, all_maps, strict=True):
            closeups: list[list[Closeup]] = []
            if settings.closeups and item.mode == LINEAR:
                closeups = _closeups_of(backbone, images, maps, item, settings, progress)
            results[index] = _part_maps(images, maps, item, settings, backbone.device, closeups)
    return [results[index] for index in range(len(several))]


@dataclass(frozen=True)
class ExtractedImages:
    """Features of a batch of images, on the CPU: any embeddings of one key are decoded from them without a pass.

    Attributes:
        images: [B, H, W, 3], as they were given.
        key: see :meth:`slime.PartEmbeddings.extraction_key`.
        chunks: what every crop and noise sample of consecutive chunks of the batch gave.
    """

    images: Tensor
    key: str
    chunks: tuple[tuple[tuple[Crop, Any], ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the images and the features."""
        return self.images.nbytes + sum(one.nbytes for passes in self.chunks for _, one in passes)


def extract(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings,
    settings: SegmentSettings | None = None,
    *,
    on_batch: OnBatch | None = None,
    latents: Tensor | None = None,
) -> ExtractedImages:
    """Run the passes of :func:`segment` and keep their features, for :func:`decode`.

    Close-ups are left out: they need further passes that depend on the parts. Arguments and errors are those of
    :func:`segment`; of the settings only those of the passes count.
    """
    (item,) = _checked(backbone, images, embeddings, latents)
    progress = _Progress(on_batch, 2 * len(images))
    encoded = encode_crops(backbone, images, item, settings or SegmentSettings(), latents, progress.add)

    def run(chunk: slice) -> tuple[tuple[Crop, Any], ...]:
        passes = tuple((crop, one.to("cpu")) for crop, one in encoded.passes(chunk, [item], for_these=False))
        progress.add(len(images[chunk]))
        return passes

    return ExtractedImages(images, item.extraction_key(), tuple(in_batches(len(images), encoded.batch, run)))


def decode(
    extracted: ExtractedImages,
    embeddings: PartEmbeddings,
    settings: SegmentSettings | None = None,
    device: torch.device | None = None,
) -> PartMaps:
    """Decode parts from features at hand, without a pass.

    Args:
        extracted: from :func:`extract`.
        embeddings: of the same extraction key.
        settings: of the decoding.
        device: where to compute; the CPU by default.

    Raises:
        SlimeError: embeddings of another key, or in the compact form.
    """
    embeddings.extraction_spec()  # raises for the compact form
    if embeddings.extraction_key() != extracted.key:
        raise SlimeError(
            "These embeddings need other features of the image (another model family, text, layers or timestep). "
            "Extract features with them, or use segment()."
        )
    device = device or torch.device("cpu")
    size, kept = (extracted.images.shape[1], extracted.images.shape[2]), []
    for passes in extracted.chunks:
        (maps,) = merge_passes(((crop, one.to(device)) for crop, one in passes), [embeddings], size)
        check_finite([maps])
        kept.append(maps.cpu())
    return _part_maps(extracted.images, torch.cat(kept), embeddings, settings or SegmentSettings(), device, [])


class _Progress:
    """Counts work done and reports it."""

    def __init__(self, on_batch: OnBatch | None, total: int) -> None:
        self._on_batch, self._total, self._done = on_batch, total, 0.0

    def extend(self, count: int) -> None:
        """Announce further work."""
        self._total += count

    def add(self, count: float) -> None:
        self._done += count
        if self._on_batch is not None:
            self._on_batch(round(self._done), self._total)


def _checked(
    backbone: Backbone, images: Tensor, embeddings: PartEmbeddings | Sequence[PartEmbeddings], latents: Tensor | None
) -> list[PartEmbeddings]:
    """Return the embeddings, complete; raises SlimeError as :func:`segment`."""
    check_images(images)
    if latents is not None:
        _check_latents(latents, images, backbone)
    several = [embeddings] if isinstance(embeddings, PartEmbeddings) else list(embeddings)
    for item in several:
        item.check_model(backbone)
    return [item.completed(backbone) for item in several]


def _check_latents(latents: Tensor, images: Tensor, backbone: Backbone) -> None:
    if latents.ndim != 4 or latents.shape[1] != backbone.info.channels:
        raise SlimeError(
            f"Latents of shape {list(latents.shape)} do not fit the connected model, which takes "
            f"{backbone.info.channels} channels."
        )
    aspects = [tensor.shape[-1] / tensor.shape[-2] for tensor in (latents, images.movedim(-1, 1))]
    if len(latents) != len(images) or not 0.95 < aspects[0] / aspects[1] < 1.05:
        raise SlimeError(
            f"The {len(latents)} latents ({latents.shape[3]}x{latents.shape[2]} latent pixels) and {len(images)} images"
            f" ({images.shape[2]}x{images.shape[1]} pixels) differ in number or aspect. Connect the latent of these "
            "images."
        )
    if not torch.isfinite(latents).all():
        raise SlimeError("The latents contain NaN or infinity. Check the node that made them.")


def _maps_of(
    backbone: Backbone,
    images: Tensor,
    items: Sequence[PartEmbeddings],
    settings: SegmentSettings,
    latents: Tensor | None,
    progress: _Progress,
) -> list[Tensor]:
    """Return part maps [B, K, h, w] on the CPU for each of the embeddings, which share every pass."""
    size = (images.shape[1], images.shape[2])
    encoded: EncodedImages = encode_crops(
        backbone, images, items[0], settings, latents, lambda count: progress.add(count * len(items))
    )

    def run(chunk: slice) -> list[Tensor]:
        merged = merge_passes(encoded.passes(chunk, items), items, size)
        check_finite(merged)
        progress.add(len(images[chunk]) * len(items))
        return [maps.cpu() for maps in merged]

    chunks = list(in_batches(len(images), encoded.batch, run))
    return [torch.cat(maps) for maps in zip(*chunks, strict=True)]


def _closeups_of(
    backbone: Backbone,
    images: Tensor,
    maps: Tensor,
    item: PartEmbeddings,
    settings: SegmentSettings,
    progress: _Progress,
) -> list[list[Closeup]]:
    """Return the close-ups of every image; none for images whose coarse maps [B, K, h, w] are confident."""
    closeups: list[list[Closeup]] = []
    wanted = needs_closeups(maps[:, 1:].amax((2, 3)), item.example_confidence)
    for image, coarse, needed in zip(images, maps, wanted.tolist(), strict=True):
        windows = candidate_windows(coarse, (image.shape[0], image.shape[1]), settings.closeups) if needed else []
        if windows:
            progress.extend(2 * len(windows))
            crops = window_images(as_rgb(image), windows)
            (window_maps,) = _maps_of(backbone, crops, [item], settings, None, progress)
            closeups.append(choose_closeups(windows, window_maps, coarse, settings.closeups))
        else:
            closeups.append([])
    return closeups


def _part_maps(
    images: Tensor,
    maps: Tensor,
    item: PartEmbeddings,
    settings: SegmentSettings,
    device: torch.device,
    closeups: Sequence[Sequence[Closeup]],
) -> PartMaps:
    """Return the result for part maps [B, K, h, w] and close-ups, if any."""
    peaks = maps[:, 1:].amax((2, 3))
    if closeups:
        peaks = torch.stack([closeup_peaks(coarse, some) for coarse, some in zip(maps, closeups, strict=True)])
    present = peaks.mean(1) >= settings.min_confidence * item.example_confidence
    pixels = LazyMaps(images, maps.float(), present, settings.refine, item.decoder.temperature, device, closeups)
    return PartMaps(pixels, item.names, item.palette, peaks.float(), item.example_confidence)
