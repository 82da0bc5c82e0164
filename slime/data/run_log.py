"""Log of a run in its output folder: records of finished images, errors, and a manifest of what made them.

A line is written after the files it stands for, a batch at a time. A last line that a kill cut off is removed when the
folder is opened again. Runs of several shards keep a log each in the same folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import SlimeError
from ..files import write_whole
from .records import Record

RECORDS, ERRORS, MANIFEST = "records", "errors", "manifest"
AGAIN = "again"  # marks an error that may pass, such as a network folder that was away
# Files and folders that are written, some by other modules.
OUTPUTS = ("annotations.json", "tasks.json", "config.xml", "data.yaml", "labels", "masks", "records*.jsonl",
           "errors*.jsonl", "parts-*.parquet", "file_names.csv", "order.txt", "review.html")  # fmt: skip


class RunLog:
    """Log of one run.

    Args:
        folder: of the outputs.
        about: what makes them: hashes, settings, versions. A folder belongs to one such.
        shard: (i, n).

    Attributes:
        done: names of images that are finished or failed.

    Raises:
        SlimeError: the folder's outputs were made by something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.about = folder, dict(about)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SlimeError(
                f"The folder {folder} cannot be created ({error.strerror}). Choose another one."
            ) from error
        self._suffix = "" if shard[1] == 1 else f"-{shard[0]:05d}-of-{shard[1]:05d}"
        self._check_manifest()
        self._records, self._errors = (folder / f"{name}{self._suffix}.jsonl" for name in (RECORDS, ERRORS))
        for file in (self._records, self._errors):
            _drop_partial_line(file)
        self.done = {name for file in (self._records, self._errors) for name in _lasting_names(file)}
        self.close()

    def _check_manifest(self) -> None:
        files = sorted(self.folder.glob(f"{MANIFEST}*.json"))
        foreign = sorted(file.name for name in OUTPUTS for file in self.folder.glob(name)) if not files else []
        if foreign:
            raise SlimeError(f"{self.folder} contains {foreign[0]}, which SLiMe did not write. Choose an empty folder.")
        shares = {file.stem.removeprefix(MANIFEST).partition("-of-")[2] for file in files}
        if shares - {self._suffix.partition("-of-")[2]}:
            raise SlimeError(
                f"{self.folder} contains a run with a different number of shards. Give the same --shard I/N."
            )
        for file in files:
            try:
                before = json.loads(file.read_text(encoding="utf-8"))["made_by"]
                before.get("model")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise SlimeError(f"{file} was not written by SLiMe, or is damaged. Choose an empty folder.") from error
            if any(before.get(name) != self.about.get(name) for name in before.keys() | self.about):
                raise SlimeError(
                    f"{self.folder} was made with other settings: {_compared(before, self.about)}. Choose "
                    "another folder, or the same settings to continue."
                )

    def write(self, records: Sequence[Record]) -> None:
        """Log finished images, whose files are written."""
        _append(self._records, "".join(record.line() for record in records))
        self.done.update(record.name for record in records)

    def fail(self, name: str, reason: str, again: bool = False) -> None:
        """Log an image that cannot be segmented; a later run skips it, unless it is to be tried ``again``."""
        line = {"name": name, "reason": reason} | ({AGAIN: True} if again else {})
        _append(self._errors, json.dumps(line, ensure_ascii=False) + "\n")
        if not again:
            self.done.add(name)

    def records(self) -> Iterator[Record]:
        """Yield the records of all shards in the folder."""
        for file in sorted(self.folder.glob(f"{RECORDS}*.jsonl")):
            for line in _lines(file):
                with suppress(ValueError):  # a line that a crash left unreadable
                    yield Record.of(line)

    def close(self, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Write and return the manifest."""
        counts = {"images": sum(1 for _ in _lines(self._records)), "errors": sum(1 for _ in _lines(self._errors))}
        manifest = {"made_by": self.about, "versions": dict(versions or {}), "counts": counts}
        data = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
        write_whole(self.folder / f"{MANIFEST}{self._suffix}.json", data)
        return manifest


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8", newline="\n") as log:
        log.write(text)
        log.flush()
        os.fsync(log.fileno())


def _lines(file: Path) -> Iterator[str]:
    if file.is_file():
        with file.open("rb") as log:  # another shard may be writing its last line
            yield from (line.decode(errors="replace") for line in log if line.endswith(b"\n"))


def _entry(line: str) -> dict[str, Any] | None:
    """Return what a line says; None for one that a crash left unreadable."""
    try:
        body = json.loads(line)
    except ValueError:
        return None
    return body if isinstance(body, dict) and "name" in body else None


def _lasting_names(file: Path) -> list[str]:
    """Return the names in a log. Lines that a crash left unreadable, and errors that may pass, are removed from it."""
    names, complete = list[str](), True
    for line in _lines(file):
        body = _entry(line)
        if body is None or AGAIN in body:
            complete = False
        else:
            names.append(body["name"])
    if not complete:
        kept = (line for line in _lines(file) if (body := _entry(line)) is not None and AGAIN not in body)
        write_whole(file, "".join(kept).encode())
    return names


def _drop_partial_line(file: Path) -> None:
    """Truncate a file after its last complete line."""
    if file.is_file():
        with file.open("rb+") as log:
            size = log.seek(0, os.SEEK_END)
            step, complete = 1 << 16, 0
            for start in range(max(0, size - 1) // step * step, -1, -step):
                log.seek(start)
                newline = log.read(step).rfind(b"\n")
                if newline >= 0:
                    complete = start + newline + 1
                    break
            log.truncate(complete)


def _compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs, such as "settings.dtype float32, now bfloat16"."""
    first, second = dict(_flat(before)), dict(_flat(now))
    differing = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    return "; ".join(f"{name} {_end(first.get(name))}, now {_end(second.get(name))}" for name in differing)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield from (
            ((f"{name}.{key}", inner) for key, inner in value.items()) if isinstance(value, dict) else [(name, value)]
        )


def _end(value: Any, most: int = 60) -> str:
    """Return a value as text, or the end of a long one: paths differ there."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= most else f"...{text[-most:]}"
