"""Measure the part IoU of the presets and of baselines.

    python dev.py benchmark accuracy [--quick] [--json FILE] [--methods ...] [--shots 1 5 10] [--scenes 60]
    python dev.py benchmark accuracy --split validation --methods default --set recolor=0
    python dev.py benchmark accuracy --methods default --constants decode.linear.PROPAGATED_SHARE=0
    python dev.py benchmark accuracy --checkpoint sd21.safetensors --data FOLDER --domains car horse celeba

Baselines are trivial methods, the same UNet's features without training, the untrained UNet, and the grid's ceiling
(the truth at the resolution of the latent). Test sets are plain scenes, stress sets, scenes in another drawing style,
and parts that no caption ever named.

Test scenes, examples and the tiny models' training scenes have disjoint seeds (testing/splits.py); defaults were chosen
with ``--split validation``. With ``--json`` an interrupted run resumes where it stopped. Intervals are 95 %
intervals: over sets of examples by Student's t, over test images, which all sets share, by the bootstrap.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from slime.images import resize_maps, soft_labels
from slime.parts.metrics import boundary_f, evaluate, false_area, mean_known
from testing import scenes
from testing.tiny.weights import TESTBED

from .feature_baselines import RULES
from .methods import MODEL_FREE, EncodeOnce, Learn, Variant, assignments, make_methods, remember, trained
from .rows import Row, read_rows, say_table, shared, write_rows
from .sources import (
    DETAILS,
    OFFICIAL_PARTS,
    OTHER,
    SCENE_DOMAINS,
    SETS,
    LabelledImages,
    Task,
    folder_task,
    scene_set,
    scene_task,
)

CEILING = "grid ceiling"  # needs the truth
DEFAULT_METHODS = (
    "default",
    "paper",
    "paper, softmax over the parts",
    *RULES,
    "untrained",
    "colour neighbours",
    "mean mask",
    CEILING,
)
PLAIN_ONLY = ("untrained", *MODEL_FREE)  # they say little on other sets
RESAMPLES = 500


def grid_ceiling(test: LabelledImages, classes: int) -> list[np.ndarray]:
    """Return the truth averaged to a latent's cells and enlarged bilinearly: no decoder on that grid can exceed it."""
    found = []
    for truth in test.truths:
        height, width = truth.shape
        small = soft_labels(torch.from_numpy(truth), classes, (height // 8, width // 8))
        found.append(resize_maps(small[None], (height, width))[0].argmax(0).numpy())
    return found


def parse(methods: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TESTBED, help="a checkpoint file, or a diffusers folder")
    parser.add_argument("--data", type=Path, help="folder in the official layout; default is rendered scenes")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), help=", ".join([*methods, CEILING]))
    known = list(dict.fromkeys((*SCENE_DOMAINS, *OFFICIAL_PARTS)))
    parser.add_argument("--domains", nargs="+", choices=known, help="default: all that the style has")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--style", choices=[s for s in scenes.STYLES if s != "ink"], default=scenes.NATURAL)
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, default=5, help="sets of examples")
    parser.add_argument("--scenes", type=int, default=60, help="plain test scenes a domain; half as many of other sets")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="training settings, for ablations")
    parser.add_argument("--constants", nargs="+", default=[], help="such as decode.linear.PROPAGATED_SHARE=0")
    parser.add_argument("--segment", nargs="+", default=[], metavar="NAME=VALUE", help="refine, tiles ...")
    parser.add_argument(
        "--quick", action="store_true", help="cars and horses, one seed, 1 shot, 20 plain scenes: about 5 minutes"
    )
    parser.add_argument("--json", type=Path, help="write rows here after every one, and go on from them")
    options = parser.parse_args()
    options.domains = options.domains or list(SCENE_DOMAINS if options.style == scenes.NATURAL else scenes.DOMAINS)
    if options.quick:
        options.seeds, options.scenes, options.shots, options.sets = 1, 20, [1], ["plain"]
        options.domains = ["car", "horse"]
    unknown = sorted(set(options.methods) - {*methods, CEILING})
    if unknown:
        parser.error(f"unknown methods {unknown}; there are: {', '.join([*methods, CEILING])}")
    return options


