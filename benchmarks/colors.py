"""Measure the check of colours: what it finds, and what training with and without recoloured views gives.

    python dev.py benchmark colors [--split validation] [--seeds 2] [--shots 1 10] [--scenes 6] [--json FILE]

Natural scenes of the test bed, and a red stripe beside others of the same shape on a white body, where the colour is
the part: called "red stripe", and just "stripe".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime import Example, preset, segment, train
from slime.backbones.base import Backbone
from slime.parts.metrics import evaluate
from testing import scenes
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

from .rows import Row, read_rows, say_row, say_table, shared, write_rows
from .sources import as_tensor, scene_task

STRIPES = {"red stripe": "red stripe", "red stripe, called stripe": "stripe"}  # name of the part
COLORS = ((200, 30, 40), (30, 60, 200), (40, 160, 60), (230, 190, 40))  # red is the part
SIDE = 256


def striped(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a white body with four stripes in any order on a noisy background: image uint8 and labels [H, W]."""
    rng = np.random.default_rng(seed)
    ground = rng.uniform(60, 160, 3) + rng.normal(0, 12, (SIDE, SIDE, 3))
    left, top = rng.integers(20, 60, 2)
    width, height = rng.integers(140, 180, 2)
    image, labels = ground, np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = 235 + rng.normal(0, 6, (height, width, 3))
    for place, color in enumerate(rng.permutation(len(COLORS))):
        start = left + 10 + place * (width - 10) // len(COLORS)
        columns, rows = slice(start, start + 22), slice(top + 12, top + height - 12)
        image[rows, columns] = np.array(COLORS[color]) + rng.normal(0, 8, image[rows, columns].shape)
        if color == 0:
            labels[rows, columns] = 1
    return image.clip(0, 255).astype(np.uint8), labels


def stripes(name: str, shots: int, seed: int, count: int) -> tuple[list[Example], np.ndarray, list[np.ndarray]]:
    """Return examples, test images, and their labels."""
    labelled = [striped(10_000 * (seed + 1) + index) for index in range(shots)]
    examples = [
        Example.from_label_map(as_tensor([image])[0], torch.from_numpy(labels).long(), [name])
        for image, labels in labelled
    ]
    tests = [striped(index) for index in range(count)]
    return examples, np.stack([image for image, _ in tests]), [labels for _, labels in tests]


def score(backbone: Backbone, examples: list[Example], images: Tensor, truths: list[np.ndarray], **changes: Any) -> Row:
    """Train, segment the test images, and return part mIoU and what the check found."""
    with torch.inference_mode():
        embeddings = train(backbone, examples, preset("instant", backbone.info, **changes))
        found = segment(backbone, images, embeddings)[0].label_map.numpy()
    figure = evaluate(list(found), truths, len(examples[0].names) + 1).part_miou
    return {"part_miou": figure, "check": embeddings.settings.get("color_check")}


def run(options: argparse.Namespace) -> list[Row]:
    """Measure every case with "auto", "off" and "strong"; cases of an earlier run are kept."""
    backbone = load_backbone(TESTBED)
    asked = shared(options, "split", "scenes")
    rows, style = read_rows(options.json, asked), scenes.NATURAL
    known = {(row["domain"], row["seed"], row["shots"]) for row in rows}
    for domain in (*scenes.DOMAINS, *STRIPES):
        for shots in options.shots:
            for seed in range(options.seeds):
                if (domain, seed, shots) in known:
                    continue
                if domain in STRIPES:
                    examples, images, truths = stripes(STRIPES[domain], shots, seed, options.scenes)
                else:
                    task = scene_task(domain, shots, seed, options.scenes, options.split, style=style)
                    examples, tests = list(task.examples), task.tests["plain"]
                    images, truths = tests.images, list(tests.truths)
                results = {
                    name: score(backbone, examples, as_tensor(images), truths, seed=seed, recolor=value)
                    for name, value in (("auto", None), ("off", 0.0), ("strong", 1.0))
                }
                check = results["auto"]["check"]["recolored"]
                row = {"domain": domain, "seed": seed, "shots": shots, "recolored": check}
                row |= {name: result["part_miou"] for name, result in results.items()}
                say_row(row)
                rows.append(row)
                write_rows(options.json, rows, asked=asked)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, default=2, help="sets of examples")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--scenes", type=int, default=6, help="test scenes")
    parser.add_argument("--json", type=Path, help="keep rows in this file, and go on from it")
    rows = run(parser.parse_args())
    heads = ["domain", "seed", "shots", "recolored", "auto", "off", "strong"]
    say_table(
        heads,
        [
            [
                f"{row[head]:.2f}"
                if isinstance(row[head], float)
                else ("name" if row[head] is None else str(row[head]))
                for head in heads
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
