"""Measure how well the instant trainer's fit is solved, at what cost, and how far rounding errors decide its result.

    python dev.py benchmark convergence [--domains car horse face] [--l2 0.001 0.01 0.1] [--scenes 8]

The first table fits features of natural examples of the test bed (recoloured views), and random ones in the shapes of
Stable Diffusion 1.5, with the trainer's solver and with ``torch.optim.LBFGS`` in 100 iterations, as it was used before.
It gives evaluations of the loss, how far the end is above the minimum, operations and waits for the device per
evaluation (on the simulated device, see testing/devices.py) and seconds. The second trains and segments test scenes,
and does so again with normal noise of 1e-4 relative to every feature, about what float16 or another machine does.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from slime import preset, segment, train
from slime.backbones.base import Backbone
from slime.examples import Example
from slime.parts.metrics import evaluate
from slime.training import fit, instant
from testing import scenes, splits
from testing.devices import operations, simulated_device, waits
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

from .rows import say_table

NOISE = 1e-4
STEPS, SOLVED = 100, 1000  # iterations of the trainer, and those after which a problem counts as solved
Solver = Callable[[Mapping[str, Tensor], Tensor, int], list[float]]
Problem = tuple[Mapping[str, Tensor], Tensor]  # features [V, D, h, w] by group, labels [V, K, H, W]


class Captured(Exception):
    """Ends a training at its fit."""


def problem_of(backbone: Backbone, example: Example) -> Problem:
    """Return what the instant trainer fits for an example, recoloured."""
    found: list[Problem] = []

    def capture(features: Mapping[str, Tensor], labels: Tensor, **_: Any) -> fit.FitResult:
        found.append((features, labels))
        raise Captured

    with torch.inference_mode(), mock.patch.object(instant, "fit_vectors", capture):
        try:
            train(backbone, [example], preset("instant", backbone.info, recolor=1.0))
        except Captured:
            pass
    return found[0]


def random_problem() -> Problem:
    """Return random features of 24 views in the shapes of SD1.5 at 512 pixels, with four parts that differ a little."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 5, (24, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = torch.nn.functional.one_hot(classes, 5).movedim(-1, 1).float()
    features = {}
    for name, width, side in (("stride4", 1280, 16), ("stride2", 640, 32)):
        small = torch.nn.functional.interpolate(labels, (side, side), mode="area")
        means = 0.5 * torch.randn(5, width, generator=generator)
        mixing = torch.randn(width, width, generator=generator) / width**0.5
        maps = torch.randn(24, width, side, side, generator=generator) + torch.einsum("vkhw,kd->vdhw", small, means)
        features[name] = torch.einsum("vdhw,de->vehw", maps, mixing) + 5 * torch.randn(width, 1, 1, generator=generator)
    return features, labels


def by_torch(features: Mapping[str, Tensor], labels: Tensor, steps: int, scaled: bool = False) -> list[float]:
    """Fit with torch's solver; return the loss with the penalty of every evaluation.

    Unless ``scaled``, points are whitened alone, as they were before, and not divided along the mean of the features.
    """
    problem = fit._Problem(features, labels, fit.L2)
    if not scaled:
        problem._scale = torch.ones_like(problem._scale)
    point = problem.start(None).requires_grad_(True)
    solver = torch.optim.LBFGS(
        [point],
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-8,
    )
    values: list[float] = []

    def closure() -> Tensor:
        terms, point.grad = problem.evaluate(point)
        values.append(float(terms.sum()))
        return terms.sum()

    solver.step(closure)
    return values


def by_trainer(features: Mapping[str, Tensor], labels: Tensor, steps: int) -> list[float]:
    """Fit as the trainer does; return the loss with the penalty of every evaluation."""
    values: list[float] = []
    fit.fit_vectors(features, labels, steps=steps, on_step=lambda _, terms, *__: values.append(sum(terms.values())))
    return values


SOLVERS: dict[str, Solver] = {
    "torch.optim.LBFGS": by_torch,
    "torch.optim.LBFGS, scaled": functools.partial(by_torch, scaled=True),
    "ours, scaled": by_trainer,
}


