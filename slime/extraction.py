"""Extract features of images: encode crops, run passes over batches of them, and merge the maps decoded from each.

Encoding comes first, for all images: on a small card the VAE and the UNet take turns in memory. One pass serves any
number of embeddings of the same :meth:`slime.PartEmbeddings.extraction_key`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbones.base import Backbone, ExtractionSpec, seeded_noise
from .batches import in_batches
from .embeddings import PartEmbeddings
from .images import as_rgb, resize_image, resize_maps, working_size
from .settings import SegmentSettings

CROP_OVERLAP = 0.25  # share of a crop's side that neighbours share


class Crop(NamedTuple):
    """A crop of every image: (top, left, height, width), the size it is encoded at, and whether it is mirrored."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool


@dataclass(frozen=True)
class EncodedImages:
    """Crops of a batch of images, encoded, with what their passes need.

    Attributes:
        backbone: the model.
        crops: latents [B, C, h, w] by crop.
        spec: what a pass extracts, on the model's device.
        settings: of the extraction.
        batch: images per pass.
    """

    backbone: Backbone
    crops: dict[Crop, Tensor]
    spec: ExtractionSpec
    settings: SegmentSettings
    batch: int

    def passes(
        self, chunk: slice, embeddings: Sequence[PartEmbeddings], for_these: bool = True
    ) -> Iterator[tuple[Crop, Any]]:
        """Yield what every crop and noise sample of a chunk of the batch gives, one pass each.

        With ``for_these`` a pass may compute what serves these embeddings alone, else any of the same spec.
        """
        decoder = embeddings[0].decoder
        for crop, latents in self.crops.items():
            for sample in range(self.settings.noise_samples):
                noise = seeded_noise(latents[chunk].shape, self.settings.seed + sample, latents.device)
                wanted = embeddings if for_these else None
                yield crop, decoder.extract(self.backbone, latents[chunk], self.spec, noise, wanted)


def encode_crops(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings,
    settings: SegmentSettings,
    latents: Tensor | None = None,
    on_encoded: Callable[[float], None] = lambda _: None,
) -> EncodedImages:
    """Encode all crops of images [B, H, W, 3].

    Args:
        backbone: the model.
        images: in [0, 1], any size.
        embeddings: give the spec and the size.
        settings: of the extraction.
        latents: [B, C, h, w], the encoded images at any size; crops are encoded from the images all the same.
        on_encoded: called after every batch with the number of images encoded; one of n crops counts 1/n.
    """
    info, spec = backbone.info, embeddings.extraction_spec().to(backbone.device)
    crops = all_crops(images.shape[1], images.shape[2], settings, embeddings.side, info.multiple)
    height, width = crops[0].size
    batch = settings.batch_size or backbone.fitting_batch((height // info.cell, width // info.cell))
    encoded: dict[Crop, Tensor] = {}
    for crop in crops:
        if latents is None or settings.tiles > 1:
            encoded[crop] = _encode(backbone, images, crop, batch, lambda count: on_encoded(count / len(crops)))
        else:
            encoded[crop] = _fit_latents(latents, crop, info.cell, backbone.device)
            on_encoded(len(images) / len(crops))
    return EncodedImages(backbone, encoded, spec, settings, batch)


def _encode(backbone: Backbone, images: Tensor, crop: Crop, batch: int, on_encoded: Callable[[int], None]) -> Tensor:
    """Encode one crop of all images: [B, C, h, w]."""
    top, left, height, width = crop.box

    def encode(chunk: slice) -> Tensor:
        pixels = as_rgb(images[chunk, top : top + height, left : left + width].to("cpu"))
        pixels = resize_image(pixels, crop.size).to(backbone.device)
        latents = backbone.encode_images(pixels.flip(2) if crop.flipped else pixels)
        on_encoded(len(pixels))
        return latents

    return torch.cat(list(in_batches(len(images), batch, encode)))


def _fit_latents(latents: Tensor, crop: Crop, cell: int, device: torch.device) -> Tensor:
    """Resize latents [B, C, h, w] of whole images to the size of a crop that is the whole image."""
    size = (crop.size[0] // cell, crop.size[1] // cell)
    latents = latents.to(device, torch.float32)
    if latents.shape[2:] != size:
        latents = F.interpolate(latents, size, mode="bilinear", align_corners=False)
    return latents.flip(-1) if crop.flipped else latents


def merge_passes(
    passes: Iterator[tuple[Crop, Any]], embeddings: Sequence[PartEmbeddings], size: tuple[int, int]
) -> list[Tensor]:
    """Decode every pass for every embeddings, and average over crops and noise samples.

    Args:
        passes: of :meth:`EncodedImages.passes`; lazy, so that one pass is in memory at a time.
        embeddings: of one extraction key.
        size: height and width of the images.

    Returns:
        Part maps [B, K, h, w] for each of the embeddings.
    """
    sums: list[Any] = [0.0] * len(embeddings)
    weights: list[Any] = [0.0] * len(embeddings)
    for crop, extracted in passes:
        for index, item in enumerate(embeddings):
            maps = item.decoder.decode(extracted, item, index)
            sums[index] = sums[index] + _place(maps, crop, size)
            weights[index] = weights[index] + _place(item.decoder.weights(maps), crop, size)
    return [_normalized(total / weight.clamp(min=1e-6)) for total, weight in zip(sums, weights, strict=True)]


def _normalized(maps: Tensor) -> Tensor:
    """Make maps [B, K, h, w] sum to 1 over the classes; where all are 0 it is background."""
    total = maps.sum(1, keepdim=True)
    empty = F.pad((total < 1e-6).to(maps), (0, 0, 0, 0, 0, maps.shape[1] - 1))
    return maps / total.clamp(min=1e-6) + empty


def _place(maps: Tensor, crop: Crop, size: tuple[int, int]) -> Tensor:
    """Place maps of a crop on the whole image's canvas, zero outside; those of the whole image stay small."""
    maps = maps.flip(-1) if crop.flipped else maps
    top, left, height, width = crop.box
    if (height, width) == size:
        return maps
    canvas = torch.zeros(*maps.shape[:2], *size, device=maps.device)
    canvas[:, :, top : top + height, left : left + width] = resize_maps(maps, (height, width))
    return canvas


def all_crops(height: int, width: int, settings: SegmentSettings, side: int, multiple: int) -> list[Crop]:
    """Return every crop of an image of this size."""
    boxes = crop_boxes(height, width, settings.tiles, CROP_OVERLAP)
    mirrored = (False, True) if settings.average_flip else (False,)
    return [Crop(box, working_size(box[2], box[3], side, multiple), flipped) for box in boxes for flipped in mirrored]


def crop_boxes(height: int, width: int, count: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Return ``count`` x ``count`` boxes (top, left, height, width) that cover an image, neighbours overlapping.

    Args:
        height, width: of the image in pixels.
        count: boxes per side.
        overlap: share of a box's side that neighbours share.
    """

    def spans(length: int) -> list[tuple[int, int]]:
        if count == 1:
            return [(0, length)]
        side = min(length, round(length / (count - (count - 1) * overlap)))
        return [(round(i * (length - side) / (count - 1)), side) for i in range(count)]

    return [(top, left, h, w) for top, h in spans(height) for left, w in spans(width)]
