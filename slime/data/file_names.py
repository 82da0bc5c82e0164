"""Names of files that any file system can hold, one for each image or part."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ..errors import SlimeError
from ..files import write_whole
from .pixels import SUFFIXES

TABLE = "file_names.csv"
EMPTY: Mapping[str, str] = {}
RESERVED = {"names", "classes", "notes"}  # lists of parts beside the labels
LONGEST = 100  # bytes of a folder or file name: a path on Windows has 260 characters
FORBIDDEN = re.compile(r'[<>:"|?*\\/#%~\x00-\x1f\x7f]')  # by Windows, or with a meaning in addresses
# Windows opens these as devices.
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d\u00b9\u00b2\u00b3])(\.|$)", re.IGNORECASE)


class FileNames:
    """Gives each image of a listing a path without suffix that no other image has, on file systems that ignore case.

    Names stay as they are where they can. What cannot be held becomes "_"; names that would then be the same, such as
    a.jpg and a.png, get a hash of the whole name. The result does not depend on the order, so that several machines
    agree.

    Args:
        names: of all images of the set.
        fixed: files of images that were written before.
    """

    def __init__(self, names: Iterable[str] = (), fixed: Mapping[str, str] = EMPTY) -> None:
        first = {_key(file): name for name, file in fixed.items()}
        self._fixed, self._shared = fixed, set[str]()
        for name in names:
            key = _key(safe_path(name))
            if first.setdefault(key, name) != name:
                self._shared.add(key)
        self._taken = set(first)

    def __call__(self, name: str) -> str:
        """Return the path, with slashes."""
        if name in self._fixed:
            return self._fixed[name]
        path = safe_path(name)
        key = _key(path)
        if key not in self._shared and key.rpartition("/")[2] not in RESERVED:
            return path
        hashed = (f"{path}-{_digest(name)[:length]}" for length in (8, 16, 64))
        return next(file for file in hashed if _key(file) not in self._taken)


def plain_stem(name: str) -> str:
    """Return a name without the suffix of an image file: "shot.0001" has none."""
    path = PurePosixPath(name)
    return name[: -len(path.suffix)] if path.suffix.lower() in SUFFIXES and path.stem else name


def safe_path(name: str) -> str:
    """Return the path of an image without suffix, with components that any file system can hold."""
    parts = [part for part in re.split(r"[\\/]+", plain_stem(name.replace("\\", "/"))) if part not in ("", ".")]
    folders = [re.sub(r"\.(png|txt)$", r"_\1", _safe(part), flags=re.IGNORECASE) for part in parts[:-1]]
    return "/".join([*folders, *map(_safe, parts[-1:])]) or "_"


def leads_outside(name: str) -> bool:
    """Return whether a path is absolute, has a drive, or goes up."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", name) is not None


def folders_of(parts: Iterable[str]) -> dict[str, str]:
    """Return a folder name for each part, by the same rules."""
    safe = {part: _safe(part) for part in parts}
    shared = Counter(map(_key, safe.values()))
    return {part: f"{name}-{_digest(part)[:8]}" if shared[_key(name)] > 1 else name for part, name in safe.items()}


def changed_names(images: Iterable[str], file_names: FileNames, parts: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of :func:`write_table` for images and parts whose files have other names."""
    yield from (("image", name, file) for name in images if (file := file_names(name)) != plain_stem(name))
    yield from (("part", part, folder) for part, folder in folders_of(parts).items() if folder != part)


def write_table(folder: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Add rows (kind, name, file) for images and parts whose files are named differently."""
    known = set(read_table(folder))
    changed = sorted(known | set(rows))
    if len(changed) > len(known):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("kind", "name", "file"), *changed])
        write_whole(folder / TABLE, text.getvalue().encode())


def read_table(folder: Path) -> list[tuple[str, str, str]]:
    """Return the rows that were written to a folder."""
    file = folder / TABLE
    if not file.is_file():
        return []
    try:
        rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SlimeError(f"{file} was changed by another program ({error}). Restore it from a copy.") from error
    if not rows or rows[0] != ["kind", "name", "file"] or any(len(row) != 3 for row in rows if row):
        raise SlimeError(f"{file} was changed by another program: its first line is not kind,name,file.")
    return [(row[0], row[1], row[2]) for row in rows[1:] if row]


def _safe(component: str) -> str:
    text = re.sub(r"[\s.]+$", "", FORBIDDEN.sub("_", component)).strip()
    if DEVICE.match(text) or not text or set(text) == {"."}:
        text = f"_{text}".rstrip(". ")
    return text if len(text.encode(errors="replace")) <= LONGEST else f"{_cut(text)}-{_digest(component)[:8]}"


def _cut(text: str) -> str:
    return text.encode(errors="replace")[: LONGEST - 9].decode(errors="ignore")


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
