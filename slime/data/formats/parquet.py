"""Parquet tables of parts, for more images than one JSON file should hold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from ...files import write_whole
from ..records import Record
from ..run_log import RunLog
from .base import Format


class Parquet(Format):
    """Write ``parts-*.parquet``: one row per image, its parts as a list with COCO's run lengths; 20,000 rows a file."""

    ROWS = 20_000

    def finish(self, run_log: RunLog) -> None:
        import pyarrow.parquet as parquet

        records, number = run_log.records(), 0
        while (rows := list(islice(records, self.ROWS))) or not number:
            data = io.BytesIO()
            parquet.write_table(table(rows, self.names), data)
            write_whole(self.folder / f"parts-{number:05d}.parquet", data.getvalue())
            number += 1


def table(records: Sequence[Record], names: Sequence[str], errors: Sequence[tuple[str, str]] = ()) -> Any:
    """Return a pyarrow table of records, and of the names and reasons of images that failed."""
    import pyarrow as pa

    integer, text, real = pa.int64(), pa.string(), pa.float64()
    part = [("name", text), ("label", integer), ("score", real), ("area", integer), ("bbox", pa.list_(integer))]
    whole = [("image", text), ("height", integer), ("width", integer), ("confidence", real)]
    parts = ("parts", pa.list_(pa.struct([*part, ("counts", text)])))
    rows = [
        asdict(record)
        | {"image": record.name, "parts": [asdict(p) | {"name": names[p.label - 1]} for p in record.parts]}
        for record in records
    ]
    rows += [{"image": name, "error": reason} for name, reason in errors]
    return pa.Table.from_pylist(rows, schema=pa.schema([*whole, parts, ("error", text)]))
