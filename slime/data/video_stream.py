"""The parts of a video of any length in constant memory: label frames on disk, written one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SlimeError
from ..parts.maps import PartMaps
from ..parts.palette import Color
from ..parts.video import stillness
from .formats.base import png
from .run_log import write_whole

CHUNK_VALUES = 2**24  # of pixel values in a chunk of frames: 64 MB
ABOUT = "parts.json"


class StreamSmoother:
    """Averages the probabilities of a frame with those before it where the picture stands still.

    Unlike :func:`slime.parts.video.smooth_video_parts` it needs no later frames.
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, probabilities: Tensor, frame: Tensor) -> Tensor:
        """Return the averaged probabilities [K, H, W] of the next frame [H, W, 3]."""
        if self._strength > 0:
            if self._last is not None:
                before, last = self._last
                weight = self._strength * stillness(torch.stack([last, frame]))[0]
                probabilities = torch.lerp(probabilities, before, weight)
            self._last = probabilities, frame
        return probabilities


@dataclass(frozen=True)
class LabelFrames:
    """Label frames of a video in a folder: PNG files in the parts' colours, numbered from 0, and their names."""

    folder: Path
    names: tuple[str, ...]
    palette: tuple[Color, ...]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    def count(self) -> int:
        """Return how many frames there are without a gap."""
        number = 0
        while self.path(number).is_file():
            number += 1
        return number

    def write(self, number: int, labels: np.ndarray) -> None:
        """Write labels uint8 [H, W]; no half-written file has the real name."""
        write_whole(self.path(number), png(labels, ((0, 0, 0), *self.palette)))

    def read(self, number: int) -> np.ndarray:
        """Return labels uint8 [H, W].

        Raises:
            SlimeError: a frame that is not there, or is damaged.
        """
        try:
            with Image.open(self.path(number)) as picture:
                return np.array(picture)
        except OSError as error:
            raise SlimeError(f"Frame {number} is missing or damaged in {self.folder}: {error}.") from error

    @classmethod
    def create(cls, folder: Path, names: Sequence[str], palette: Sequence[Color]) -> LabelFrames:
        about = {"names": list(names), "palette": [list(color) for color in palette]}
        write_whole(folder / ABOUT, json.dumps(about).encode())
        return cls(folder, tuple(names), tuple(palette))

    @classmethod
    def open(cls, folder: Path) -> LabelFrames:
        """Open what :meth:`create` made.

        Raises:
            SlimeError: another folder.
        """
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            return cls(folder, tuple(about["names"]), tuple(tuple(color) for color in about["palette"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SlimeError(f"There are no label frames of SLiMe Segment Video in {folder}.") from error


def segment_stream(
    frames: Callable[[int], Iterable[Tensor]],
    segment: Callable[[Tensor], PartMaps],
    target: LabelFrames,
    strength: float,
    on_frame: Callable[[int], None] = lambda done: None,
) -> int:
    """Segment the frames that the target lacks, and return how many there are then.

    Args:
        frames: gives the frames [H, W, 3] from a number on.
        segment: finds the parts in a batch of frames.
        target: where label frames go; those that are there stay.
        strength: of :class:`StreamSmoother`.
        on_frame: called with the number of finished frames; an exception from it ends the work.
    """
    done = target.count()
    first = max(0, done - 1) if strength > 0 else done  # the last frame again, for the average to start from
    smoother, number = StreamSmoother(strength), first
    for chunk in _chunks(frames(first)):
        maps = segment(chunk)
        for index in range(len(chunk)):
            part = slice(index, index + 1)
            if strength > 0:
                labels = smoother(maps.full_size(part)[0], chunk[index]).argmax(0).byte()
            else:
                labels = maps.full_size.labels(part)[0]
            if number >= done:
                target.write(number, labels.numpy())
            number += 1
            on_frame(number)
    return target.count()


def _chunks(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield batches of frames that take a fixed memory."""
    rest = iter(frames)
    for frame in rest:
        size = max(1, CHUNK_VALUES // frame.numel())
        yield torch.stack([frame, *islice(rest, size - 1)])
