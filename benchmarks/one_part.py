"""Compare our class weights with the official code's rule if one part is trained alone, as most people do first.

    python dev.py benchmark one_part [--scenes 10] [--split validation]

The official rule weights a part by the pixels of all parts over its own, so that a part trained alone weighs no more
than the background. It is raised to the same power as ours. All parts of a domain together are measured beside it. The
figure is the part mIoU of ``instant`` with one example.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from unittest import mock

import numpy as np
import torch

from slime import Example, preset, segment, train
from slime.backbones.base import Backbone
from slime.paper.losses import class_weights
from slime.parts.metrics import evaluate, mean_known
from slime.training.losses import WEIGHT_EXPONENT
from testing import scenes, splits
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

from .sources import as_tensor

ALONE = {"car": ("wheel", "light", "window"), "horse": ("tail", "leg"), "face": ("eye", "hair", "mouth")}
SPLITS = {"validation": (splits.VALIDATION_EXAMPLES, splits.VALIDATION), "test": (splits.EXAMPLES, splits.TEST)}
ENOUGH = 40  # minimum pixels of every part in the example


def labels_of(scene: scenes.Scene, parts: tuple[str, ...]) -> np.ndarray:
    labels = np.zeros_like(scene.labels)
    for label, part in enumerate(parts, start=1):
        labels[scene.labels == 1 + scenes.PARTS[scene.domain].index(part)] = label
    return labels


def labelled(domain: str, parts: tuple[str, ...], first: int) -> Example:
    """Return the first scene that shows all these parts, as an example."""
    for seed in itertools.count(first):
        scene = scenes.render(domain, seed, style=scenes.NATURAL)
        labels = labels_of(scene, parts)
        if all((labels == label).sum() >= ENOUGH for label in range(1, len(parts) + 1)):
            return Example.from_label_map(as_tensor(scene.image), torch.from_numpy(labels), parts)
    raise AssertionError


def measure(backbone: Backbone, domain: str, parts: tuple[str, ...], count: int, split: str) -> tuple[float, float]:
    """Return the part mIoU with the official rule and with ours."""
    first_example, first = SPLITS[split]
    example = labelled(domain, parts, first_example)
    tested = [scenes.render(domain, first + index, style=scenes.NATURAL) for index in range(count)]
    images = torch.stack([as_tensor(scene.image) for scene in tested])
    truth = [labels_of(scene, parts) for scene in tested]

    def score() -> float:
        with torch.inference_mode():
            learned = train(backbone, [example], preset("instant", backbone.info))
            found = segment(backbone, images, learned)[0].label_map.numpy()
        return float(mean_known(evaluate(list(found), truth, len(parts) + 1).per_class[1:]))

    with mock.patch("slime.training.fit.balanced_weights", lambda labels: class_weights(labels) ** WEIGHT_EXPONENT):
        official = score()
    return official, score()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--split", choices=SPLITS, default="test")
    options = parser.parse_args()
    backbone = load_backbone(TESTBED)
    rows: list[tuple[float, float]] = []
    sys.stdout.write("| trained on | official rule | ours |\n|---|---|---|\n")

    def say(name: str, row: tuple[float, float]) -> None:
        sys.stdout.write(f"| {name} | {row[0]:.3f} | {row[1]:.3f} |\n")
        sys.stdout.flush()

    for domain, names in ALONE.items():
        for name in names:
            rows.append(measure(backbone, domain, (name,), options.scenes, options.split))
            say(f"{domain} {name}", rows[-1])
    say("**one part, mean**", tuple(np.mean(rows, 0)))
    together = [measure(backbone, d, scenes.PARTS[d], options.scenes, options.split) for d in ALONE]
    say("**all parts together, mean**", tuple(np.mean(together, 0)))


if __name__ == "__main__":
    main()
