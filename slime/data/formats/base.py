"""What the formats share: the set that is read, the class that writes, and how files and parts are named."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch

from ...embeddings import PartEmbeddings
from ...errors import SlimeError
from ...examples import BACKGROUND, SEPARATORS, Example, check_names
from ...files import replacing
from ...parts.maps import PartMaps
from ..file_names import FileNames, leads_outside
from ..pixels import decode
from ..records import Record
from ..run_log import RunLog

UTF16 = (b"\xff\xfe", b"\xfe\xff")
UPLOAD = re.compile(r"[0-9a-f]{8}-.")
LARGEST = 2**29  # pixels of an image


class AnnotatedImage(NamedTuple):
    """An image of a set, with callables for its pixels uint8 [H, W, 3] and its label map uint8 [H, W]."""

    name: str
    pixels: Callable[[], np.ndarray]
    labels: Callable[[], np.ndarray]

    def example(self, names: Sequence[str]) -> Example:
        """Return the training example; raise SlimeError as :meth:`slime.Example.from_label_map` does."""
        image = torch.from_numpy(self.pixels()).float() / 255
        try:
            return Example.from_label_map(image, torch.from_numpy(self.labels().astype(np.int64)), names)
        except SlimeError as error:
            raise SlimeError(f"{self.name}: {error}") from error


class AnnotatedSet(NamedTuple):
    """A data set.

    Attributes:
        names: part names, label 1 first.
        images: in a fixed order.
        skipped: a line per annotation or image that cannot be used. Reading label maps may add lines.
    """

    names: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    skipped: list[str]


class Format:
    """Base class of the formats that are written.

    Args:
        folder: output folder.
        parts: the part names and colours.
        model: id of the embeddings, for formats with such a field.
        file_names: gives each image its file name.
    """

    def __init__(
        self, folder: Path, parts: PartEmbeddings | PartMaps, model: str, file_names: FileNames | None = None
    ) -> None:
        self.folder, self.names, self.palette, self.model = folder, parts.names, parts.palette, model
        self.file_names = file_names or FileNames()

    def write(self, record: Record, labels: np.ndarray) -> None:
        """Write the files of one image, each completely or not at all. Called from several threads."""

    def finish(self, run_log: RunLog) -> None:
        """Write what is made of all records, after the last one."""

    def place(self, kind: str, name: str, suffix: str) -> Path:
        """Return the path of a file of an image; raise SlimeError for a name that leads out of the folder."""
        if leads_outside(name):
            raise SlimeError(f'An image is called "{name}", which would be written outside {self.folder}.')
        return self.folder / kind / f"{self.file_names(name)}{suffix}"


def write_json(path: Path, fixed: dict[str, Any] | None, **lists: Iterable[dict[str, Any]]) -> None:
    """Write an object of ``fixed`` entries and lists, item by item; without ``fixed`` the one list alone."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        if fixed is not None:
            file.write(json.dumps(fixed, ensure_ascii=False)[:-1] + ",")
        for index, (name, items) in enumerate(lists.items()):
            file.write(("," if index else "") + (f'"{name}":[' if fixed is not None else "["))
            for place, item in enumerate(items):
                file.write(("," if place else "") + "\n" + json.dumps(item, separators=(",", ":"), ensure_ascii=False))
            file.write("\n]")
        file.write("}\n" if fixed is not None else "\n")


# ------------------------------------------------------------------------------------------------------------- reading


