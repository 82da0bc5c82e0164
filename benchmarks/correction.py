"""Measure what correcting the images with the lowest confidence gains, beside correcting images drawn at random.

    python dev.py benchmark correction [--corrected 1 3] [--draws 3] [--scenes 30] [--domains car horse face]

Embeddings are trained on one example, and 20 other images are segmented. The k images that SLiMe Select Lowest
Confidence selects, or k drawn at random, become further examples with their true parts, which is what a careful user
would paint. The figure is the part mIoU on test scenes after training again; no image used before is among them.
For random choice it is the mean over several draws. Seconds are the time to train again with one more example, with and
without what is reused; and after a stroke in the example, with views as they are (recolor off) and as the check
decides.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from slime import Example, PartEmbeddings, preset, segment, train
from slime.backbones.base import Backbone
from slime.parts.metrics import evaluate, mean_known
from slime.training.cache import clear_caches
from testing import scenes, splits
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

POOL = 20
FIRST = 1000  # offset of the pool's seeds among those of the examples


def learn(backbone: Backbone, examples: Sequence[Example]) -> PartEmbeddings:
    with torch.inference_mode():
        return train(backbone, examples, preset("instant", backbone.info))


def score(backbone: Backbone, learned: PartEmbeddings, tested: Sequence[Example]) -> float:
    with torch.inference_mode():
        found = segment(backbone, torch.stack([one.image for one in tested]), learned)[0].label_map.numpy()
    truth = [one.labels.numpy() for one in tested]
    return float(mean_known(evaluate(list(found), truth, len(learned.names) + 1).per_class[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corrected", type=int, nargs="+", default=[1, 3], metavar="K")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--domains", nargs="+", choices=scenes.DOMAINS, default=scenes.DOMAINS)
    options = parser.parse_args()
    backbone = load_backbone(TESTBED)
    columns = [f"{k} {how}" for k in options.corrected for how in ("lowest confidence", "random")]
    sys.stdout.write(f"| part mIoU | 1 example | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}\n")
    rows, anew, again = [], [], []
    for domain in options.domains:
        shown = functools.partial(splits.example, domain, style=scenes.NATURAL)
        first = shown(splits.EXAMPLES)
        pool = [shown(splits.EXAMPLES + FIRST + index) for index in range(POOL)]
        tested = [shown(splits.TEST + index) for index in range(options.scenes)]
        learned = learn(backbone, [first])
        with torch.inference_mode():
            confidence = segment(backbone, torch.stack([one.image for one in pool]), learned)[0].confidence
        order = confidence.argsort(stable=True).tolist()
        row = [score(backbone, learned, tested)]
        for k in options.corrected:
            start = time.perf_counter()
            corrected = learn(backbone, [first, *(pool[index] for index in order[:k])])
            if k == 1:
                again.append(time.perf_counter() - start)
            row.append(score(backbone, corrected, tested))
            drawn = []
            for draw in range(options.draws):
                chosen = random.Random(f"{domain}/{k}/{draw}").sample(range(POOL), k)
                drawn.append(score(backbone, learn(backbone, [first, *(pool[i] for i in chosen)]), tested))
            row.append(float(np.mean(drawn)))
        rows.append(row)
        sys.stdout.write(f"| {domain} | {' | '.join(f'{value:.3f}' for value in row)} |\n")
        sys.stdout.flush()
        clear_caches()
        start = time.perf_counter()
        learn(backbone, [first, pool[order[0]]])
        anew.append(time.perf_counter() - start)
    sys.stdout.write(f"| **mean** | {' | '.join(f'{value:.3f}' for value in np.mean(rows, 0))} |\n")
    sys.stdout.write(f"\nTraining again after a stroke: {stroke_seconds(backbone)}.\n")
    if again:
        sys.stdout.write(
            f"\nTraining again with one more example: {np.mean(again):.1f} s, all anew {np.mean(anew):.1f} s.\n"
        )


def stroke_seconds(backbone: Backbone) -> str:
    """Return the seconds of training on an example, and of training again after a stroke in its label map."""
    said = []
    for name, changes in (("recolor off", {"recolor": 0.0}), ("recolor auto", {})):
        clear_caches()
        example = splits.example("horse", splits.EXAMPLES, style=scenes.NATURAL)
        labels = example.labels.clone()
        labels[100:104, 60:90] = 1
        seconds = []
        for labelled in (example, replace(example, labels=labels)):
            start = time.perf_counter()
            with torch.inference_mode():
                train(backbone, [labelled], preset("instant", backbone.info, **changes))
            seconds.append(time.perf_counter() - start)
        said.append(f"{name} {seconds[1]:.2f} s, first {seconds[0]:.2f} s")
    return "; ".join(said)


if __name__ == "__main__":
    main()