def main() -> None:
    options = parse(list(make_methods(TESTBED, Variant("instant"))))
    changes = Variant(
        "instant",
        train=assignments(options.set),
        constants=assignments(options.constants),
        segment=assignments(options.segment),
    )
    methods = make_methods(options.checkpoint, changes, options.style)
    asked = shared(options, "checkpoint", "data", "split", "style", "scenes", "sets", "set", "constants", "segment")
    rows = read_rows(options.json, asked)
    for seed in range(options.seeds):
        for shots in options.shots:
            for domain in options.domains:
                done = {
                    row["method"] for row in rows if (row["domain"], row["shots"], row["seed"]) == (domain, shots, seed)
                }
                wanted = [method for method in options.methods if method not in done]
                if not wanted:
                    continue
                if options.data:
                    task = folder_task(options.data, domain, shots, seed, options.split)
                else:
                    sets = ["plain"] if domain.endswith(DETAILS) else options.sets
                    task = scene_task(domain, shots, seed, options.scenes, options.split, sets, options.style)
                if not set(wanted) <= {*MODEL_FREE, CEILING}:
                    for test in task.tests.values():
                        remember(trained(options.checkpoint), test.images)
                for method in wanted:
                    new = measure(task, method, methods.get(method), shots, seed)
                    rows += new
                    for row in new:
                        report(row)
                    write_rows(options.json, rows, asked=asked)
    summarise(rows)
    comparisons(rows)
    if not options.data and set(scenes.DOMAINS) <= set(options.domains) and "plain" in options.sets:
        smallest_parts(rows, options.style)


def measure(task: Task, method: str, learn: Learn | None, shots: int, seed: int) -> list[Row]:
    """Measure one method on every test set; return its rows."""
    classes = len(task.names) + 1
    start = time.monotonic()
    predict = learn(task.examples, seed) if learn is not None else None
    learning = time.monotonic() - start
    rows = []
    for name, test in task.tests.items():
        if name != "plain" and method in PLAIN_ONLY and len(task.tests) > 1:
            continue
        start, encoded = time.monotonic(), EncodeOnce.encoded
        found = predict(test.images) if predict is not None else grid_ceiling(test, classes)
        seconds = time.monotonic() - start
        crops = (EncodeOnce.encoded - encoded) / len(found)  # encoded per image
        scores = evaluate(found, test.truths, classes)
        boundary = [boundary_f(a, b, classes) for a, b in zip(found, test.truths, strict=True)]
        absent, plain = all(not truth.any() for truth in test.truths), name == "plain"
        row = {
            "method": method,
            "domain": task.domain,
            "shots": shots,
            "seed": seed,
            "set": name,
            "images": len(found),
            "part_miou": None if absent else scores.part_miou,
            "part_miou_error": None if absent else standard_error(scores.per_image[:, 1:]),
            "miou": None if absent else scores.miou,
            "pooled_miou": None if absent else scores.pooled_part_miou,
            "boundary_f": None if absent else float(np.nanmean(boundary)),
            "per_part": dict(zip(task.names, scores.per_class[1:].round(4).tolist(), strict=True)) if plain else {},
            "false_area": false_area(found, test.truths, classes),
            "seconds": learning + seconds,  # segmentation without the test images' encoding, which is done once
            "learning_seconds": learning,
            "crops": crops,
        }
        rows.append(row)
    return rows


def standard_error(per_image: np.ndarray) -> float:
    """Return the standard error of the part mIoU over images, by resampling IoU [B, K]."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(per_image), size=(RESAMPLES, len(per_image)))
    return float(np.std([np.nanmean(mean_known(per_image[pick])) for pick in picks]))


def interval(rows: Sequence[Row]) -> str:
    """Return one domain's mean part mIoU, and half the width of its 95 % interval over sets of examples and images."""
    values, errors = [row["part_miou"] for row in rows], [row["part_miou_error"] for row in rows]
    over_sets = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if values[1:] else 0.0
    return f"{np.mean(values):.3f} +- {np.hypot(over_sets, 1.96 * np.mean(errors)):.3f}"


def report(row: Row) -> None:
    if row["part_miou"] is None:
        figures = f"false area {row['false_area']:.3f}"
    else:
        figures = f"part mIoU {row['part_miou']:.3f}  mIoU {row['miou']:.3f}  boundary {row['boundary_f']:.3f}"
    parts = "  ".join(f"{name} {value:.2f}" for name, value in row["per_part"].items())
    place = f"{row['domain']:<6} {row['shots']:>2}-shot seed {row['seed']} {row['set']:<13}"
    sys.stdout.write(f"{row['method']:<30} {place}  {figures}  {row['seconds']:.1f} s   {parts}\n")
    sys.stdout.flush()


