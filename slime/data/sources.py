"""List images of a folder, a pattern, a list, a COCO file, WebDataset archives or Parquet tables."""

from __future__ import annotations

import glob
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SlimeError
from .formats.base import dicts, text_of
from .pixels import SUFFIXES

logger = logging.getLogger(__name__)
ROWS = 64  # of a Parquet table in memory at once
COLUMN = "image"
STREAMED = {".tar", ".parquet"}  # gone through as they are read


class SourceImage(NamedTuple):
    """The name of an image, and a callable for its bytes, from any thread."""

    name: str
    read: Callable[[], bytes]


def source_images(
    source: str, shard: tuple[int, int] = (0, 1), limit: int = 0, without: Path | None = None
) -> Iterator[SourceImage]:
    """Return the images of a source, in a fixed order.

    Args:
        source: a folder (searched throughout), a pattern with ``*``, a ``.txt`` list of paths, a COCO ``.json``, a
            WebDataset ``.tar`` or a ``.parquet`` table with a column "image" of bytes (or of structs with "bytes" and
            "path", as Hugging Face's data sets have them); patterns may name archives and tables too.
        shard: (i, n): every n-th image from the i-th on.
        limit: at most so many, 0 for all.
        without: a folder whose files do not count, such as one for outputs.

    Raises:
        SlimeError: nothing there.
    """
    images = _unique(_named(_all(source, without)))
    return islice(images, shard[0], None if not limit else shard[0] + shard[1] * limit, shard[1])


def _named(images: Iterator[SourceImage]) -> Iterator[SourceImage]:
    """Make names text that can be written, where they are not UTF-8."""
    for image in images:
        yield image._replace(name=image.name.encode(errors="surrogatepass").decode(errors="replace"))


def _unique(images: Iterator[SourceImage]) -> Iterator[SourceImage]:
    """Leave out images whose name came before, with a warning: each share of a set must see the same ones."""
    names = set[str]()
    for image in images:
        if image.name in names:
            logger.warning("SLiMe: %s is listed twice: the first one is taken.", image.name)
        else:
            names.add(image.name)
            yield image


def source_names(source: str, without: Path | None = None) -> Iterator[str]:
    """Yield the names of all images of a source, without reading them."""
    return (image.name for image in _named(_all(source, without, read=False)))


def _all(source: str, without: Path | None, read: bool = True) -> Iterator[SourceImage]:
    path, left_out = Path(source), without.resolve() if without is not None else None

    def counts(file: Path) -> bool:
        return file.is_file() and (left_out is None or left_out not in file.resolve().parents)

    if path.is_file():
        return _files([path], path.parent, source, read)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and counts(file))
        return _files(files, path, source, read)
    if glob.has_magic(source):
        fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        found = sorted(filter(counts, map(Path, glob.glob(source, recursive=True))))
        return _files(found, fixed, source, read)
    raise SlimeError(f"There is nothing at {source}: give a folder, a pattern in quotes, or a file.")


def _files(files: list[Path], root: Path, source: str, read: bool) -> Iterator[SourceImage]:
    if not files:
        raise SlimeError(f"There are no images at {source}. Known are {', '.join(sorted(SUFFIXES))}.")
    readers = {".tar": _archive, ".parquet": _table, ".txt": _list, ".json": _coco}
    for file in files:
        reader = readers.get(file.suffix.lower())
        if reader is not None:
            # Archives hold the same names.
            prefix = (
                f"{_relative(file.with_suffix(''), root)}/" if reader in (_archive, _table) and len(files) > 1 else ""
            )
            for image in reader(file, read):
                yield image._replace(name=prefix + image.name)
        else:
            yield SourceImage(_relative(file, root), file.read_bytes)


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def _list(file: Path, _: bool) -> Iterator[SourceImage]:
    for line in text_of(file).splitlines():
        if line.strip():
            yield from _at(file.parent, line.strip())


def _coco(file: Path, _: bool) -> Iterator[SourceImage]:
    try:
        images = dicts(json.loads(text_of(file)).get("images"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise SlimeError(f"{file.name} is cut off, or no COCO file. Export it again.") from error
    for image in images:
        if isinstance(image.get("file_name"), str) and image["file_name"]:
            yield from _at(file.parent, image["file_name"])


def _at(folder: Path, name: str) -> Iterator[SourceImage]:
    """Return an image that a file names, which lies beside it or in ``images``.

    It keeps that name, but for paths that lead out of the folder, which become paths from the root.
    """
    path = Path(name if Path(name).is_absolute() else name.replace("\\", "/"))
    places = [path] if path.is_absolute() else [folder / path, folder / "images" / path]
    found = next(filter(_is_file, places), places[0])
    if path.is_absolute() or ".." in path.parts:
        whole = found.absolute() if ".." not in path.parts else Path(os.path.normpath(found.absolute()))
        name = whole.relative_to(whole.anchor).as_posix()
        if whole.is_relative_to(folder.absolute()):
            name = whole.relative_to(folder.absolute()).as_posix()
    else:
        name = path.as_posix()
    yield SourceImage(name, found.read_bytes)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with characters that no file name has
        return False


def _archive(file: Path, read: bool) -> Iterator[SourceImage]:
    """Yield the members of an archive in their order; its bytes are read as it is iterated."""
    try:
        yield from _members(file, read)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise SlimeError(f"{file.name} is no tar archive, or is cut off ({error}). Copy it again.") from error


def _members(file: Path, read: bool) -> Iterator[SourceImage]:
    with tarfile.open(file) as archive:
        for member in archive:
            try:
                opened = archive.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
            except KeyError:  # a link to nothing
                yield SourceImage(member.name, partial(_missing, member.name))
                continue
            if opened is not None:
                yield SourceImage(member.name.removeprefix("./"), partial(bytes, opened.read() if read else b""))


def _missing(name: str) -> bytes:
    raise SlimeError(f"{name} is a link to a file that is not in the archive.")


def _table(file: Path, read: bool) -> Iterator[SourceImage]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise SlimeError(f"{file.name} is no Parquet file, or is cut off ({error}). Copy it again.") from error
    if COLUMN not in table.schema_arrow.names:
        raise SlimeError(f'{file.name} has no column "{COLUMN}"; it has: {", ".join(table.schema_arrow.names)}.')
    try:
        yield from _rows(table, file, read)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SlimeError(f"{file.name} is damaged ({error}). Copy it again.") from error


def _rows(table: Any, file: Path, read: bool) -> Iterator[SourceImage]:
    """Yield the images of a table; a path that repeats is told apart by the number of its row."""
    import pyarrow

    kind = table.schema_arrow.field(COLUMN).type
    named = pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0
    numbers = (f"{file.stem}_{number:08d}" for number in range(table.metadata.num_rows))
    if not (read or named):
        yield from (SourceImage(f"{number}.png", bytes) for number in numbers)
        return
    seen = set[str]()
    for batch in table.iter_batches(ROWS, columns=[COLUMN if read else f"{COLUMN}.path"]):
        for value, number in zip(batch.column(COLUMN).to_pylist(), numbers, strict=False):
            name = f"{number}.png"
            if isinstance(value, dict):
                name, value = value.get("path") or name, value.get("bytes")
                name = f"{number}/{name}" if name in seen else name
                seen.add(name)
            if isinstance(value, str):
                raise SlimeError(f'The column "{COLUMN}" of {file.name} holds texts, not the bytes of images.')
            yield SourceImage(name, partial(bytes, value or b""))
