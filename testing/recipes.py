"""The paper's recipe by the parts that are trained."""

from __future__ import annotations

from typing import Any

from . import scenes

# Layers of the tiny model whose grids are the paper's: cross-attention at 16 and 32, self-attention at 32 (the paper:
# 64). The paper's blocks, output.3-7, have grids of 8 and 16 here, which are too coarse for any part.
PAPER_LAYERS = {"read_layers": "output.6-10", "propagate_layers": "output.9-11"}
# Settings of the paper's recipe, by the parts that are trained (official README and src/dataset.py): crop, rotation,
# and for faces 2 x 2 crops of 400 of 512 pixels.
PAPER_OVERLAP = 0.72  # overlap of these crops
BY_DOMAIN: dict[str, dict[str, dict[str, Any]]] = {
    "car": {"train": {"smallest_crop": 0.6}, "segment": {}},
    "horse": {"train": {"smallest_crop": 0.8}, "segment": {}},
    "face": {"train": {"smallest_crop": 0.6, "rotation": 10.0}, "segment": {"tiles": 2}},
}
RECIPES = {parts[domain]: recipe for domain, recipe in BY_DOMAIN.items() for parts in (scenes.PARTS, scenes.FINE)}
