"""The paper's recipe by what is learned."""

from __future__ import annotations

from typing import Any

from . import scenes

# The paper's, of every UNet of SD1.5's and SD2.1's block layout.
PAPER_LAYERS = {"read_layers": "output.6-10", "propagate_layers": "output.9-11"}
# Of the paper's recipe, by the parts that are learned (official README and src/dataset.py): crop, rotation, and faces
# in 2 x 2 crops of 400 pixels of 512.
BY_DOMAIN: dict[str, dict[str, dict[str, Any]]] = {
    "car": {"train": {"crop": 0.6}, "segment": {}},
    "horse": {"train": {"crop": 0.8}, "segment": {}},
    "face": {"train": {"crop": 0.6, "rotation": 10.0}, "segment": {"crops": 2, "overlap": 0.72}},
}
RECIPES = {parts[domain]: recipe for domain, recipe in BY_DOMAIN.items() for parts in (scenes.PARTS, scenes.FINE)}