def text_of(file: Path) -> str:
    """Return the text of a file; raise SlimeError unless it is UTF-8, with or without a byte order mark."""
    data = file.read_bytes()
    if data.startswith(UTF16):
        raise SlimeError(f"{file.name} is saved as UTF-16. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlimeError(f"{file.name} is not saved as UTF-8 ({error.reason}). Save it as UTF-8.") from error


def dicts(entries: Any) -> list[dict[str, Any]]:
    """Return the dictionaries of a list; nothing of anything else."""
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def part_name(value: Any) -> str:
    """Return a part name that nodes can list: "door, double door" becomes "door / double door"."""
    return SEPARATORS.sub(" / ", re.sub(r"\s+", " ", str(value or "")).replace(", ", ",")).strip(" /")


def part_names(used: Iterable[str], wanted: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the names of the parts to read: the wanted ones that occur, else all but the background."""
    names = [name for name in dict.fromkeys(used) if name and name.lower() != BACKGROUND]
    if wanted or not names:
        return tuple(name for name in names if name in wanted)
    try:
        return check_names(names)
    except SlimeError as error:
        raise SlimeError(f"{source}: {error} Or name the parts that you want.") from error


def note(skipped: list[str], line: str) -> None:
    """Add a line that is not there yet: label maps may be read several times."""
    if line not in skipped:
        skipped.append(line)


def said_of(skipped: Sequence[str], most: int = 3) -> str:
    """Return one sentence about skipped annotations, which names the first ones; an empty text for none."""
    if not skipped:
        return ""
    more = f" (and {len(skipped) - most} more)" if len(skipped) > most else ""
    return f"Skipped {len(skipped)}: {'; '.join(skipped[:most])}{more}."


def draw(
    masks: Iterable[tuple[str, Callable[[], np.ndarray], str]],
    names: Sequence[str],
    size: tuple[int, int],
    image: str,
    skipped: list[str],
) -> np.ndarray:
    """Draw masks into a label map of ``size``; those that cannot be decoded or cover nothing are noted in ``skipped``.

    Args:
        masks: the part of each, a callable for its pixels bool [H, W], and where it stands. Later ones lie on top.
        names: of the parts, label 1 first.
        size: height and width.
        image: its name.
        skipped: see :class:`AnnotatedSet`.

    Raises:
        SlimeError: none of the masks can be used, or the size is out of reach.
    """
    if size[0] * size[1] > LARGEST:
        raise SlimeError(f"{image}: its annotations say {size[1]} x {size[0]} pixels, which is too large.")
    label_map, drawn, failed = np.zeros(size, np.uint8), 0, ""
    for part, decode_mask, label in masks:
        try:
            mask = decode_mask()
            if not mask.any():
                raise ValueError("it covers no pixel of the image")
            label_map[mask] = names.index(part) + 1
            drawn += 1
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            failed = f"{label}: {error}"
            note(skipped, failed)
    if failed and not drawn:
        raise SlimeError(f"{image}: none of its annotations can be used ({failed}).")
    return label_map


def side_of(value: Any) -> int:
    """Return a height or width in pixels; raise ValueError for anything else."""
    try:
        side = int(float(value))
    except (TypeError, ValueError, OverflowError):
        side = 0
    if not 0 < side <= 100_000:
        raise ValueError(f"it has no width and height in pixels ({value!r})")
    return side


def decoder(file: Path, name: str = "") -> Callable[[], np.ndarray]:
    """Return a callable that decodes an image file; it raises SlimeError with the image's name."""

    def pixels() -> np.ndarray:
        try:
            return decode(file.read_bytes())
        except SlimeError as error:
            raise SlimeError(f"{name or file.name}: {error}") from error
        except (OSError, ValueError) as error:  # ValueError: characters that no file name has
            reason = getattr(error, "strerror", None) or "there is no file of that name"
            raise SlimeError(f"The image {name or file.name} cannot be opened: {reason}.") from error

    return pixels


def points_of(flat: Sequence[Any]) -> np.ndarray:
    """Return float [N, 2] of the numbers x, y, x, y ...; raise ValueError or TypeError for anything else."""
    return np.asarray(flat[: len(flat) // 2 * 2], np.float64).reshape(-1, 2)


def plain_name(name: str) -> str:
    """Return a relative path with slashes, without drive and ".."."""
    parts = re.split(r"[\\/]+", name.strip())
    return "/".join(part for part in parts if part not in ("", ".", "..") and not part.endswith(":"))


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder in order; none where there is no such folder."""
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


class Files:
    """Finds files whose names may differ in upper and lower case; every folder is listed once.

    Args:
        names: of all images of the set. Those that differ in case alone must be met exactly.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._listed: dict[Path, dict[str, Path]] = {}
        self._names = Counter(PurePosixPath(name).name.lower() for name in names)

    def find(self, place: Path) -> Path | None:
        """Return the file of this name, else one of the same letters, else None."""
        try:
            if place.is_file():
                return place
        except (OSError, ValueError):  # too long, or with characters that no file name has
            return None
        if place.parent not in self._listed:
            self._listed[place.parent] = {file.name.lower(): file for file in files_of(place.parent)}
        return self._listed[place.parent].get(place.name.lower()) if self._names[place.name.lower()] < 2 else None

    def image(self, folders: Sequence[Path], name: str) -> Path:
        """Return the path of a named image in the first of the folders that has it, else where it should be.

        It is looked for by its whole name, then by its last component unless another image of the set has that too;
        Label Studio puts eight random digits before the names of uploads.
        """
        spellings = dict.fromkeys([name, unquote(name), name.partition("?")[0]])
        lasts = dict.fromkeys(PurePosixPath(spelling).name for spelling in spellings if spelling)
        if self._names[PurePosixPath(name).name.lower()] > 1:
            lasts.clear()
        lasts |= dict.fromkeys(last[9:] for last in lasts if UPLOAD.match(last))
        places = [folder / spelling for spelling in (*spellings, *lasts) if spelling for folder in folders]
        return next((file for file in map(self.find, places) if file is not None), folders[0] / (name or "?"))


def renumbered(annotated: AnnotatedSet, names: tuple[str, ...], table: Mapping[int, int]) -> AnnotatedSet:
    """Return the set with other names, its labels changed by a table; labels that are not in it become 0."""
    lookup = np.zeros(256, np.uint8)
    for label, new in table.items():
        lookup[label] = new

    def changed(image: AnnotatedImage) -> AnnotatedImage:
        return image._replace(labels=lambda: lookup[image.labels()])

    return annotated._replace(names=names, images=tuple(map(changed, annotated.images)))