def counts(solver: Solver) -> list[str]:
    """Return operations and waits of an evaluation on the simulated device; they do not depend on the sizes.

    Autograd takes up a new device only before its first use in a process.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    found = []
    with torch.inference_mode(False), torch.enable_grad(), simulated_device() as device:
        features = {
            f"stride{4 // n}": torch.randn(2, 20, 2 * n, 2 * n, generator=generator).to(device) for n in (1, 2, 4)
        }
        moved = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float().to(device)
        for steps in (2, 12):
            before = operations(), waits()
            evaluations = len(solver(features, moved, steps))
            found.append((operations() - before[0], waits() - before[1], evaluations))
    (first, fetched, few), (second, more, many) = found
    return [f"{(second - first) / (many - few):.0f}", f"{(more - fetched) / (many - few):.1f}"]


def solvers(load: Callable[[], Backbone], domains: Sequence[str]) -> None:
    """Print the table of solvers."""
    each = {name: counts(solver) for name, solver in SOLVERS.items()}
    backbone, rows = load(), []
    problems = {f"{domain}, one example": problem_of(backbone, example_of(domain)) for domain in domains}
    with torch.inference_mode(False), torch.enable_grad():
        for name, problem in (problems | {"random, shapes of SD1.5": random_problem()}).items():
            minimum = min(by_trainer(*problem, SOLVED))
            for label, solver in SOLVERS.items():
                start = time.monotonic()
                values = solver(*problem, STEPS)
                seconds = time.monotonic() - start
                above = f"{min(values) - minimum:.4f}"
                rows.append([name, label, str(len(values)), above, *each[label], f"{seconds:.2f}"])
    head = ["problem", "solver", "evaluations", "above the minimum", "operations each", "waits each", "s"]
    say_table(head, rows)


def example_of(domain: str) -> Example:
    return splits.example(domain, splits.EXAMPLES, style=scenes.NATURAL)


def disturbed(features: Mapping[str, Tensor], *args: Any, **more: Any) -> fit.FitResult:
    """Fit as usual, to features with noise."""
    generator = torch.Generator().manual_seed(0)
    noisy = {name: maps * (1 + NOISE * torch.randn(maps.shape, generator=generator)) for name, maps in features.items()}
    return fit.fit_vectors(noisy, *args, **more)


def label_maps(backbone: Backbone, domain: str, images: Tensor) -> np.ndarray:
    """Train on one example of a domain, and segment images [B, H, W, 3]."""
    with torch.inference_mode():
        embeddings = train(backbone, [example_of(domain)], preset("instant", backbone.info, recolor=1.0))
        return segment(backbone, images, embeddings)[0].label_map.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=scenes.DOMAINS, default=list(scenes.DOMAINS))
    parser.add_argument("--l2", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--scenes", type=int, default=8)
    options = parser.parse_args()
    solvers(lambda: load_backbone(TESTBED), options.domains)
    backbone, rows = load_backbone(TESTBED), []
    for domain in options.domains:
        tests = [scenes.render(domain, splits.TEST + i, style=scenes.NATURAL) for i in range(options.scenes)]
        images = torch.from_numpy(np.stack([test.image for test in tests])).float() / 255
        truths, classes = [test.labels for test in tests], len(scenes.PARTS[domain]) + 1
        for l2 in options.l2:
            with mock.patch.object(fit, "L2", l2):
                plain = label_maps(backbone, domain, images)
                with mock.patch.object(instant, "fit_vectors", disturbed):
                    other = label_maps(backbone, domain, images)
            quality = [f"{evaluate(list(labels), truths, classes).part_miou:.3f}" for labels in (plain, other)]
            rows.append([domain, f"{l2:g}", *quality, f"{100 * float((plain != other).mean()):.2f} %"])
    say_table(["domain", "L2", "part mIoU", "disturbed", "pixels that differ"], rows)


if __name__ == "__main__":
    main()
