"""Seeds of the scenes for every purpose; the ranges are disjoint."""

from __future__ import annotations

import torch

from slime.examples import Example

from . import scenes

TRAINING = 0  # the tiny model was trained on seeds from here on (see demo/README.md)
VALIDATION_EXAMPLES = 500_000  # examples to train on, for choosing defaults
VALIDATION = 600_000  # scenes on which defaults are chosen
EXAMPLES = 800_000  # examples to train on, for reported figures
TEST = 1_000_000  # scenes on which figures are reported


def example(
    domain: str, seed: int, variation: scenes.Variation = scenes.VARIATIONS["plain"], style: str = scenes.WORLD
) -> Example:
    """Return a scene as an example."""
    scene = scenes.render(domain, seed, variation, style=style)
    return Example.from_label_map(
        torch.from_numpy(scene.image).float() / 255, torch.from_numpy(scene.labels), scenes.PARTS[domain]
    )
