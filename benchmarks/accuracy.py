"""Part IoU: the presets beside trivial baselines, the same UNet's features without training, the untrained UNet and the
grid's ceiling.

    python dev.py benchmark accuracy [--quick] [--json FILE] [--methods ...] [--shots 1 5 10] [--scenes 100]
    python dev.py benchmark accuracy --split validation --methods default --set recolor=0 --read-out mix=0
    python dev.py benchmark accuracy --checkpoint sd21.safetensors --data FOLDER --domains car horse celeba

Test scenes, teaching examples and training scenes have disjoint seeds (demo/splits.py); ``--split validation`` is what
defaults were chosen on. With ``--json`` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo import scenes
from demo.baselines import color_neighbours, mean_mask
from demo.inprocess import load_denoiser
from demo.server import MODEL
from demo.untrained import write_untrained
from slime import SegmentSettings, preset, segment, train
from slime.attention import resize_maps
from slime.augment import soft_labels
from slime.embeddings import default_palette
from slime.metrics import boundary_f, evaluate
from slime.visualize import color_labels

from .rivals import feature_neighbours
from .sources import OFFICIAL_PARTS, Task, as_tensor, folder_task, scene_task

Predict = Callable[[Task, int], list[np.ndarray]]
DEFAULT_METHODS = ("default", "feature neighbours", "untrained", "mean mask", "colour neighbours", "grid ceiling")
GRID_PICTURES = 4


@functools.cache
def trained(checkpoint: Path) -> Any:
    return load_denoiser(checkpoint)


@functools.cache
def untrained(checkpoint: Path) -> Any:
    return load_denoiser(write_untrained(checkpoint, Path(tempfile.mkdtemp()) / "untrained.safetensors"))


def learned(get_denoiser: Callable[[], Any], name: str, options: argparse.Namespace) -> Predict:
    """Train a preset on the task's examples and segment its images."""

    def predict(task: Task, seed: int) -> list[np.ndarray]:
        denoiser = get_denoiser()
        refine = "off" if name == "paper" else options.refine
        with torch.inference_mode():
            changes = assignments(options.set)
            embeddings = train(denoiser, task.examples, preset(name, denoiser.family, seed=seed, **changes))
            read_out = dataclasses.replace(embeddings.read_out, **assignments(options.read_out))
            embeddings = dataclasses.replace(embeddings, read_out=read_out)
            settings = SegmentSettings(refine=refine, seed=seed, crops=options.crops)
            maps = segment(denoiser, as_tensor(task.images), embeddings, settings)[0]
        return list(maps.label_map.numpy())

    return predict


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """ "recolor=0" -> {"recolor": 0}; values are JSON, anything else is text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def grid_ceiling(task: Task, _seed: int) -> list[np.ndarray]:
    """The truth averaged to the latent's grid and brought back bilinearly: what no read-out of that grid can exceed."""
    found = []
    for truth in task.truths:
        height, width = truth.shape
        small = soft_labels(torch.from_numpy(truth), len(task.names) + 1, (height // 8, width // 8))
        found.append(resize_maps(small[None], (height, width))[0].argmax(0).numpy())
    return found


def make_methods(options: argparse.Namespace) -> dict[str, Predict]:
    ours = functools.partial(trained, options.checkpoint)
    methods: dict[str, Predict] = {
        "default": learned(ours, "instant", options),
        "thorough": learned(ours, "thorough", options),
        "paper": learned(ours, "paper", options),
        "untrained": learned(functools.partial(untrained, options.checkpoint), "instant", options),
        "feature neighbours": lambda task, seed: feature_neighbours(
            ours(), task.examples, as_tensor(task.images), seed=seed
        ),
        "mean mask": lambda task, seed: [mean_mask(task.examples)] * len(task.truths),
        "colour neighbours": lambda task, seed: color_neighbours(task.examples, task.images),
        "grid ceiling": grid_ceiling,
    }
    return methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, help="folder in the official layout; default is rendered scenes")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS))
    parser.add_argument("--domains", nargs="+", choices=list(OFFICIAL_PARTS), default=list(scenes.DOMAINS))
    parser.add_argument("--variation", choices=list(scenes.VARIATIONS), default="plain")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, default=3, help="sets of teaching examples")
    parser.add_argument("--scenes", type=int, default=100, help="test scenes a domain")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--refine", choices=["off", "fast", "best"], default="fast")
    parser.add_argument("--crops", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="training settings, for ablations")
    parser.add_argument("--read-out", nargs="+", default=[], metavar="NAME=VALUE", help="read-out settings: order, mix")
    parser.add_argument("--quick", action="store_true", help="one seed, 1 and 10 shots, 20 scenes")
    parser.add_argument("--json", type=Path, help="write rows here after every one, and go on from them")
    parser.add_argument("--picture", type=Path, help="write a grid: image, truth, each method")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.scenes, options.shots = 1, 20, [1, 10]
    methods = make_methods(options)
    unknown = sorted(set(options.methods) - set(methods))
    if unknown:
        parser.error(f"unknown methods {unknown}; there are: {', '.join(methods)}")
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.is_file() else []
    done = {(row["method"], row["domain"], row["shots"], row["seed"]) for row in rows}
    pictures: list[np.ndarray] = []
    for seed in range(options.seeds):
        for domain in options.domains:
            for shots in options.shots:
                wanted = [m for m in options.methods if (m, domain, shots, seed) not in done]
                if not wanted:
                    continue
                if options.data:
                    task = folder_task(options.data, domain, shots, seed, options.split)
                else:
                    task = scene_task(domain, shots, seed, options.scenes, options.split, options.variation)
                shown = [np.hstack(list(task.images[:GRID_PICTURES])), tinted(task, task.truths)]
                for method in wanted:
                    row, found = measure(task, method, methods[method], shots, seed)
                    rows.append(row)
                    report(row)
                    shown.append(tinted(task, found))
                    if options.json:
                        options.json.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
                if seed == 0 and shots == options.shots[-1]:
                    pictures += shown
    if options.picture and pictures:
        Image.fromarray(np.vstack(pictures)).save(options.picture)
    summarise(rows)


