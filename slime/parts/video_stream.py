"""The parts of a video of any length in constant memory: label frames on disk, written one after the other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SlimeError
from ..files import png, write_whole
from .maps import PartMaps
from .palette import Color
from .video import VideoSmoother

CHUNK_VALUES, CHUNK_FRAMES = 2**24, 16  # most pixel values (64 MB) and frames that are segmented at once
ABOUT = "parts.json"
AGAIN = 'Delete it, run "Unload Models and Execution Cache" in ComfyUI, and run SLiMe Segment Video again.'
FORGOTTEN = 0.02  # weight of a frame in the average below which it no longer counts
LAST = 16  # frames whose files a crash may have left half written
SAME_MODEL = 0.99  # share of the first frame's pixels that must come out again


@dataclass(frozen=True)
class LabelFrames:
    """Label frames of a video in a folder: PNG files in the parts' colours, numbered from 0.

    Attributes:
        folder: where they are.
        names, palette: of the parts.
        video: digest of the video, or "".
        finished: number of frames when all are there, 0 before.
        remark: what was wrong with the video.
    """

    folder: Path
    names: tuple[str, ...]
    palette: tuple[Color, ...]
    video: str = ""
    finished: int = 0
    remark: str = ""

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    def count(self) -> int:
        """Return how many frames there are without a gap."""
        number = 0
        while self.path(number).is_file():
            number += 1
        return number

    @property
    def complete(self) -> bool:
        """Whether all frames of the video are there."""
        return 0 < self.finished <= self.count()

    def write(self, number: int, labels: np.ndarray) -> None:
        """Write labels uint8 [H, W]; no half-written file has the real name.

        Raises:
            SlimeError: the disk is full or read-only.
        """
        try:
            write_whole(self.path(number), png(labels, ((0, 0, 0), *self.palette)))
        except OSError as error:
            raise SlimeError(
                f"Frame {number} cannot be written: {error}. Free some space and run again; finished frames are kept."
            ) from error

    def read(self, number: int) -> np.ndarray:
        """Return labels uint8 [H, W].

        Raises:
            SlimeError: a frame that is not there, is damaged, or is no label map.
        """
        try:
            with Image.open(self.path(number)) as picture:
                labels = np.array(picture)
        except OSError as error:
            raise SlimeError(f"{self.path(number)} is missing or damaged: {error}. {AGAIN}") from error
        if labels.ndim != 2 or labels.dtype != np.uint8 or labels.max(initial=0) > len(self.names):
            raise SlimeError(f"{self.path(number)} is not a label map of these {len(self.names)} parts. {AGAIN}")
        return labels

    def drop_damaged(self) -> None:
        """Delete those of the last frames that a crash has left half written."""
        for path in sorted(self.folder.glob("[0-9]*.png"))[-LAST:]:
            try:
                with Image.open(path) as picture:
                    picture.load()
            except OSError:
                path.unlink()

    @classmethod
    def create(cls, folder: Path, names: Sequence[str], palette: Sequence[Color], video: str = "") -> LabelFrames:
        """Return the frames in a folder; those that are there for these parts and this video stay."""
        made = cls(folder, tuple(names), tuple(palette), video)
        try:
            there = cls.open(folder)
            if replace(there, finished=0, remark="") == made:
                return there
        except SlimeError:
            pass
        made.save()
        return made

    def save(self) -> None:
        about = {"names": self.names, "palette": self.palette, "video": self.video}
        text = json.dumps(about | {"frames": self.finished, "remark": self.remark})
        try:
            write_whole(self.folder / ABOUT, text.encode())
        except OSError as error:
            raise SlimeError(
                f"{self.folder} cannot be written: {error}. Free some space, or allow writing there."
            ) from error

    @classmethod
    def open(cls, folder: Path) -> LabelFrames:
        """Open what :meth:`create` made.

        Raises:
            SlimeError: another folder.
        """
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            palette = tuple((int(r), int(g), int(b)) for r, g, b in about["palette"])
            more = str(about["video"]), int(about["frames"]), str(about["remark"])
            return cls(folder, tuple(map(str, about["names"])), palette, *more)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise SlimeError(
                f"There are no label frames in {folder}. Run SLiMe Segment Video, and connect its folder."
            ) from error


def segment_stream(
    frames: Callable[[int], Iterable[Tensor]],
    segment: Callable[[Tensor], PartMaps],
    target: LabelFrames,
    strength: float,
    on_frame: Callable[[int], None] = lambda done: None,
    device: torch.device | str = "cpu",
) -> int:
    """Segment the frames that the target lacks, and return how many there are then.

    Args:
        frames: gives the frames [H, W, 3] from a number on.
        segment: finds the parts in a batch of frames.
        target: where label frames go; those that are there stay.
        strength: of :class:`VideoSmoother`.
        on_frame: called with the number of finished frames; an exception from it ends the work.
        device: smooths.

    Raises:
        SlimeError: the frames that are there were made with another model; the disk is full.
    """
    target.drop_damaged()
    done = target.count()
    if done:
        check_model(frames, segment, target)
    lead = _lead(strength)
    number = max(0, done - lead)
    smoother = VideoSmoother(strength)
    for chunk in _chunks(frames(number)):
        if all(target.path(n).is_file() for n in range(number, number + len(chunk) + lead)):  # behind a gap
            number, smoother = number + len(chunk), VideoSmoother(strength)
            continue
        maps = segment(chunk)
        for index in range(len(chunk)):
            part = slice(index, index + 1)
            if strength > 0:
                smoother(maps.source(part)[0].to(device), chunk[index].to(device))
                labels = smoother.labels.cpu()
            else:
                labels = maps.source.labels(part)[0]
            if target.path(number).is_file():
                smoother.labels = torch.from_numpy(target.read(number)).to(device)
            else:
                target.write(number, labels.numpy())
            number += 1
            on_frame(number)
    return target.count()


def check_model(
    frames: Callable[[int], Iterable[Tensor]], segment: Callable[[Tensor], PartMaps], target: LabelFrames
) -> None:
    """Segment the first frame again, and compare.

    Raises:
        SlimeError: the target's first frame came out differently.
    """
    for frame in frames(0):
        found, before = segment(frame[None]).label_map[0].numpy(), target.read(0)
        share = float((found == before).mean()) if found.shape == before.shape else 0.0
        if share < SAME_MODEL:
            raise SlimeError(
                f"Frame 0 now comes out differently from the label frames in {target.folder} "
                f"({100 * share:.0f} % of its pixels agree): the model, a LoRA or the precision has changed, "
                "or the file was edited. Choose another name, or connect the earlier model."
            )
        return


def _lead(strength: float) -> int:
    """Return how many finished frames the average needs to go on nearly as if it had never stopped."""
    return math.ceil(math.log(FORGOTTEN) / math.log(strength)) if strength > 0 else 0


def _chunks(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield batches of frames of one size that take a fixed memory."""
    chunk: list[Tensor] = []
    for frame in frames:
        most = min(CHUNK_FRAMES, max(1, CHUNK_VALUES // frame.numel()))
        if chunk and (chunk[0].shape != frame.shape or len(chunk) >= most):
            yield torch.stack(chunk)
            chunk = []
        chunk.append(frame)
    if chunk:
        yield torch.stack(chunk)
