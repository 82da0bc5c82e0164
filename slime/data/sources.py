"""List images of a folder, a pattern, a list, a COCO file, WebDataset archives or Parquet tables."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import SlimeError
from .pixels import SUFFIXES

ROWS = 64  # of a Parquet table in memory at once
COLUMN = "image"
STREAMED = {".tar", ".parquet"}  # gone through as they are read


class SourceImage(NamedTuple):
    """The name of an image, and a callable for its bytes, from any thread."""

    name: str
    read: Callable[[], bytes]


def source_images(source: str, shard: tuple[int, int] = (0, 1), limit: int = 0) -> Iterator[SourceImage]:
    """Return the images of a source, in a fixed order.

    Args:
        source: a folder (searched throughout), a pattern with ``*``, a ``.txt`` list of paths, a COCO ``.json``, a
            WebDataset ``.tar`` or a ``.parquet`` table with a column "image" of bytes (or of structs with "bytes" and
            "path", as Hugging Face's data sets have them); patterns may name archives and tables too.
        shard: (i, n): every n-th image from the i-th on.
        limit: at most so many, 0 for all.

    Raises:
        SlimeError: nothing there.
    """
    return islice(_all(source), shard[0], None if not limit else shard[0] + shard[1] * limit, shard[1])


def _all(source: str) -> Iterator[SourceImage]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        return _files(files, path, source)
    if glob.has_magic(source):
        fixed = Path(*[part for part in _before_magic(path)])
        found = sorted(Path(file) for file in glob.glob(source, recursive=True) if Path(file).is_file())
        return _files(found, fixed, source)
    if not path.is_file():
        raise SlimeError(f"There is nothing at {source}: give a folder, a pattern in quotes, or a file.")
    return _files([path], path.parent, source)


def _before_magic(path: Path) -> Iterator[str]:
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _files(files: list[Path], root: Path, source: str) -> Iterator[SourceImage]:
    if not files:
        raise SlimeError(f"There are no images at {source}. Known are {', '.join(sorted(SUFFIXES))}.")
    readers = {".tar": _archive, ".parquet": _table, ".txt": _list, ".json": _coco}
    for file in files:
        reader = readers.get(file.suffix.lower())
        if reader is not None:
            yield from reader(file)
        else:
            yield SourceImage(_relative(file, root), file.read_bytes)


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def _list(file: Path) -> Iterator[SourceImage]:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield from _at(file.parent, line.strip())


def _coco(file: Path) -> Iterator[SourceImage]:
    for image in json.loads(file.read_text(encoding="utf-8"))["images"]:
        yield from _at(file.parent, image["file_name"])


def _at(folder: Path, name: str) -> Iterator[SourceImage]:
    """Return an image that a file names, which lies beside it or in ``images``, under the name in the list."""
    path = Path(name)
    places = [path] if path.is_absolute() else [folder / path, folder / "images" / path]
    found = next((place for place in places if place.is_file()), places[0])
    yield SourceImage(path.name if path.is_absolute() else PurePosixPath(path.as_posix()).as_posix(), found.read_bytes)


def _archive(file: Path) -> Iterator[SourceImage]:
    """Yield the members of an archive in their order; its bytes are read as it is iterated."""
    with tarfile.open(file) as archive:
        for member in archive:
            opened = archive.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
            if opened is not None:
                yield SourceImage(member.name.removeprefix("./"), partial(bytes, opened.read()))


def _table(file: Path) -> Iterator[SourceImage]:
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(file)
    if COLUMN not in table.schema_arrow.names:
        raise SlimeError(f'{file.name} has no column "{COLUMN}"; it has: {", ".join(table.schema_arrow.names)}.')
    number = 0
    for batch in table.iter_batches(ROWS, columns=[COLUMN]):
        for value in batch.column(0).to_pylist():
            name = f"{file.stem}_{number:08d}.png"
            if isinstance(value, dict):
                name, value = value.get("path") or name, value.get("bytes")
            yield SourceImage(name, partial(bytes, value or b""))
            number += 1
