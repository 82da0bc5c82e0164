"""Measure how far rounding errors decide what the instant trainer learns: train twice, once on disturbed features.

    python dev.py benchmark convergence [--domains car horse face] [--l2 0.001 0.01 0.1] [--scenes 8]

The disturbance is normal noise of 1e-4 relative to every feature, about what float16 or another machine does. One
natural example of the test bed and test scenes, recoloured views.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from slime import preset, segment, train
from slime.backbones.base import Backbone
from slime.parts.metrics import evaluate
from slime.training import fit, instant
from testing import scenes, splits
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

from .rows import say_table

NOISE = 1e-4


def disturbed(features: Mapping[str, Tensor], *args: Any, **more: Any) -> fit.FitResult:
    """Fit as usual, to features with noise."""
    generator = torch.Generator().manual_seed(0)
    noisy = {name: maps * (1 + NOISE * torch.randn(maps.shape, generator=generator)) for name, maps in features.items()}
    return fit.fit_vectors(noisy, *args, **more)


def label_maps(backbone: Backbone, domain: str, images: Tensor) -> np.ndarray:
    """Train on one example of a domain, and segment images [B, H, W, 3]."""
    example = splits.example(domain, splits.EXAMPLES, style=scenes.NATURAL)
    with torch.inference_mode():
        embeddings = train(backbone, [example], preset("instant", backbone.info, recolor=1.0))
        return segment(backbone, images, embeddings)[0].label_map.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=scenes.DOMAINS, default=list(scenes.DOMAINS))
    parser.add_argument("--l2", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--scenes", type=int, default=8)
    options = parser.parse_args()
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
