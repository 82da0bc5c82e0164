"""Compare learned SAM3 concepts with words, on the tiny SAM3, whose texts are known (testing/tiny/sam3.py).

    COMFYUI_DIR=... python dev.py benchmark sam3_concepts [--scenes 20] [--seeds 3] [--json FILE]

Needs a ComfyUI with SAM3. Every row finds the same parts in the same test scenes, of natural style:

- the word: the detector's own token table, for the parts it was trained with;
- nearest word: that of all words which finds the part best in the examples, for parts that it was never trained with;
- random tokens; learned from random tokens; learned from the nearest word, or for known parts from a wrong word;
- instant: SLiMe Train on the encoder of the same model, which sees all parts of the domain together.

A part's map is the detection with the highest score, if that is above 0.3: all of a part is one instance, as in the
training of the tiny model. IoU is per image that shows the part, averaged over images, then over parts.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime import Example, segment, train
from slime.concepts.train import TOKENS, ConceptSettings, concept_limits, concept_tokens, train_concepts
from slime.train import preset
from testing import scenes, splits
from testing.inprocess import NAME, load_extension
from testing.tiny import sam3

from .rows import Row, read_rows, say_row, say_table, shared, write_rows
from .sources import DETAILS, scene_example, scene_set

THRESHOLD = 0.3  # of the tiny model, whose scores are lower; chosen on validation scenes


class Bench:
    """The tiny SAM3 with its words, and encoded test scenes."""

    def __init__(self, count: int, split: str) -> None:
        model, self.words = sam3.load()
        load_extension()
        self.detector: Any = importlib.import_module(f"{NAME}.nodes.comfy_sam3").ComfySam3(sam3.as_model(model))
        self._count, self._split = count, split
        self.first_example = splits.VALIDATION_EXAMPLES if split == "validation" else splits.EXAMPLES

    def scenes(self, domain: str) -> Any:
        return scene_set(domain, "plain", self._count, self._split, scenes.NATURAL)

    @functools.cache  # noqa: B019  one bench a run
    def encoded(self, domain: str) -> list[Tensor]:
        images = torch.from_numpy(self.scenes(domain).images).float() / 255
        return [self.detector.encode(image[None]) for image in images]

    @torch.no_grad()
    def mask(self, encoded: Tensor, tokens: Tensor, most: int, size: tuple[int, ...]) -> np.ndarray:
        """Return the union bool [H, W] of the best detections."""
        found = self.detector.detect(self.detector.prepare(encoded), tokens)
        scores = found.scores[0].sigmoid()
        best = [query for query in scores.argsort(descending=True)[:most].tolist() if scores[query] > THRESHOLD]
        if not best:
            return np.zeros(size, dtype=bool)
        union = found.masks[0, best].amax(0)[None, None]
        return (torch.nn.functional.interpolate(union, size, mode="bilinear")[0, 0] > 0).numpy()

    def iou(self, domain: str, part: int, tokens: Tensor, most: int) -> float:
        """Return the mean IoU of a part over the test scenes that show it."""
        truths = self.scenes(domain).truths
        pairs = [
            (self.mask(encoded, tokens, most, truth.shape), truth == part)
            for encoded, truth in zip(self.encoded(domain), truths, strict=True)
            if (truth == part).any()
        ]
        return overlap(pairs)

    def nearest(self, examples: Sequence[Example], part: int, most: int, without: str = "") -> str:
        """Return the word that finds a part best in the examples."""
        encoded = [self.detector.encode(example.image[None]) for example in examples]

        def score(word: str) -> float:
            tokens = self.words[word]
            return overlap(
                [
                    (self.mask(features, tokens, most, tuple(example.labels.shape)), (example.labels == part).numpy())
                    for features, example in zip(encoded, examples, strict=True)
                    if (example.labels == part).any()
                ]
            )

        return max((word for word in self.words if word != without), key=score)


def overlap(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    ratios = [(found & truth).sum() / max((found | truth).sum(), 1) for found, truth in pairs]
    return float(np.mean(ratios)) if ratios else float("nan")


def measure(bench: Bench, domain: str, shots: int, seed: int, steps: int) -> list[Row]:
    """Return one row per method and part."""
    examples = [scene_example(domain, bench.first_example + 100 * seed + i, scenes.NATURAL) for i in range(shots)]
    names = examples[0].names
    known = not domain.endswith(DETAILS)
    settings = ConceptSettings(seed=seed, steps=steps, instances=False)
    noise = torch.randn(len(names), TOKENS, sam3.WIDTH, generator=torch.Generator().manual_seed(seed))
    learned = {"learned from random tokens": train_concepts(bench.detector, examples, settings)}
    most = concept_limits(learned["learned from random tokens"])
    nearest = [
        bench.nearest(examples, part, most[part - 1], names[part - 1] if known else "")
        for part in range(1, len(names) + 1)
    ]
    start = "learned from a wrong word" if known else "learned from the nearest word"
    learned[start] = train_concepts(bench.detector, examples, settings, [bench.words[word] for word in nearest])
    tokens: dict[str, list[Tensor]] = {name: list(concept_tokens(result)) for name, result in learned.items()}
    tokens["random tokens"] = list(noise)
    if known:
        tokens["the word"] = [bench.words[name] for name in names]
    tokens["nearest other word" if known else "nearest word"] = [bench.words[word] for word in nearest]
    rows: list[Row] = []

    def add(method: str, scores: Sequence[float]) -> None:
        for name, score in zip(names, scores, strict=True):
            row = {"domain": domain, "shots": shots, "seed": seed, "method": method, "part": name, "iou": score}
            rows.append(row)
            say_row(row)

    for method, found in tokens.items():
        scores = [bench.iou(domain, part, one, most[part - 1]) for part, one in enumerate(found, start=1)]
        add(method, scores)
    embeddings = train(bench.detector, examples, preset("instant", bench.detector.info, seed=seed))
    images = torch.from_numpy(bench.scenes(domain).images).float() / 255
    labels = segment(bench.detector, images, embeddings)[0].label_map.numpy()
    truths = bench.scenes(domain).truths
    pairs = list(zip(labels, truths, strict=True))
    parts = range(1, len(names) + 1)
    add("instant", [overlap([(a == part, b == part) for a, b in pairs if (b == part).any()]) for part in parts])
    return rows


def summarise(rows: Sequence[Row]) -> None:
    """Print tables of the mean IoU of parts with and without a name, by domain, for every number of examples."""
    for title, fine in (("parts with a name", False), ("parts without a name", True)):
        for shots in sorted({row["shots"] for row in rows}):
            chosen = [row for row in rows if row["domain"].endswith(DETAILS) == fine and row["shots"] == shots]
            domains = list(dict.fromkeys(row["domain"] for row in chosen))
            lines = []
            for method in dict.fromkeys(row["method"] for row in chosen):
                mine = [row for row in chosen if row["method"] == method]
                means = [np.mean([row["iou"] for row in mine if row["domain"] == domain]) for domain in domains]
                lines.append([method, *(f"{mean:.3f}" for mean in [*means, np.mean([row["iou"] for row in mine])])])
            if lines:
                say_table(["method", *domains, "all"], lines, f"{title}, {shots} examples")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="sets of examples")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--domains", nargs="+", default=[*scenes.DOMAINS, *(name + DETAILS for name in scenes.DOMAINS)])
    parser.add_argument("--steps", type=int, default=ConceptSettings().steps, help="of each training")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--json", type=Path, help="write rows here after every set, and go on from them")
    options = parser.parse_args()
    asked = shared(options, "scenes", "split", "steps")
    rows, bench = read_rows(options.json, asked), Bench(options.scenes, options.split)
    for shots in options.shots:
        for seed in range(options.seeds):
            for domain in options.domains:
                if not any((row["domain"], row["shots"], row["seed"]) == (domain, shots, seed) for row in rows):
                    rows += measure(bench, domain, shots, seed, options.steps)
                    write_rows(options.json, rows, asked=asked)
    summarise(rows)


if __name__ == "__main__":
    main()
