"""Rows of figures: in files, one per line, and as Markdown tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DIGITS = 6


def read_rows(path: Path | None, asked: dict[str, Any] | None = None) -> list[Row]:
    """Return the rows of an earlier run, if there was one; end the program if that was asked for something else.

    ``asked`` names the options that every row of a file must share; give it to :func:`write_rows` too.
    """
    if path is None or not path.is_file():
        return []
    body = json.loads(path.read_text(encoding="utf-8"))
    before, now = body.get("asked", asked) or {}, asked or {}
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        raise SystemExit(f"{path} has rows with another {', '.join(differing)}; choose another file.")
    return list(body["rows"])


def write_rows(path: Path | None, rows: Sequence[Row], **about: Any) -> None:
    """Write compact JSON {about..., "rows": [...]} with rounded figures; without a path write nothing.

    What a file of that name says about its rows stays.
    """
    if path is not None:
        if path.is_file():
            about = json.loads(path.read_text(encoding="utf-8")) | about
            about.pop("rows")
        head = "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in about.items())
        lines = ",\n".join(json.dumps(_rounded(row), separators=(",", ":")) for row in rows)
        path.write_text(f'{{{head}"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def shared(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return these options, for :func:`read_rows`; of paths the names."""
    values = {name: getattr(options, name) for name in names}
    return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}


def say_row(row: Row) -> None:
    """Print a row as soon as it is measured."""
    sys.stdout.write(f"{json.dumps(_rounded(row))}\n")
    sys.stdout.flush()


def say_table(head: Sequence[str], lines: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a Markdown table."""
    sys.stdout.write(f"\n{title}\n" if title else "")
    sys.stdout.write("\n" + "\n".join(table_lines(head, lines)) + "\n")


def table_lines(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    body = [f"| {' | '.join(cells)} |" for cells in lines]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value
