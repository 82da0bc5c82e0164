"""Measure large sets: images per second beside bare passes over the same images, and memory against their number.

    python dev.py benchmark scale [--pictures 48] [--counts 100 1000 10000] [--json FILE]

Throughput is measured with the tiny model and scenes of 256 pixels, from PNG files to a COCO file, with one and two
threads that load and as many that write. The bare passes encode the images and extract features, without reading or
writing files; they are timed in turns with it. Memory (on Linux) is the peak of a separate process with a very small
vision encoder and images of 96 pixels: what remains is the memory of the engine.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from slime import PartEmbeddings, Segmenter, load_embeddings, preset, save_embeddings, train
from slime.backbones import vit
from slime.backbones.base import Backbone, seeded_noise
from slime.backbones.hf_vit import TransformersVision
from slime.data.formats.coco import Coco
from slime.data.run import Engine, segment_images
from slime.data.run_log import RunLog
from slime.data.sources import SourceImage, source_images
from slime.settings import InstantSettings
from testing import scenes, splits
from testing.inprocess import load_backbone
from testing.server import MODEL

from .rows import Row, say_row, say_table, write_rows

DOMAIN, SMALL = "horse", 96
TOKENS = 8  # per side of the small encoder's grid
KILOBYTE = 1024


def run(backbone: Backbone, embeddings: PartEmbeddings, source: list[SourceImage], workers: int) -> int:
    """Segment into a COCO file; return the bytes of the run log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        output, journal = Coco(out, embeddings, "benchmark"), RunLog(out, {})
        segment_images(Engine(Segmenter(backbone, embeddings)), source, [output], journal, workers)
        output.finish(journal)
        return (out / "records.jsonl").stat().st_size


def throughput(count: int, turns: int) -> list[Row]:
    backbone = load_backbone(MODEL)
    with torch.inference_mode():
        settings = preset("instant", backbone.info, views=8)
        embeddings = train(backbone, [splits.example(DOMAIN, splits.EXAMPLES)], settings)
    rendered = [scenes.render(DOMAIN, splits.TEST + index) for index in range(count)]
    tensors = [torch.from_numpy(scene.image)[None].float() / 255 for scene in rendered]
    plan = embeddings.extraction_spec().to(backbone.device)

    def bare() -> None:
        with torch.inference_mode():
            for image in tensors:
                encoded = backbone.encode_images(image.to(backbone.device))
                backbone.extract(encoded, plan, seeded_noise(encoded.shape, 0, encoded.device))

    with tempfile.TemporaryDirectory() as folder:
        for index, scene in enumerate(rendered):
            Image.fromarray(scene.image).save(Path(folder) / f"{index:05d}.png")
        source = list(source_images(folder))
        works: dict[str, Callable[[], object]] = {
            "bare passes": bare,
            "1 worker": lambda: run(backbone, embeddings, source, 1),
            "2 workers": lambda: run(backbone, embeddings, source, 2),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(turns):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
        size = run(backbone, embeddings, source, 1)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    rows: list[Row] = [
        {"work": name, "pictures_a_second": count / taken, "of_bare": seconds["bare passes"] / taken}
        for name, taken in seconds.items()
    ]
    return [*rows, {"work": "journal", "bytes_a_picture": size / count}]


def small_encoder() -> Backbone:
    from transformers import Dinov2Config, Dinov2Model

    vit.TOKENS = TOKENS
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1}
    return TransformersVision(Dinov2Model(Dinov2Config(image_size=112, patch_size=14, **config)))


def child(count: int, file: Path) -> None:
    """Segment ``count`` images in a process of their own, and print its peak memory in MB."""
    backbone, embeddings, data = small_encoder(), load_embeddings(file), io.BytesIO()
    Image.fromarray(scenes.render(DOMAIN, splits.TEST, size=SMALL).image).save(data, "PNG")
    source = [SourceImage(f"{index:06d}.png", data.getvalue) for index in range(count)]
    run(backbone, embeddings, source, 2)
    # The value of getrusage starts with the peak of the process that this one was forked from.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    sys.stdout.write(f"{int(status.partition('VmHWM:')[2].split()[0]) / KILOBYTE:.0f}\n")


def memory(counts: list[int]) -> list[Row]:
    rows: list[Row] = []
    settings = InstantSettings(views=2, read_layers="block.1", propagate_layers="block.1")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "learned.safetensors"
        save_embeddings(train(small_encoder(), [splits.example(DOMAIN, splits.EXAMPLES)], settings), file)
        for count in counts:
            start = time.perf_counter()
            line = [sys.executable, "-m", "benchmarks.scale", "--child", str(count), "--embeddings", str(file)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            megabytes = int(done.stdout.split()[-1])
            rows.append({"work": f"{count} pictures", "peak_mb": megabytes, "seconds": time.perf_counter() - start})
            say_row(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=48, help="of the throughput")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10000], help="of the memory")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--embeddings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.embeddings)
        return
    rows = throughput(options.pictures, options.turns)
    for row in rows:
        say_row(row)
    rows += memory(options.counts)
    write_rows(options.json, rows)
    found = [row for row in rows if "of_bare" in row]
    say_table(
        ["work", "pictures a second", "of the bare passes"],
        ([row["work"], f"{row['pictures_a_second']:.2f}", f"{row['of_bare']:.2f}"] for row in found),
    )
    say_table(["pictures", "peak, MB"], ([row["work"], str(row["peak_mb"])] for row in rows if "peak_mb" in row))


if __name__ == "__main__":
    main()