def summarise(rows: Sequence[Row]) -> None:
    """Print Markdown tables for each number of shots: plain scenes, every set, and the finer parts."""
    for shots in sorted({row["shots"] for row in rows}):
        chosen = [row for row in rows if row["shots"] == shots]
        for title, details in (("plain scenes", False), ("finer parts that no caption named", True)):
            plain = [row for row in chosen if row["set"] == "plain" and row["domain"].endswith(DETAILS) == details]
            domains = list(dict.fromkeys(row["domain"] for row in plain))
            head = [*(domain.removesuffix(DETAILS) for domain in domains), "mean", "mIoU", "pooled", "boundary F"]
            if plain:
                cells = functools.partial(plain_cells, domains=domains)
                by_method(f"{title}, {shots}-shot: part mIoU", [*head, "learning, s"], plain, cells)
        whole = [row for row in chosen if not row["domain"].endswith(DETAILS)]
        names = list(dict.fromkeys(row["set"] for row in whole if row["part_miou"] is not None))
        if whole:
            cells = functools.partial(set_cells, names=names)
            by_method(f"every set, {shots}-shot: part mIoU", [*names, "false area", "crops"], whole, cells)


def comparisons(rows: Sequence[Row]) -> None:
    """Print on how many sets of examples, plain scenes, each method is above each other one."""
    chosen = [row for row in rows if row["set"] == "plain" and not row["domain"].endswith(DETAILS)]
    methods = [method for method in dict.fromkeys(row["method"] for row in chosen) if method != CEILING]
    for shots in sorted({row["shots"] for row in chosen}):
        figures: dict[str, dict[tuple[str, int], float]] = {method: {} for method in methods}
        for row in chosen:
            if row["shots"] == shots and row["method"] in figures:
                figures[row["method"]][row["domain"], row["seed"]] = row["part_miou"]
        lines = [[one, *(wins(figures[one], figures[other]) for other in methods)] for one in methods]
        say_table(["above", *methods], lines, f"{shots}-shot: sets of examples on which a row is above a column")


def wins(one: Mapping[tuple[str, int], float], other: Mapping[tuple[str, int], float]) -> str:
    """Return on how many of the sets that both have the first is above the second."""
    both = one.keys() & other.keys()
    return f"{sum(one[key] > other[key] for key in both)} of {len(both)}"


def smallest_parts(rows: Sequence[Row], style: str, count: int = 5) -> None:
    """Print the IoU of the parts that are smallest in the plain scenes, beside their mean share of the image."""
    areas = {}
    for domain in scenes.DOMAINS:
        truths = scene_set(domain, "plain", 30, "test", style).truths
        for label, part in enumerate(scenes.PARTS[domain], start=1):
            areas[domain, part] = float(
                np.mean([(truth == label).mean() for truth in truths if (truth == label).any()])
            )
    smallest = sorted(areas, key=lambda key: areas[key])[:count]
    head = [f"{domain} {part} ({100 * areas[domain, part]:.1f} %)" for domain, part in smallest]
    for shots in sorted({row["shots"] for row in rows}):
        chosen = [row for row in rows if row["shots"] == shots and row["set"] == "plain"]

        def cells(mine: Sequence[Row]) -> list[str]:
            values = [[row["per_part"][part] for row in mine if row["domain"] == domain] for domain, part in smallest]
            means = [float(np.mean(found)) for found in values]
            return [*(f"{mean:.3f}" for mean in means), f"{np.mean(means):.3f}"]

        by_method(f"the {count} smallest parts, {shots}-shot: IoU", [*head, "mean"], chosen, cells)


def by_method(title: str, head: Sequence[str], rows: Sequence[Row], cells: Callable[[list[Row]], list[str]]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.sort(key=lambda name: DEFAULT_METHODS.index(name) if name in DEFAULT_METHODS else len(DEFAULT_METHODS))
    lines = ([method, *cells([row for row in rows if row["method"] == method])] for method in methods)
    say_table(["method", *head], lines, title)


def plain_cells(rows: Sequence[Row], domains: Sequence[str]) -> list[str]:
    found = [[row for row in rows if row["domain"] == domain] for domain in domains]
    cells = [interval(mine) if mine else "" for mine in found]
    cells.append(f"{np.mean([np.mean([row['part_miou'] for row in mine]) for mine in found if mine]):.3f}")
    cells += [f"{np.mean([row[key] for row in rows]):.3f}" for key in ("miou", "pooled_miou", "boundary_f")]
    return [*cells, f"{np.mean([row['learning_seconds'] for row in rows]):.1f}"]


def set_cells(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return a method's cells in the table of all sets.

    They are the part mIoU on every set, the share of images without the object that is labelled as a part, and the
    number of crops encoded per image, by set.
    """
    found = [[row["part_miou"] for row in rows if row["set"] == name] for name in names]
    false = [row["false_area"] for row in rows if row["set"] == OTHER]
    crops = [[row["crops"] for row in rows if row["set"] == name and "crops" in row] for name in (*names, OTHER)]
    more = " / ".join(f"{np.mean(values):.1f}" for values in crops if values)
    return [*(f"{np.mean(values):.3f}" if values else "" for values in [*found, false]), more]


if __name__ == "__main__":
    main()
