"""Find learned parts in images: :class:`Segmenter`, and :func:`segment` as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .backbones.base import Backbone
from .batches import check_finite
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .images import as_rgb, check_images
from .parts.maps import PartMaps
from .read_out import Official, Propagated
from .reading.finish import Finished
from .reading.look import Look, Passes, keep, look_at, read_maps
from .reading.zoom import Seen, look_closer, peaks, unsure
from .settings import LookSettings, ReadSettings, SegmentSettings

OnBatch = Callable[[int, int], None]


class Segmenter:
    """A backbone with learned embeddings, ready to segment: ``segmenter(images)``, or look once and read often.

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

    def __call__(self, images: Tensor, on_batch: OnBatch | None = None, latents: Tensor | None = None) -> PartMaps:
        """Part maps of images [B, H, W, 3] in [0, 1], any size and aspect; see :func:`segment`."""
        return segment(self.backbone, images, self.embeddings, self.settings, on_batch=on_batch, latents=latents)[0]

    def look(self, images: Tensor) -> Look:
        """The part that needs the model; :meth:`read` does the rest. Zoom, which is a second look, does not count."""
        return look(self.backbone, images, self.embeddings, self.settings)

    def read(self, seen: Look) -> PartMaps:
        """Parts from a look at hand: no encoding, no pass."""
        return read_look(seen, self.embeddings, self.settings, self.backbone.device)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[PartMaps]:
        """Part maps of any number of batches [B, H, W, 3], one after the other, in the memory of one."""
        for images in batches:
            yield self(images)


def segment(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings | Sequence[PartEmbeddings],
    settings: SegmentSettings | None = None,
    *,
    on_batch: OnBatch | None = None,
    latents: Tensor | None = None,
) -> list[PartMaps]:
    """Find the learned parts in images.

    Embeddings that share condition, layers, timestep and size (every "instant" file of a model does) share one pass.
    Part maps keep a reference to the images, and small maps; see :class:`slime.parts.maps.PartMaps`.

    Args:
        backbone: the model.
        images: [B, H, W, 3] in [0, 1], any size and aspect.
        embeddings: one or several.
        settings: see :class:`slime.settings.SegmentSettings`.
        on_batch: called after every sub-batch with what is done and with all there is to do: two for each image and
            embeddings, encoding and looking.
        latents: [B, C, h, w], the images as the backbone encodes them, where they are at hand: saves the encoding.

    Returns:
        One PartMaps for every embeddings.

    Raises:
        SlimeError: bad images or latents, or embeddings of another kind of model.
    """
    settings = settings or SegmentSettings()
    check_images(images)
    _check_latents(latents, images, backbone)
    several = [embeddings] if isinstance(embeddings, PartEmbeddings) else list(embeddings)
    for item in several:
        item.check_model(backbone)
    several = [item.completed(backbone) for item in several]
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(several):
        groups.setdefault(item.pass_digest(), []).append(index)
    results: dict[int, PartMaps] = {}
    done, total = 0.0, 2 * len(images) * len(several)

    def advance(images_done: float) -> None:
        nonlocal done
        done += images_done
        if on_batch is not None:
            on_batch(round(done), total)

    for indices in groups.values():
        items = [several[index] for index in indices]
        maps: list[list[Tensor]] = [[] for _ in items]
        done_encoding = partial(lambda count, n: advance(n * count), len(items))
        for part, found in _part_maps(backbone, images, items, settings, done_encoding, latents):
            for kept, one in zip(maps, found, strict=True):
                kept.append(one.cpu())
            advance(len(images[part]) * len(items))
        for index, item, kept in zip(indices, items, maps, strict=True):
            results[index] = _finished(images, torch.cat(kept), item, settings, backbone.device, backbone)
    return [results[index] for index in range(len(several))]


def look(
    backbone: Backbone,
    images: Tensor,
    embeddings: PartEmbeddings,
    settings: LookSettings | None = None,
    latents: Tensor | None = None,
    previous: Look | None = None,
) -> Look:
    """The part of :func:`segment` that needs the model; :func:`read_look` does the rest, for any like embeddings.

    With ``previous``, a look at the same images, the result serves the embeddings of both; where that one serves these
    already nothing is looked at again.

    Raises:
        SlimeError: as :func:`segment`, and where ``previous`` has other images.
    """
    check_images(images)
    _check_latents(latents, images, backbone)
    embeddings.check_model(backbone)
    item = embeddings.completed(backbone)
    settings, digest = settings or LookSettings(), item.pass_digest()
    if previous is not None:
        if previous.images.shape != images.shape or not torch.equal(previous.images, images):
            raise SlimeError("The previous look is at other images. Connect the same image to both.")
        found = previous.find(digest)
        if found is not None and found.settings == settings:
            return previous
    batches = tuple(look_at(backbone, images, [item], settings, keep, any_rows=True, latents=latents))
    return Look(images, digest, settings, batches, previous)


