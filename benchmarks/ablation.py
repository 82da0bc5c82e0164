"""Measure the effect of each choice: one change at a time, on validation scenes.

    python dev.py benchmark ablation [--tables paper-decoder paper-training paper-differences default segmentation
        refinement] [--scenes 12] [--shots 1 10] [--seeds 1] [--json FILE] [--checkpoint FILE --data FOLDER]

The "paper" tables change one thing in the paper's preset, the "default" tables one thing in ours. With ``--json`` an
interrupted run resumes where it stopped. With ``--checkpoint`` and ``--data`` the same is measured on real weights and
photographs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.pack.shapes import SLIME_FAMILY
from slime import SegmentSettings, segment
from slime.decode import refine as refinement
from slime.parts.metrics import boundary_f, evaluate
from testing import scenes
from testing.recipes import PAPER_LAYERS
from testing.tiny.weights import TESTBED

from .feature_baselines import bilateral, pamr
from .methods import Variant, remember, trained
from .rows import Row, read_rows, say_row, say_table, shared, write_rows
from .sources import OFFICIAL_PARTS, Task, as_tensor, folder_task, scene_task

OFF, FAST, ALL = {"refine": "off"}, {"refine": "fast"}, "input.0-11, middle.0, output.0-11"
SHARE, STEPS = "decode.linear.PROPAGATED_SHARE", "decode.linear.PROPAGATION_STEPS"

PAPER_DECODER = {
    "paper": Variant("paper"),
    "softmax over the parts alone": Variant("paper", official={"all_tokens": False}),
    "no gate": Variant("paper", official={"gate": 0.0}),
    "no mean threshold": Variant("paper", official={"subtract_mean": False}),
    "no rescaling": Variant("paper", official={"rescale": False}),
    "order 2": Variant("paper", official={"order": 2}),
    "our decoder": Variant("paper", linear=True, segment=OFF),
    "our decoder, no propagation": Variant("paper", linear=True, segment=OFF, constants={SHARE: 0.0}),
    "our decoder, guided filter": Variant("paper", linear=True, segment=FAST),
    "test t 20": Variant("paper", embeddings={"timestep": 20}),
    "test t 60": Variant("paper", embeddings={"timestep": 60}),
    "test t 150": Variant("paper", embeddings={"timestep": 150}),
    "test t 200": Variant("paper", embeddings={"timestep": 200}),
    "2 noise samples": Variant("paper", segment={"noise_samples": 2}),
    "4 noise samples": Variant("paper", segment={"noise_samples": 4}),
    "flip averaging": Variant("paper", segment={"average_flip": True}),
}

# Changes to the training are measured with our decoder: the gate of the official one hides most of them.
_READ: dict[str, Any] = {"linear": True, "segment": FAST}
PAPER_TRAINING = {
    "paper, our decoder": Variant("paper", **_READ),
    "lr 0.01": Variant("paper", {"learning_rate": 0.01}, **_READ),
    "no regulariser": Variant("paper", constants={"paper.train.SD_WEIGHT": 0.0}, **_READ),
    "regulariser 0.05": Variant("paper", constants={"paper.train.SD_WEIGHT": 0.05}, **_READ),
    "regulariser without guidance": Variant(
        "paper", constants={"paper.train.SD_WEIGHT": 1.0, "paper.train.GUIDANCE": 1.0}, **_READ
    ),
    "no WAS loss": Variant("paper", constants={"paper.train.WAS_WEIGHT": 0.0}, **_READ),
    "no augmentation": Variant("paper", {"smallest_crop": 1.0, "rotation": 0.0, "blur": 0.0, "flip": False}, **_READ),
    "recoloured views": Variant("paper", {"recolor": 1.0}, **_READ),
    "20 views": Variant("paper", {"views": 20}, **_READ),
    "40 views": Variant("paper", {"views": 40}, **_READ),
    "the tiny model's layers": Variant(
        "paper", {"read_layers": SLIME_FAMILY["cross"], "propagate_layers": SLIME_FAMILY["self_"]}, **_READ
    ),
}

# Differences of the official code, as far as they can be reproduced here; the second row shows how much is chance.
PAPER_DIFFERENCES = {
    "paper": Variant("paper"),
    "paper, other views and noise": Variant("paper", {"seed": 1000}),
    "images as BGR": Variant("paper", bgr=True),
    "tokens evaluated at every step": Variant("paper", constants={"paper.train.EVALUATION_STEPS": 1}),
}

DEFAULT = {
    "default": Variant("instant"),
    "recoloured": Variant("instant", {"recolor": 1.0}),
    "no recolouring": Variant("instant", {"recolor": 0.0}),
    "12 views": Variant("instant", {"views": 12}),
    "48 views": Variant("instant", {"views": 48}),
    "96 views": Variant("instant", {"views": 96}),
    "one vector per layer": Variant("instant", info={"grouping": "layer"}),
    "L2 0.001": Variant("instant", constants={"training.fit.L2": 0.001}),
    "L2 0.01": Variant("instant", constants={"training.fit.L2": 0.01}),
    "L2 0.3": Variant("instant", constants={"training.fit.L2": 0.3}),
    "class weights ** 0.5": Variant("instant", constants={"training.losses.WEIGHT_EXPONENT": 0.5}),
    "no class weights": Variant("instant", constants={"training.losses.WEIGHT_EXPONENT": 0.0}),
    "crops from 0.4": Variant("instant", {"smallest_crop": 0.4}),
    "no crops": Variant("instant", {"smallest_crop": 1.0}),
    "no flips": Variant("instant", {"flip": False}),
    "no rotation": Variant("instant", {"rotation": 0.0}),
    "no blur": Variant("instant", {"blur": 0.0}),
    "t 20": Variant("instant", {"timestep": 20}),
    "t 60": Variant("instant", {"timestep": 60}),
    "t 200": Variant("instant", {"timestep": 200}),
    "the paper's layers": Variant("instant", PAPER_LAYERS),
    "all layers": Variant("instant", {"read_layers": ALL}),
    "layers by probe": Variant("instant", {"read_layers": "auto", "propagate_layers": "auto"}),
    "30 iterations": Variant("instant", constants={"training.instant.STEPS": 30}),
    "300 iterations": Variant("instant", constants={"training.instant.STEPS": 300}),
}

SEGMENTATION = {
    "default": Variant("instant"),
    "no propagation": Variant("instant", constants={SHARE: 0.0}),
    "propagated map alone": Variant("instant", constants={SHARE: 1.0}),
    "order 2": Variant("instant", constants={STEPS: 2}),
    "2 noise samples": Variant("instant", segment={"noise_samples": 2}),
    "4 noise samples": Variant("instant", segment={"noise_samples": 4}),
    "flip averaging": Variant("instant", segment={"average_flip": True}),
    "flip averaging, 2 noise samples": Variant("instant", segment={"average_flip": True, "noise_samples": 2}),
    "2 x 2 crops": Variant("instant", segment={"tiles": 2}),
    "closeups": Variant("instant", segment={"closeups": 1}),
    "no filter": Variant("instant", segment=OFF),
}

TABLES = {
    "paper-decoder": PAPER_DECODER,
    "paper-training": PAPER_TRAINING,
    "paper-differences": PAPER_DIFFERENCES,
    "default": DEFAULT,
    "segmentation": SEGMENTATION,
}


def guided(radius: float) -> Callable[[Tensor, Tensor], Tensor]:
    def run(maps: Tensor, images: Tensor) -> Tensor:
        kept, refinement.RADIUS = refinement.RADIUS, radius
        try:
            return refinement.refine_maps(maps, images, "fast")
        finally:
            refinement.RADIUS = kept

    return run


REFINEMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "off (bilinear)": lambda maps, images: refinement.refine_maps(maps, images, "off"),
    "fast (guided, 2 cells, at half of a cell)": guided(2.0),
    "guided, 1 cell": guided(1.0),
    "guided, 3 cells": guided(3.0),
    "best (guided, 2 cells, full size)": lambda maps, images: refinement.refine_maps(maps, images, "best"),
    "joint bilateral (kornia)": bilateral,
    "PAMR, 10 iterations": pamr,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES, "refinement"], default=[*TABLES, "refinement"])
    parser.add_argument("--only", nargs="+", default=[], help="rows of the tables to run, beside the first")
    parser.add_argument("--checkpoint", type=Path, default=TESTBED)
    parser.add_argument("--data", type=Path, help="folder in the official layout; its validation split is used")
    parser.add_argument("--domains", nargs="+", choices=list(OFFICIAL_PARTS), default=list(scenes.DOMAINS))
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asked = shared(options, "checkpoint", "data", "scenes")
    rows = read_rows(options.json, asked)
    runs = [
        (name, shots, seed, domain)
        for name in options.tables
        for shots in options.shots
        for seed in range(options.seeds)
        for domain in options.domains
    ]
    for name, shots, seed, domain in runs:
        if options.data:
            task = folder_task(options.data, domain, shots, seed, "validation")
        else:
            task = scene_task(domain, shots, seed, options.scenes, "validation", style=scenes.NATURAL)
        place = {"table": name, "domain": domain, "shots": shots, "seed": seed}
        done = {row["change"] for row in rows if place.items() <= row.items()}
        measure = refinement_rows if name == "refinement" else variant_rows
        for row in measure(task, name, seed, done, options):
            rows.append(place | row)
            say_row(rows[-1])
            write_rows(options.json, rows, asked=asked)
    summarise(rows, options.tables)


def variant_rows(task: Task, table: str, seed: int, done: set[str], options: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for every change; identical trainings are run once."""
    backbone, test = trained(options.checkpoint), task.tests["plain"]
    learned: dict[str, tuple[Any, float]] = {}
    remember(backbone, test.images)
    for index, (change, variant) in enumerate(TABLES[table].items()):
        if change in done or (options.only and index and change not in options.only):
            continue
        key = json.dumps([variant.preset, variant.train, variant.info, variant.constants, variant.bgr], sort_keys=True)
        if key not in learned:
            start = time.monotonic()
            learned[key] = variant.fit(backbone, task.examples, seed), time.monotonic() - start
        embeddings, learning = learned[key]
        start = time.monotonic()
        found = variant.find(backbone, embeddings, test.images, seed)
        seconds = (time.monotonic() - start) / len(found)
        yield {"change": change, "learning_s": learning, "image_s": seconds} | figures(task, found)


