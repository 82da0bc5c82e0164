"""Segment sets that are too large for one machine, with an actor of Ray Data. Needs the extra ``ray``.

Ray reads, shares out, tries again and writes; what is done it notes itself (its checkpoints), so that a run that was
stopped goes on. Nothing of that is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import PartEmbeddings, Segmenter, SegmentSettings
from ..backbones.load import load_model
from ..errors import SlimeError
from .formats import table
from .pixels import SUFFIXES
from .records import Record
from .run import Engine, Loaded

NAME, BYTES = "path", "bytes"  # columns, as Ray's reader of files calls them
SHARE = 0.1  # of a CPU that an actor asks for: their number is given, and readers must not wait for them


class SegmentActor:
    """An actor that loads the model once and segments batches of images.

    Args:
        model: arguments of :func:`slime.backbones.load.load_model`.
        embeddings: what was learned.
        settings: of the extraction and the decoding.
    """

    def __init__(self, model: Sequence[str], embeddings: PartEmbeddings, settings: SegmentSettings) -> None:
        self.engine = Engine(Segmenter(load_model(*model), embeddings, settings))
        self.names = embeddings.names

    def __call__(self, rows: Any) -> Any:
        """Turn a table with columns "path" and "bytes" into one with one record per row: :func:`.formats.table`."""
        errors: list[tuple[str, str]] = []
        buckets: dict[tuple[int, ...], list[Loaded]] = {}
        for name, data in zip(rows[NAME].to_pylist(), rows[BYTES].to_pylist(), strict=True):
            try:
                loaded = self.engine.load(name, data or b"")
            except SlimeError as error:
                errors.append((name, str(error)))
                continue
            buckets.setdefault(loaded.size, []).append(loaded)
        records: list[Record] = []
        for size, bucket in buckets.items():
            count = self.engine.batch(size)
            for start in range(0, len(bucket), count):
                records += self._segment(bucket[start : start + count], errors)
        found = table(records, self.names, errors)
        return found.rename_columns([NAME if column == "image" else column for column in found.column_names])

    def _segment(self, batch: list[Loaded], errors: list[tuple[str, str]]) -> list[Record]:
        """Segment images; one that fails does not lose the others."""
        try:
            return [finish()[0] for finish in self.engine.segment(batch)]
        except SlimeError as error:
            if len(batch) > 1:
                return [found for one in batch for found in self._segment([one], errors)]
            errors.append((batch[0].name, str(error)))
            return []


def segment_with_ray(
    source: str,
    output: str,
    model: Sequence[str],
    embeddings: PartEmbeddings,
    settings: SegmentSettings,
    *,
    kind: str = "parquet",
    actors: int = 1,
    gpus: float = 0,
    batch: int = 16,
    address: str = "",
) -> None:
    """Segment a set on a Ray cluster.

    Args:
        source: a folder of images, or Parquet files with columns "path" and "bytes", on anything that Ray reads.
        output: folder for shards of Parquet or JSON lines, likewise.
        model, embeddings, settings: see :class:`SegmentActor`; the model's path must be there on every machine.
        kind: "parquet" or "jsonl".
        actors: how many models at once, and ``gpus`` for each.
        batch: images an actor is given at once.
        address: of a running cluster; empty for one on this machine.
    """
    import ray
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    if not ray.is_initialized():
        ray.init(address=address or None, log_to_driver=False)
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column=NAME, checkpoint_path=f"{output.rstrip('/')}/.checkpoint", delete_checkpoint_on_success=False
    )
    if source.endswith(".parquet"):
        images = ray.data.read_parquet(source, columns=[NAME, BYTES])
    else:
        extensions = sorted(suffix.removeprefix(".") for suffix in SUFFIXES)
        images = ray.data.read_binary_files(source, include_paths=True, file_extensions=extensions)
    found = images.map_batches(
        SegmentActor,
        fn_constructor_args=(tuple(model), embeddings, settings),
        batch_size=batch,
        batch_format="pyarrow",
        concurrency=actors,
        num_gpus=gpus or None,
        num_cpus=SHARE,
    )
    if kind == "jsonl":
        found.write_json(output)
    else:
        found.write_parquet(output)