def measure(
    task: Task, method: str, predict: Predict, shots: int, seed: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    start = time.monotonic()
    found = predict(task, seed)
    seconds = time.monotonic() - start
    classes = len(task.names) + 1
    scores = evaluate(found, task.truths, classes)
    boundary = [boundary_f(a, b, classes) for a, b in zip(found, task.truths, strict=True)]
    row = {
        "method": method,
        "domain": task.domain,
        "shots": shots,
        "seed": seed,
        "part_miou": scores.part_miou,
        "miou": scores.miou,
        "pooled_miou": scores.pooled_part_miou,
        "boundary_f": float(np.nanmean(boundary)),
        "per_part": dict(zip(task.names, scores.per_class[1:].round(4).tolist(), strict=True)),
        "seconds": seconds,
    }
    return row, found


def tinted(task: Task, labels: Sequence[np.ndarray]) -> np.ndarray:
    palette = default_palette(len(task.names))
    return np.hstack([color_labels(label, palette) for label in list(labels)[:GRID_PICTURES]])


def report(row: dict[str, Any]) -> None:
    parts = "  ".join(f"{name} {value:.2f}" for name, value in row["per_part"].items())
    sys.stdout.write(
        f"{row['method']:<18} {row['domain']:<6} {row['shots']:>2}-shot seed {row['seed']}  part mIoU "
        f"{row['part_miou']:.3f}  mIoU {row['miou']:.3f}  boundary {row['boundary_f']:.3f}  "
        f"{row['seconds']:.1f} s   {parts}\n"
    )
    sys.stdout.flush()


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Mean and spread over seeds, Markdown tables."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    for shots in sorted({row["shots"] for row in rows}):
        head = " | ".join(["method", *domains, "mean", "mIoU", "boundary F"])
        sys.stdout.write(f"\npart mIoU, {shots}-shot\n\n| {head} |\n|{'---|' * (len(domains) + 4)}\n")
        for method in methods:
            chosen = [row for row in rows if row["method"] == method and row["shots"] == shots]
            cells, means = [], []
            for domain in domains:
                values = [row["part_miou"] for row in chosen if row["domain"] == domain]
                means.append(float(np.mean(values)))
                cells.append(f"{means[-1]:.3f} +- {np.std(values):.3f}")
            others = [f"{np.mean([row[key] for row in chosen]):.3f}" for key in ("miou", "boundary_f")]
            sys.stdout.write(f"| {' | '.join([method, *cells, f'{np.mean(means):.3f}', *others])} |\n")


if __name__ == "__main__":
    main()
