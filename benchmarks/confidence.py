"""Measure how well part probabilities are calibrated, and how well a missing object is detected.

    python dev.py benchmark confidence [--shots 1 10] [--seeds 3] [--scenes 30] [--dtype bfloat16] [--json FILE]

Calibration: the expected calibration error of the most probable class of every pixel, in ten bins (Guo et al. 2017),
with the temperature that training found (``LinearDecoder.temperature``) and without. Absence: the area under the ROC
curve of :attr:`slime.PartMaps.confidence` between scenes with the object and images of the other domains. For several
thresholds of ``min_confidence`` also the part mIoU that is left, and the labelled area of the images without the
object.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from slime import PartEmbeddings, PartMaps, segment
from slime.backbones.base import Backbone
from slime.decode.linear import LinearDecoder
from slime.parts.metrics import evaluate
from testing import scenes
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

from .methods import Variant, encode_once, remember
from .rows import Row, say_row, say_table, write_rows
from .sources import OTHER, LabelledImages, Task, as_tensor, scene_task

BINS = 10
THRESHOLDS = (0.6, 0.7, 0.8, 0.9)


def calibration_error(probability: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean gap between probability and accuracy, weighted by bin counts."""
    bin_of = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    gap = np.bincount(bin_of, probability, bins) - np.bincount(bin_of, right.astype(float), bins)
    return float(np.abs(gap).sum() / count.sum())


def area_under_roc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive's score is higher than a negative's; ties count half."""
    above = (positive[:, None] > negative[None]).mean()
    return float(above + 0.5 * (positive[:, None] == negative[None]).mean())


def segment_at_once(backbone: Backbone, test: LabelledImages, embeddings: PartEmbeddings) -> PartMaps:
    with torch.inference_mode():
        return segment(backbone, as_tensor(test.images), embeddings)[0]


def figures(backbone: Backbone, task: Task, seed: int) -> dict[str, float]:
    """Measure all figures of one set of examples."""
    embeddings = Variant("instant").fit(backbone, task.examples, seed)
    here, other = task.tests["plain"], task.tests[OTHER]
    truth, classes = np.stack(here.truths), len(task.names) + 1
    raw = replace(embeddings, decoder=LinearDecoder())
    found, foreign = segment_at_once(backbone, here, embeddings), segment_at_once(backbone, other, embeddings)
    row = {"auc": area_under_roc(found.confidence.numpy(), foreign.confidence.numpy())}
    for name, maps in (("calibration_error", found), ("uncalibrated_error", segment_at_once(backbone, here, raw))):
        best = maps.probabilities.max(1)
        row[name] = calibration_error(best.values.numpy().ravel(), (best.indices.numpy() == truth).ravel())
    for threshold in (0.0, *THRESHOLDS):
        kept, lost = ((maps.confidence >= threshold).numpy()[:, None, None] for maps in (found, foreign))
        row[f"part_miou_{threshold}"] = evaluate(list(found.label_map.numpy() * kept), list(truth), classes).part_miou
        row[f"false_area_{threshold}"] = float((foreign.label_map.numpy() * lost > 0).mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TESTBED)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of the UNet; ComfyUI's choice")
    parser.add_argument("--shots", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=30, help="test scenes a domain, and half as many of the others")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    backbone = encode_once(load_backbone(options.checkpoint, dtype), {})
    rows: list[Row] = []
    for shots in options.shots:
        for domain in scenes.DOMAINS:
            for seed in range(options.seeds):
                task = scene_task(domain, shots, seed, options.scenes, options.split, ("plain", OTHER), scenes.NATURAL)
                for test in task.tests.values():
                    remember(backbone, test.images)
                place = {"shots": shots, "domain": domain, "seed": seed}
                rows.append(place | figures(backbone, task, seed))
                say_row(rows[-1])
                write_rows(options.json, rows)
    summarise(rows)


def summarise(rows: Sequence[Row]) -> None:
    """Print tables of means over domains and seeds."""

    def means(shots: int, *keys: str) -> list[str]:
        return [f"{np.mean([row[key] for row in rows if row['shots'] == shots]):.3f}" for key in keys]

    every = sorted({row["shots"] for row in rows})
    errors = ("calibration_error", "uncalibrated_error", "auc")
    head = ["shots", "ECE", "ECE without the temperature", "AUC of absence"]
    say_table(head, ([str(shots), *means(shots, *errors)] for shots in every))
    lines = [
        [str(shots), str(threshold or "off"), *means(shots, f"part_miou_{threshold}", f"false_area_{threshold}")]
        for shots in every
        for threshold in (0.0, *THRESHOLDS)
    ]
    say_table(["shots", "min_confidence", "part mIoU", "false area"], lines)


if __name__ == "__main__":
    main()
