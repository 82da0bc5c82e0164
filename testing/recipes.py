"""The paper's recipe by what is learned."""

from __future__ import annotations

from typing import Any

from slime.settings import InstantSettings

from . import scenes

# The tiny model's that have the paper's cells: cross-attention at 16 and 32, self-attention at 32 (the paper: 64). The
# paper's blocks, output.3-7, have 8 and 16 here, too coarse for any part.
PAPER_LAYERS = {"read_layers": "output.6-10", "propagate_layers": "output.9-11"}
# The preset instant as Stable Diffusion's families have it: these layers, and no values of the tiny model's own.
AS_STABLE_DIFFUSION = PAPER_LAYERS | {name: getattr(InstantSettings(), name) for name in ("recolor", "views")}
STABLE_DIFFUSION_INFO = {"grouping": "resolution", "l2": 1e-3}
# Of the paper's recipe, by the parts that are learned (official README and src/dataset.py): crop, rotation, and faces
# in 2 x 2 crops of 400 pixels of 512.
PAPER_OVERLAP = 0.72  # of these crops
BY_DOMAIN: dict[str, dict[str, dict[str, Any]]] = {
    "car": {"train": {"crop": 0.6}, "segment": {}},
    "horse": {"train": {"crop": 0.8}, "segment": {}},
    "face": {"train": {"crop": 0.6, "rotation": 10.0}, "segment": {"crops": 2}},
}
RECIPES = {parts[domain]: recipe for domain, recipe in BY_DOMAIN.items() for parts in (scenes.PARTS, scenes.FINE)}
