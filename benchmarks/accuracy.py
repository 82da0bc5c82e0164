"""Part IoU on rendered scenes: the trainers beside simple baselines, the untrained UNet and the grid's ceiling.

    python dev.py benchmark accuracy [--quick] [--json FILE] [--methods ...] [--shots 1 10] [--scenes 60]

Test scenes, teaching examples and training scenes have disjoint seeds (demo/splits.py); ``--split validation`` is what
defaults were chosen on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo import scenes, splits
from demo.baselines import color_neighbours, mean_mask
from demo.inprocess import load_denoiser
from demo.server import MODEL
from demo.untrained import write_untrained
from slime import SegmentSettings, preset, segment, train
from slime.examples import Example
from slime.metrics import evaluate

Predict = Callable[[Sequence[Example], Sequence[scenes.Scene]], list[np.ndarray]]
MODEL_METHODS = {"default": "instant", "thorough": "thorough", "paper": "paper", "untrained": "instant"}
METHODS = ("default", "thorough", "paper", "untrained", "mean mask", "colour neighbours", "grid ceiling")


def with_model(denoiser: Any, name: str, seed: int, refine: str) -> Predict:
    def predict(examples: Sequence[Example], tests: Sequence[scenes.Scene]) -> list[np.ndarray]:
        with torch.inference_mode():
            embeddings = train(denoiser, examples, preset(name, denoiser.family, seed=seed))
            images = torch.from_numpy(np.stack([scene.image for scene in tests])).float() / 255
            maps = segment(denoiser, images, embeddings, SegmentSettings(refine=refine, seed=seed))[0]
        return list(maps.label_map.numpy())

    return predict


def grid_ceiling(examples: Sequence[Example], tests: Sequence[scenes.Scene]) -> list[np.ndarray]:
    """The truth averaged to the 32 x 32 grid and brought back bilinearly: what no read-out of that grid can exceed."""
    from slime.attention import resize_maps
    from slime.augment import soft_labels

    classes = len(examples[0].names) + 1
    found = []
    for scene in tests:
        small = soft_labels(torch.from_numpy(scene.labels), classes, (scenes.SIZE // 8, scenes.SIZE // 8))
        found.append(resize_maps(small[None], (scenes.SIZE, scenes.SIZE))[0].argmax(0).numpy())
    return found


def make_methods(names: Sequence[str], checkpoint: Path, seed: int, refine: str) -> dict[str, Predict]:
    methods: dict[str, Predict] = {
        "mean mask": lambda examples, tests: [mean_mask(examples)] * len(tests),
        "colour neighbours": lambda examples, tests: color_neighbours(examples, [scene.image for scene in tests]),
        "grid ceiling": grid_ceiling,
    }
    trained = load_denoiser(checkpoint)
    for name in ("default", "thorough", "paper"):
        methods[name] = with_model(trained, MODEL_METHODS[name], seed, refine)
    if "untrained" in names:
        folder = Path(tempfile.mkdtemp())
        denoiser = load_denoiser(write_untrained(checkpoint, folder / "untrained.safetensors"))
        methods["untrained"] = with_model(denoiser, "instant", seed, refine)
    return {name: methods[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["default", "untrained", "mean mask", "colour neighbours", "grid ceiling"],
    )
    parser.add_argument("--domains", nargs="+", choices=scenes.DOMAINS, default=list(scenes.DOMAINS))
    parser.add_argument("--variation", choices=list(scenes.VARIATIONS), default="plain")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--seeds", type=int, default=3, help="sets of teaching examples")
    parser.add_argument("--scenes", type=int, default=60, help="test scenes a domain")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--refine", choices=["off", "fast", "best"], default="fast")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 scenes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.scenes = 1, 20
    teach, test = (
        (splits.TEACH, splits.TEST) if options.split == "test" else (splits.VALIDATION_TEACH, splits.VALIDATION)
    )
    rows = []
    for seed in range(options.seeds):
        methods = make_methods(options.methods, options.checkpoint, seed, options.refine)
        for domain in options.domains:
            names = scenes.PARTS[domain]
            tests = [
                scenes.render(domain, test + i, scenes.VARIATIONS[options.variation]) for i in range(options.scenes)
            ]
            truths = [scene.labels for scene in tests]
            for shots in options.shots:
                examples = [splits.example(domain, teach + 100 * seed + i) for i in range(shots)]
                for method, predict in methods.items():
                    start = time.monotonic()
                    scores = evaluate(predict(examples, tests), truths, len(names) + 1)
                    row = {
                        "method": method,
                        "domain": domain,
                        "shots": shots,
                        "seed": seed,
                        "part_miou": scores.part_miou,
                        "miou": scores.miou,
                        "pooled_miou": scores.pooled_part_miou,
                        "per_part": dict(zip(names, scores.per_class[1:].round(4).tolist(), strict=True)),
                        "seconds": time.monotonic() - start,
                    }
                    rows.append(row)
                    parts = "  ".join(f"{name} {value:.2f}" for name, value in row["per_part"].items())
                    sys.stdout.write(
                        f"{method:<18} {domain:<6} {shots:>2}-shot seed {seed}  part mIoU {scores.part_miou:.3f}  "
                        f"mIoU {scores.miou:.3f}  {row['seconds']:.1f} s   {parts}\n"
                    )
                    sys.stdout.flush()
    summarise(rows)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Mean and spread over seeds, a Markdown table."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    for shots in sorted({row["shots"] for row in rows}):
        sys.stdout.write(
            f"\npart mIoU, {shots}-shot\n\n| method | {' | '.join(domains)} | mean |\n|{'---|' * (len(domains) + 2)}\n"
        )
        for method in methods:
            cells, means = [], []
            for domain in domains:
                values = [
                    r["part_miou"] for r in rows if (r["method"], r["domain"], r["shots"]) == (method, domain, shots)
                ]
                means.append(float(np.mean(values)))
                cells.append(f"{means[-1]:.3f} +- {np.std(values):.3f}")
            sys.stdout.write(f"| {method} | {' | '.join(cells)} | {np.mean(means):.3f} |\n")


if __name__ == "__main__":
    main()