def refinement_rows(task: Task, table: str, seed: int, done: set[str], options: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for every edge-aware filter, all on the same maps."""
    backbone, images = trained(options.checkpoint), as_tensor(task.tests["plain"].images)
    with torch.inference_mode():
        embeddings = Variant("instant").fit(backbone, task.examples, seed)
        # The maps before the filter: the bilinearly enlarged ones, reduced to their own grid again.
        maps = segment(backbone, images, embeddings, SegmentSettings(seed=seed, refine="off"))[0].probabilities
        side = images.shape[1] // backbone.info.cell
        maps = F.interpolate(maps, size=(side, side), mode="area")
        for change, method in REFINEMENTS.items():
            if change in done:
                continue
            start = time.monotonic()
            found = torch.cat([method(maps[i : i + 1], images[i : i + 1]) for i in range(len(images))])
            seconds = (time.monotonic() - start) / len(images)
            labels = list(found.argmax(1).numpy())
            yield {"change": change, "learning_s": 0.0, "image_s": seconds} | figures(task, labels)


def figures(task: Task, found: Sequence[np.ndarray]) -> dict[str, float]:
    truths, classes = task.tests["plain"].truths, len(task.names) + 1
    scores = evaluate(found, truths, classes)
    boundary = [boundary_f(a, b, classes) for a, b in zip(found, truths, strict=True)]
    return {"part_miou": scores.part_miou, "miou": scores.miou, "boundary_f": float(np.nanmean(boundary))}


def summarise(rows: Sequence[Row], tables: Sequence[str]) -> None:
    """Print a table of part mIoU by domain for every table and number of examples."""
    for name in tables:
        for shots in sorted({row["shots"] for row in rows if row["table"] == name}):
            mine = [row for row in rows if (row["table"], row["shots"]) == (name, shots)]
            domains = list(dict.fromkeys(row["domain"] for row in mine))
            lines = []
            for change in dict.fromkeys(row["change"] for row in mine):
                chosen = [row for row in mine if row["change"] == change]
                found = [[r["part_miou"] for r in chosen if r["domain"] == domain] for domain in domains]
                means = [float(np.mean(values)) for values in found if values]
                cells = [f"{np.mean(values):.3f}" if values else "" for values in found]
                more = (np.mean([r[key] for r in chosen]) for key in ("boundary_f", "image_s"))
                lines.append([change, *cells, *(f"{value:.3f}" for value in (np.mean(means), *more))])
            head = ["change", *domains, "mean", "boundary F", "an image, s"]
            say_table(head, lines, f"{name}, {shots} examples: part mIoU")


if __name__ == "__main__":
    main()
