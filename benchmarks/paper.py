"""Measure the paper's tables on real weights and real data, in one command.

    python dev.py benchmark paper --checkpoint sd21base.safetensors --data FOLDER
    python dev.py benchmark paper --checkpoint sd21base.safetensors --data FOLDER --archives VOC2010 CelebAMask-HQ
    python dev.py benchmark paper --checkpoint sd21base.safetensors --data FOLDER --clip-vision dinov2-large.safetensors

FOLDER has the official layout, ``{car,horse,celeba}/{train_1,train_10,val,test}`` with PNG images and NPY label maps.
With ``--archives`` it is created first, from PASCAL-Part's annotations beside VOC2010's images and from CelebAMask-HQ,
as their authors ship them (benchmarks/archives.py; choices that the paper leaves open are printed). Figures are the
paper's: IoU of every image and class at 512 x 512, mean over images, then over classes with the background, in percent,
over seeds. A flow model has no row for the preset paper. ``--clip-vision`` adds rows for the encoder, alone and beside
the model. Rows that are in the JSON file are not measured again. ``--report`` writes a page to post.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from slime.backbones.text import TextConditioned
from slime.parts.metrics import evaluate

from .archives import OPEN, prepare
from .methods import BESIDE_ENCODER, ENCODER, Learn, Variant, make_methods, trained
from .rows import Row, read_rows, say_row, table_lines, write_rows
from .sources import OFFICIAL_PARTS, Task, folder_task

DOMAINS = ("car", "horse", "celeba")
# Published mean IoU in percent, background included, by number of examples, and the paper's IoU by class with one
# example.
SLIME = "SLiMe, published"
PUBLISHED: Mapping[str, Mapping[tuple[str, int], float]] = {
    SLIME: {("car", 1): 61.6, ("car", 10): 68.3, ("horse", 1): 56.4, ("horse", 10): 63.3, ("celeba", 1): 69.6,
            ("celeba", 10): 75.7},
    "OIParts, published": {("car", 1): 65.2, ("horse", 1): 66.9},
    "SMITE, published": {("car", 10): 69.8, ("horse", 10): 66.2},
}  # fmt: skip
PUBLISHED_CLASSES: Mapping[str, Mapping[str, float]] = {
    "car": {"background": 75.7, "body": 79.6, "light": 37.5, "plate": 46.5, "wheel": 65.0, "window": 65.6},
    "horse": {"background": 74.4, "head": 61.5, "neck+torso": 55.7, "leg": 50.3, "tail": 40.1},
    "celeba": {"background": 81.6, "skin": 86.8, "eye": 61.3, "mouth": 74.8, "nose": 77.5, "brow": 44.2, "ear": 57.1,
               "neck": 78.9, "cloth": 52.6, "hair": 80.9},
}  # fmt: skip


def measure(task: Task, method: str, learn: Learn, shots: int, seed: int) -> Row:
    """Measure the IoU of every class on the test images, in percent."""
    test = task.tests["plain"]
    found = learn(task.examples, seed, task.validation)(test.images)
    per_class = 100 * evaluate(found, test.truths, len(task.names) + 1).per_class
    named = dict(zip(("background", *task.names), per_class.round(2).tolist(), strict=True))
    place = {"method": method, "domain": task.domain, "shots": shots, "seed": seed, "images": len(test.truths)}
    return place | {"miou": float(np.nanmean(per_class)), "classes": named}


def mean(values: Sequence[float]) -> str:
    """Format the mean of the values that are not NaN."""
    known = [value for value in values if value == value]
    return f"{np.mean(known):.1f}" if known else ""


def tables(rows: Sequence[Row]) -> list[str]:
    """Return Markdown lines: means over seeds beside published figures, and tables of classes for every domain."""
    shots = sorted({row["shots"] for row in rows})
    domains = [domain for domain in DOMAINS if any(row["domain"] == domain for row in rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places = [(domain, count) for domain in domains for count in shots]

    def cell(method: str, place: tuple[str, int]) -> str:
        if method in PUBLISHED:
            return f"{PUBLISHED[method][place]:.1f}" if place in PUBLISHED[method] else ""
        found = [row["miou"] for row in rows if (row["method"], row["domain"], row["shots"]) == (method, *place)]
        return f"{np.mean(found):.1f} +- {np.std(found):.1f}" if found else ""

    head = ["mIoU, %", *(f"{domain}, {count}-shot" for domain, count in places)]
    lines = table_lines(head, [[m, *(cell(m, place) for place in places)] for m in (*methods, *PUBLISHED)])
    for domain, count in places:
        here = [row for row in rows if (row["domain"], row["shots"]) == (domain, count)]
        classes = ("background", *OFFICIAL_PARTS[domain])
        body = [
            [m, *(mean([row["classes"][c] for row in here if row["method"] == m]) for c in classes)]
            for m in methods
            if any(row["method"] == m for row in here)
        ]
        if count == 1:
            body.append([SLIME, *(f"{PUBLISHED_CLASSES[domain][c]:.1f}" for c in classes)])
        lines += ["", *table_lines([f"{domain}, {count}-shot", *classes], body)]
    return lines


def report(rows: Sequence[Row], checkpoint: Path, prepared: bool) -> str:
    """Return a page with the figures and how they were obtained."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}"
    images = {row["domain"]: row["images"] for row in rows}
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"# The paper's tables with {checkpoint.name}",
        "",
        f"{device}, torch {torch.__version__}; {seeds} seeds; test images: {images}.",
        "",
        *tables(rows),
    ]
    if prepared:
        lines += ["", "Left open by paper and official code:", "", *(f"- {text}" for text in OPEN)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="SD1.x, SD2.x or SDXL; the paper's is 2.1-base")
    parser.add_argument("--data", type=Path, required=True, help="the official layout, or where it is made")
    parser.add_argument("--archives", type=Path, nargs="+", default=[], help="folders of the unpacked archives")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--clip-vision", type=Path, help="a vision encoder's file, as Load CLIP Vision takes it")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=0, help="test images of a domain at most; 0 for all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    for archive in options.archives:
        counts = prepare(archive, options.data, options.domains, options.images)
        sys.stdout.write(f"{archive}: test images {counts}\n")
    domains = [domain for domain in options.domains if (options.data / domain).is_dir()]
    if not domains:
        parser.error(f"{options.data} has none of {', '.join(options.domains)}.")
    methods = make_methods(options.checkpoint, Variant("instant"), clip_vision=options.clip_vision)
    if not options.methods:
        has_text = isinstance(trained(options.checkpoint), TextConditioned)
        added = (ENCODER, BESIDE_ENCODER) if options.clip_vision else ()
        options.methods = ["default", *(("paper",) if has_text else ()), *added, "feature neighbours", "mean mask"]
    unknown = sorted(set(options.methods) - set(methods))
    if unknown:
        parser.error(f"unknown methods {unknown}; there are: {', '.join(methods)}")
    rows = read_rows(options.json)
    done = {(row["method"], row["domain"], row["shots"], row["seed"]) for row in rows}
    for domain in domains:
        for shots in options.shots:
            for seed in range(options.seeds):
                wanted = [m for m in options.methods if (m, domain, shots, seed) not in done]
                if not wanted:
                    continue
                task = folder_task(options.data, domain, shots, seed, "test", options.images)
                for method in wanted:
                    rows.append(measure(task, method, methods[method], shots, seed))
                    say_row(rows[-1])
                    write_rows(options.json, rows)
    page = report(rows, options.checkpoint, bool(options.archives))
    sys.stdout.write(f"\n{page}")
    if options.report:
        options.report.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
