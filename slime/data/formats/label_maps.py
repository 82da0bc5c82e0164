"""Label maps and masks as images beside ``names.txt``, which lists the parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import SlimeError
from ...examples import IGNORE, check_names
from ...files import png, write_whole
from ..file_names import folders_of, read_table
from ..pixels import SUFFIXES, upright_labels
from ..records import Record
from ..run_log import RunLog
from .base import AnnotatedImage, AnnotatedSet, Files, Format, decoder, files_of, part_name, text_of

NAMES, LABELS, MASKS, IMAGES = "names.txt", "labels", "masks", "images"
ENDINGS = (".npy", ".png")


class LabelMaps(Format):
    """Write ``labels/*.png``, indexed images whose values are the labels, and ``names.txt``, one part per line."""

    kind = LABELS

    def write(self, record: Record, labels: np.ndarray) -> None:
        write_whole(self.place(LABELS, record.name, ".png"), png(labels, [(0, 0, 0), *self.palette]))

    def finish(self, run_log: RunLog) -> None:
        write_whole(self.folder / self.kind / NAMES, "".join(f"{name}\n" for name in self.names).encode())


class Masks(LabelMaps):
    """Write ``masks/PART/*.png``, 255 inside the part, and ``names.txt``, one part per line."""

    kind = MASKS

    def write(self, record: Record, labels: np.ndarray) -> None:
        for label, folder in enumerate(folders_of(self.names).values(), start=1):
            mask = (labels == label).astype(np.uint8) * 255
            write_whole(self.place(f"{MASKS}/{folder}", record.name, ".png"), png(mask))


def claims(folder: Path) -> bool:
    """Return whether a folder holds such a data set."""
    return _list_in(folder) is not None


def read(folder: Path, wanted: Sequence[str]) -> AnnotatedSet:
    """Read images with label maps of the same stem, beside them or in ``labels``, or with masks in ``masks/PART``.

    Images lie in the folder or in ``images``; label maps are ``.npy`` or indexed or grey ``.png`` files.

    Raises:
        SlimeError: a list of parts that cannot be used.
    """
    listed = _list_in(folder)
    assert listed is not None
    lines = [part_name(line) for line in text_of(listed).splitlines() if line.strip()]
    names = check_names(lines) if not wanted else tuple(lines)
    if len(names) >= IGNORE:
        raise SlimeError(f"{NAMES} has {len(names)} names; label maps of 8 bits hold at most {IGNORE - 1}.")
    find = _mask_files if listed.parent.name == MASKS else _label_file
    found, files, skipped = list[AnnotatedImage](), Files(), list[str]()
    renamed = {name: file for kind, name, file in read_table(folder) if kind == "image"}
    inner = sorted(file for file in (folder / IMAGES).rglob("*") if file.is_file())
    for file in (*files_of(folder), *inner):
        labels = find(file, folder, names, files, renamed) if file.suffix.lower() in SUFFIXES else None
        if labels is not None:
            name = file.relative_to(folder / IMAGES if (folder / IMAGES) in file.parents else folder).as_posix()
            found.append(AnnotatedImage(name, decoder(file), labels))
    if find is _label_file:
        stems = {Path(image.name).with_suffix("").as_posix().lower() for image in found}
        stems |= {file.lower() for file in renamed.values()}
        maps = [file for end in ENDINGS for file in sorted((folder / LABELS).rglob(f"*{end}"))]
        lone = [
            file for file in maps if file.relative_to(folder / LABELS).with_suffix("").as_posix().lower() not in stems
        ]
        skipped += [f"{LABELS}/{file.name}: there is no image of that name" for file in lone]
    return AnnotatedSet(names, tuple(found), skipped)


def _list_in(folder: Path) -> Path | None:
    return next((file for place in (".", LABELS, MASKS) if (file := folder / place / NAMES).is_file()), None)


def _stems(image: Path, folder: Path, kind: str, renamed: Mapping[str, str]) -> list[Path]:
    """Return where the label map of an image may be, without suffix."""
    inner = image.relative_to(folder / IMAGES) if (folder / IMAGES) in image.parents else image.relative_to(folder)
    if inner.as_posix() in renamed:
        return [folder / kind / renamed[inner.as_posix()]]
    return [image.parent / kind / image.stem, folder / kind / inner.with_suffix("")]


def _label_file(
    image: Path, folder: Path, _: Sequence[str], files: Files, renamed: Mapping[str, str]
) -> Callable[[], np.ndarray] | None:
    """Return a reader of an image's label map; None for a file that is itself a label map, or has none."""
    stems = _stems(image, folder, LABELS, renamed)
    if (folder / IMAGES) not in image.parents:  # there the other files are images too
        stems.append(image.parent / image.stem)
    places = [stem.with_name(f"{stem.name}{end}") for stem in stems for end in ENDINGS]
    file = next((file for file in map(files.find, places) if file not in (None, image)), None)
    return None if file is None else lambda: upright_labels(_read_labels(file), image)


def _mask_files(
    image: Path, folder: Path, names: Sequence[str], files: Files, renamed: Mapping[str, str]
) -> Callable[[], np.ndarray] | None:
    """Return a reader of the masks of an image's parts; None where there are none."""
    masks = dict[int, Path]()
    for label, part in enumerate(folders_of(names).values(), start=1):
        stems = _stems(image, folder, f"{MASKS}/{part}", renamed)
        file = next((file for stem in stems if (file := files.find(stem.with_name(f"{stem.name}.png")))), None)
        if file is not None:
            masks[label] = file

    def labels() -> np.ndarray:
        label_map: np.ndarray | None = None
        for label, file in masks.items():
            mask = _grey(file) > 127
            label_map = np.zeros(mask.shape, np.uint8) if label_map is None else label_map
            if mask.shape != label_map.shape:
                raise SlimeError(f"{file.parent.name}/{file.name} has another size than the masks of other parts.")
            label_map[mask] = label
        assert label_map is not None
        return upright_labels(label_map, image)

    return labels if masks else None


def _grey(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("L"))
    except Exception as error:  # numpy and Pillow raise whatever the bytes lead to
        raise SlimeError(f"{file.name} cannot be read as a mask: {error}") from error


def _read_labels(file: Path) -> np.ndarray:
    try:
        if file.suffix.lower() == ".npy":
            labels = np.load(file, allow_pickle=False)
        else:
            with Image.open(file) as image:
                if image.mode not in ("1", "P", "L") and not image.mode.startswith("I"):
                    raise SlimeError(
                        f"{file.name} is in colours; a label map is an indexed or grey image of label numbers."
                    )
                labels = np.asarray(image)
    except SlimeError:
        raise
    except Exception as error:  # numpy and Pillow raise whatever the bytes lead to
        raise SlimeError(f"{file.name} cannot be read as a label map: {error}") from error
    if labels.ndim != 2 or labels.size == 0 or labels.dtype.kind not in "biu" or labels.min() < 0 or labels.max() > 255:
        raise SlimeError(f"{file.name} is no label map [H, W] of whole numbers from 0 to 255.")
    if set(np.unique(labels).tolist()) == {0, IGNORE}:
        raise SlimeError(
            f"{file.name} has the values 0 and 255 only, and 255 means pixels to ignore. Write the number of the part "
            f"in {NAMES} instead: 1 for the first name."
        )
    return labels.astype(np.uint8)
