"""Segment many images: loading, passes and writing overlap, memory is bounded, and finished images stay finished."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
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


class Engine:
    """A segmenter for images of any size: those of one working size share a pass.

    Args:
        segmenter: with settings that look at whole images; closeups and tiles are refused.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        if segmenter.settings.closeups or segmenter.settings.tiles > 1:
            raise SlimeError("closeups and tiles are not for large sets: segment such images with slime.segment.")
        self.segmenter = segmenter

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
        backbone = self.segmenter.backbone
        cells = (size[0] // backbone.info.cell, size[1] // backbone.info.cell)
        return self.segmenter.settings.batch_size or backbone.fitting_batch(cells)

    @torch.inference_mode()
    def segment(self, loaded: list[Loaded]) -> list[Callable[[], tuple[Record, np.ndarray]]]:
        """Run one pass over images of one working size.

        The callables finish them at full size, in any thread: a record, and a label map uint8 [H, W].
        """
        maps = self.segmenter(torch.stack([image.small for image in loaded]))
        source = maps.source
        assert isinstance(source, LazyMaps)

        def finish(index: int) -> tuple[Record, np.ndarray]:
            with torch.inference_mode():
                labels = source.for_image(index, loaded[index].image()).labels(slice(0, 1))[0].numpy()
            confidence = float(maps.confidence[index])
            return record_of(loaded[index].name, labels, source.maps[index], confidence), labels

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
    with _threads(workers) as loaders, _threads(workers) as writers:
        run = _Run(engine, outputs, run_log, on_done, writers)
        buckets: dict[tuple[int, ...], list[Loaded]] = {}  # by working size: images that share a pass
        for name, future in _ahead(loaders, run.load, run.wanted(source), HELD * workers):
            try:
                loaded = future.result()
            except (SlimeError, OSError) as error:
                run.fail(name, error)
                continue
            bucket = buckets.setdefault(loaded.size, [])
            bucket.append(loaded)
            if len(bucket) >= engine.batch(loaded.size):
                run.segment(buckets.pop(loaded.size))
            elif sum(map(len, buckets.values())) >= HELD * engine.batch(loaded.size):
                run.segment(buckets.pop(max(buckets, key=lambda size: len(buckets[size]))))
        for bucket in buckets.values():
            run.segment(bucket)
        run.settle(0)


@dataclass
class _Run:
    """The steps of :func:`segment_images`, with the batches that are being written."""

    engine: Engine
    outputs: Sequence[Format]
    run_log: RunLog
    on_done: Callable[[int], None]
    writers: ThreadPoolExecutor
    written: deque[list[tuple[str, Future[Record]]]] = field(default_factory=deque)

    def wanted(self, source: Iterable[SourceImage]) -> Iterator[SourceImage]:
        """Yield the images that are not done and may be written."""
        for image in source:
            if image.name in self.run_log.done:
                self.on_done(1)
            elif leads_outside(image.name):
                self.fail(image.name, SlimeError("its name leads outside the output folder"))
            else:
                yield image

    def load(self, image: SourceImage) -> Loaded:
        try:
            data = image.read()
        except (ValueError, TypeError) as error:  # a name that no file has, or a cell that holds no bytes
            raise SlimeError(f"{image.name} cannot be read ({error}).") from error
        return self.engine.load(image.name, data)

    def segment(self, batch: list[Loaded]) -> None:
        """Run one pass, or one for each image if that fails, and begin to write the results."""
        try:
            finishers = self.engine.segment(batch)
        except SlimeError as error:
            if len(batch) > 1:  # one image must not cost the others
                for image in batch:
                    self.segment([image])
            else:
                self.fail(batch[0].name, error)
            return
        pairs = zip(batch, finishers, strict=True)
        self.written.append([(image.name, self.writers.submit(self.write, finish)) for image, finish in pairs])
        self.settle(HELD)

    def write(self, finish: Callable[[], tuple[Record, np.ndarray]]) -> Record:
        record, labels = finish()
        for output in self.outputs:
            output.write(record, labels)
        return record

    def settle(self, keep: int) -> None:
        """Wait for written batches until at most ``keep`` are left, and log them."""
        while len(self.written) > keep:
            records = []
            for name, future in self.written.popleft():
                try:
                    records.append(future.result())
                except (SlimeError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                    self.fail(name, SlimeError(str(error)))
            self.run_log.write(records)
            self.on_done(len(records))

    def fail(self, name: str, reason: Exception) -> None:
        logger.warning("SLiMe: %s: %s", name, reason)
        self.run_log.fail(name, str(reason), again=isinstance(reason, OSError))
        self.on_done(1)


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
