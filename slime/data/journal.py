"""The output folder's book: records of what is done, errors, and a manifest of what made them.

A line is written after the files it stands for, a batch at a time; a last line that a kill cut in two is taken away
when the folder is opened again. Runs of several shards keep a book each in the same folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import SlimeError
from .records import Record

BOOK, ERRORS, MANIFEST = "records", "errors", "manifest"


class Journal:
    """Of one run.

    Args:
        folder: of the outputs.
        about: what made them: hashes, settings, versions. A folder belongs to one such.
        shard: (i, n).

    Attributes:
        done: names that need no further look.

    Raises:
        SlimeError: the folder's outputs were made by something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.about = folder, dict(about)
        folder.mkdir(parents=True, exist_ok=True)
        self._end = "" if shard[1] == 1 else f"-{shard[0]:05d}-of-{shard[1]:05d}"
        self._check_manifest()
        self._book, self._errors = (folder / f"{name}{self._end}.jsonl" for name in (BOOK, ERRORS))
        for file in (self._book, self._errors):
            _mend(file)
        self.close()
        self.done = {json.loads(line)["name"] for file in (self._book, self._errors) for line in _lines(file)}

    def _check_manifest(self) -> None:
        for file in sorted(self.folder.glob(f"{MANIFEST}*.json")):
            before = json.loads(file.read_text(encoding="utf-8"))["made_by"]
            differing = [name for name, value in self.about.items() if before.get(name) != value]
            if differing:
                raise SlimeError(
                    f"{self.folder} holds results of another {', '.join(differing)}. Choose an empty folder, or delete "
                    "this one."
                )

    def write(self, records: Sequence[Record]) -> None:
        """Note what is done: these records' files are there."""
        _append(self._book, "".join(record.line() for record in records))
        self.done.update(record.name for record in records)

    def fail(self, name: str, reason: str) -> None:
        """Note a picture that cannot be looked at; a further run leaves it out as well."""
        _append(self._errors, json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n")
        self.done.add(name)

    def records(self) -> Iterator[Record]:
        """Of all shards in the folder, one by one."""
        for file in sorted(self.folder.glob(f"{BOOK}*.jsonl")):
            yield from map(Record.of, _lines(file))

    def close(self, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Write and return the manifest."""
        counts = {"pictures": sum(1 for _ in _lines(self._book)), "errors": sum(1 for _ in _lines(self._errors))}
        found = {"made_by": self.about, "versions": dict(versions or {}), "counts": counts}
        write_whole(
            self.folder / f"{MANIFEST}{self._end}.json", json.dumps(found, indent=2, ensure_ascii=False).encode()
        )
        return found


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.write_bytes(data)
    partial.replace(path)


def partial_of(path: Path) -> Path:
    """Where to write a file until it is whole: a name that no other process takes, on whatever machine."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8", newline="\n") as book:
        book.write(text)
        book.flush()
        os.fsync(book.fileno())


def _lines(file: Path) -> Iterator[str]:
    if file.is_file():
        with file.open(encoding="utf-8", newline="\n") as book:
            yield from (line for line in book if line.endswith("\n"))  # another share may be writing its last one


def _mend(file: Path) -> None:
    """Cut off what follows the last whole line."""
    if file.is_file():
        with file.open("rb+") as book:
            data_end = book.seek(0, os.SEEK_END)
            step, whole = 1 << 16, 0
            for start in range(max(0, data_end - 1) // step * step, -1, -step):
                book.seek(start)
                newline = book.read(step).rfind(b"\n")
                if newline >= 0:
                    whole = start + newline + 1
                    break
            book.truncate(whole)