def read_look(
    seen: Look, embeddings: PartEmbeddings, settings: ReadSettings | None = None, device: torch.device | None = None
) -> PartMaps:
    """Parts from a look at hand: no encoding, no pass.

    Args:
        seen: from :func:`look`; of several in a row the one for these embeddings counts.
        embeddings: of the same kind: same condition, layers, timestep and size.
        settings: how to read.
        device: where to compute; the CPU by default.

    Raises:
        SlimeError: embeddings of another kind than those the look was made for, or in the compact form.
    """
    if embeddings.condition is None:
        embeddings.plan()  # says what is missing
    look_of_these = seen.find(embeddings.pass_digest())
    if look_of_these is None:
        raise SlimeError(
            "These embeddings need another look at the image (another text, layers, timestep or model family than "
            "those it was made with). Make a look with them too (its previous takes this one), or use SLiMe Segment."
        )
    device = device or torch.device("cpu")
    size, kept = (seen.images.shape[1], seen.images.shape[2]), []
    for _, observed in look_of_these.batches:
        (maps,) = read_maps(((view, one.to(device)) for view, one in observed), [embeddings], size)
        check_finite([maps])
        kept.append(maps.cpu())
    return _finished(seen.images, torch.cat(kept), embeddings, settings or ReadSettings(), device)


def at_size(maps: PartMaps, index: int, image: Tensor) -> PartMaps:
    """The part maps of one image of a batch, finished along the edges of ``image`` [H, W, 3], which is the same at
    another size: images of unlike sizes can share a pass."""
    pixels, part = _unfinished(maps), slice(index, index + 1)
    pixels = replace(pixels, images=image[None], maps=pixels.maps[part], present=pixels.present[part])
    return replace(maps, pixels=pixels, peaks=maps.peaks[part])


def maps_of(maps: PartMaps) -> Tensor:
    """The probabilities [B, K, h, w] on the grid that they were read on."""
    return _unfinished(maps).maps


def _unfinished(maps: PartMaps) -> Finished:
    if not isinstance(maps.pixels, Finished) or maps.pixels.closer:
        raise ValueError("pixels at full size are all there is")
    return maps.pixels


def _check_latents(latents: Tensor | None, images: Tensor, backbone: Backbone) -> None:
    if latents is None:
        return
    if latents.ndim != 4 or latents.shape[1] != backbone.info.channels:
        raise SlimeError(
            f"Latents of shape {list(latents.shape)} are not of the connected model, which takes "
            f"{backbone.info.channels} channels."
        )
    aspects = [tensor.shape[-1] / tensor.shape[-2] for tensor in (latents, images.movedim(-1, 1))]
    if len(latents) != len(images) or not 0.95 < aspects[0] / aspects[1] < 1.05:
        raise SlimeError(
            f"The {len(latents)} latents ({latents.shape[3]}x{latents.shape[2]} cells) and {len(images)} images "
            f"({images.shape[2]}x{images.shape[1]}) do not show the same."
        )
    check_finite([latents])


def _part_maps(
    backbone: Backbone,
    images: Tensor,
    items: Sequence[PartEmbeddings],
    settings: LookSettings,
    on_encoded: Callable[[float], None] = lambda _: None,
    latents: Tensor | None = None,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Sub-batches of part maps [b, K, h, w], one for each of the embeddings, which share every pass."""
    size = (images.shape[1], images.shape[2])

    def consume(part: slice, passes: Passes) -> tuple[slice, list[Tensor]]:
        return part, read_maps(passes, items, size)

    for part, found in look_at(backbone, images, items, settings, consume, on_encoded=on_encoded, latents=latents):
        check_finite(found)
        yield part, found


def _finished(
    images: Tensor,
    maps: Tensor,
    item: PartEmbeddings,
    settings: ReadSettings,
    device: torch.device,
    backbone: Backbone | None = None,
) -> PartMaps:
    """Part maps [B, K, h, w] with what finishes them; closer looks need the backbone."""
    highest, closer = maps[:, 1:].amax((2, 3)), []
    if backbone is not None and isinstance(settings, SegmentSettings) and settings.zoom:
        if isinstance(item.read_out, Propagated):
            wanted = unsure(highest, item.sureness)
            closer = _closer_looks(backbone, images, maps, wanted, item, settings)
            highest = torch.stack([peaks(one, seen) for one, seen in zip(maps, closer, strict=True)])
    present = highest.mean(1) >= settings.min_confidence * item.sureness
    exponent = 1.0 if isinstance(item.read_out, Official) else item.read_out.sharpen
    pixels = Finished(images, maps.float(), present, settings.refine, exponent, device, closer)
    return PartMaps(pixels, item.names, item.palette, highest.float(), item.sureness)


def _closer_looks(
    backbone: Backbone, images: Tensor, maps: Tensor, wanted: Tensor, item: PartEmbeddings, settings: SegmentSettings
) -> list[list[Seen]]:
    """Of every image what closer looks showed; none for those that are not wanted, [B]."""

    def closer(crops: Tensor) -> Tensor:
        return torch.cat([found.cpu() for _, (found,) in _part_maps(backbone, crops, [item], settings)])

    look_at_one = partial(look_closer, closer, objects=settings.zoom)
    return [
        look_at_one(as_rgb(image), coarse=one) if want else []
        for image, one, want in zip(images, maps, wanted.tolist(), strict=True)
    ]
