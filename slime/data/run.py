"""Segment many images: loading, passes and writing overlap, memory is bounded, and finished images stay finished."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..decode.lazy_maps import LazyMaps
from ..errors import SlimeError
from ..images import check_images, resize_image, working_size
from ..segment import Segmenter
from .file_names import leads_outside
from .formats import Format
from .pixels import decode
from .records import Record, record_of
from .run_log import RunLog
from .sources import SourceImage

logger = logging.getLogger(__name__)
HELD = 4  # batches whose images are in memory: being loaded, passed, or written


@dataclass(frozen=True)
class Loaded:
    """Pixels of an image, uint8 [H, W, 3], and the same at the working size of the model, float [h, w, 3]."""

    name: str
    pixels: np.ndarray
    small: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.small.shape[:2])

    def image(self) -> Tensor:
        """Return float [H, W, 3] in [0, 1]."""
        return torch.from_numpy(self.pixels).float().div_(255)


@dataclass(frozen=True)
class SegmentedImage:
    """A segmented image: its record, and its label map uint8 [H, W]."""

    record: Record
    labels: np.ndarray


class Engine:
    """A segmenter for images of any size: those of one working size share a pass.

    Args:
        segmenter: with settings that look at whole images; zoom and crops are refused.
        batch: images of one pass; 0 asks the backbone.
    """

    def __init__(self, segmenter: Segmenter, batch: int = 0) -> None:
        if segmenter.settings.zoom or segmenter.settings.crops > 1:
            raise SlimeError("Zoom and crops are not for large sets: segment such images with slime.segment.")
        self.segmenter, self._batch = segmenter, batch

    def load(self, name: str, data: bytes) -> Loaded:
        """Decode an image; raise SlimeError for bytes that are none."""
        return self.prepare(name, decode(data))

    def prepare(self, name: str, pixels: np.ndarray) -> Loaded:
        """Prepare pixels uint8 [H, W, 3] for :meth:`segment`."""
        whole = torch.from_numpy(pixels)[None].float().div_(255)
        check_images(whole)
        info, side = self.segmenter.backbone.info, self.segmenter.embeddings.side
        size = working_size(pixels.shape[0], pixels.shape[1], side, info.multiple)
        return Loaded(name, pixels, resize_image(whole, size)[0])

    def batch(self, size: tuple[int, ...]) -> int:
        """Return how many images of a working size share a pass."""
        cell = self.segmenter.backbone.info.cell
        return self._batch or self.segmenter.backbone.fitting_batch((size[0] // cell, size[1] // cell))

    @torch.inference_mode()
    def segment(self, loaded: list[Loaded]) -> list[Callable[[], SegmentedImage]]:
        """Run one pass over images of one working size; the callables finish them at full size, in any thread."""
        maps = self.segmenter(torch.stack([image.small for image in loaded]))
        assert isinstance(maps.pixels, LazyMaps)
        pixels = maps.pixels

        def finish(index: int) -> SegmentedImage:
            with torch.inference_mode():
                labels = pixels.for_image(index, loaded[index].image()).labels(slice(0, 1))[0].numpy()
            confidence = float(maps.confidence[index])
            return SegmentedImage(record_of(loaded[index].name, labels, pixels.maps[index], confidence), labels)

        return [partial(finish, index) for index in range(len(loaded))]


def segment_images(
    engine: Engine,
    source: Iterable[SourceImage],
    outputs: Sequence[Format],
    run_log: RunLog,
    workers: int = 2,
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Segment the images that are not done yet, and write the results.

    Args:
        source: images, each with a name of its own.
        outputs: files of every image; :meth:`.formats.Format.finish` is the caller's.
        run_log: of the output folder. An image that fails goes into its errors, and the run goes on; one that could
            not be opened is tried again by the next run.
        workers: threads that load, and as many that write.
        on_done: called with the number of images that are done since the last call, failed ones included.
    """

    def load(image: SourceImage) -> Loaded:
        try:
            data = image.read()
        except (ValueError, TypeError) as error:  # a name that no file has, or a cell that holds no bytes
            raise SlimeError(f"{image.name} cannot be read ({error}).") from error
        return engine.load(image.name, data)

    def wanted() -> Iterator[SourceImage]:
        for image in source:
            if image.name in run_log.done:
                on_done(1)
            elif leads_outside(image.name):
                fail(image.name, SlimeError("its name leads outside the output folder"))
            else:
                yield image

    def fail(name: str, reason: Exception) -> None:
        logger.warning("SLiMe: %s: %s", name, reason)
        run_log.fail(name, str(reason), again=isinstance(reason, OSError))
        on_done(1)

    def write(finish: Callable[[], SegmentedImage]) -> Record:
        segmented = finish()
        for output in outputs:
            output.write(segmented.record, segmented.labels)
        return segmented.record

    with _threads(workers) as loaders, _threads(workers) as writers:
        written: deque[list[tuple[str, Future[Record]]]] = deque()

        def settle(keep: int) -> None:
            """Wait for written batches until at most ``keep`` are left."""
            while len(written) > keep:
                records = []
                for name, future in written.popleft():
                    try:
                        records.append(future.result())
                    except (SlimeError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                        fail(name, SlimeError(str(error)))
                run_log.write(records)
                on_done(len(records))

        def look(batch: list[Loaded]) -> None:
            try:
                finishers = engine.segment(batch)
            except SlimeError as error:
                if len(batch) > 1:  # one image must not cost the others
                    for one in batch:
                        look([one])
                else:
                    fail(batch[0].name, error)
                return
            pairs = zip(batch, finishers, strict=True)
            written.append([(one.name, writers.submit(write, finish)) for one, finish in pairs])
            settle(HELD)

        buckets: dict[tuple[int, ...], list[Loaded]] = {}
        for name, future in _ahead(loaders, load, wanted(), HELD * workers):
            try:
                loaded = future.result()
            except (SlimeError, OSError) as error:
                fail(name, error)
                continue
            bucket = buckets.setdefault(loaded.size, [])
            bucket.append(loaded)
            if len(bucket) >= engine.batch(loaded.size):
                look(buckets.pop(loaded.size))
            elif sum(map(len, buckets.values())) >= HELD * engine.batch(loaded.size):
                look(buckets.pop(max(buckets, key=lambda size: len(buckets[size]))))
        for bucket in buckets.values():
            look(bucket)
        settle(0)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Return a pool of threads that run tensor operations on one core each, so that the model keeps the others."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[SourceImage], Loaded], source: Iterator[SourceImage], count: int
) -> Iterator[tuple[str, Future[Loaded]]]:
    """Yield results in order, with the next ``count`` items of the source computed in advance."""
    waiting: deque[tuple[str, Future[Loaded]]] = deque()
    for image in source:
        waiting.append((image.name, pool.submit(work, image)))
        if len(waiting) >= count:
            yield waiting.popleft()
    yield from waiting
