"""Names of attention layers and which of them are read for each model family.

A layer is named by its place in the UNet as ComfyUI numbers it: ``output.3.0`` is the first transformer block of output
block 3. SD1.x and SD2.x share one table (the paper's: diffusers' up_blocks[1..2] for cross-attention, up_blocks[3] for
self-attention); SDXL is chosen by resolution, because its up_blocks[1] is the 64x64 level.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import SlimeError


class LayerKey(NamedTuple):
    """One transformer block: ``place`` is "input", "middle" or "output", ``number`` the block, ``depth`` inside it."""

    place: str
    number: int
    depth: int

    def __str__(self) -> str:
        return f"{self.place}.{self.number}.{self.depth}"


class AttentionLayer(NamedTuple):
    """A transformer block of a loaded UNet; ``scale`` is the latent's side divided by the layer's side."""

    key: LayerKey
    scale: int


class LayerChoice(NamedTuple):
    """Layers to read: cross-attention for the part scores, self-attention for propagation (WAS)."""

    cross: tuple[LayerKey, ...]
    self_: tuple[LayerKey, ...]


@dataclass(frozen=True)
class Family:
    """What depends on the kind of model.

    Attributes:
        name: stored in embeddings; embeddings of one family do not fit another.
        context_dim: width of a text embedding row.
        working_side: side in pixels of the square whose area the UNet works on.
        cross, self_: layer patterns, see :func:`select_layers`; empty for the automatic rule.
        timestep: noise level of the features, 0..999.
        settings: overrides of the instant preset's :class:`slime.settings.TrainSettings` fields.
    """

    name: str
    context_dim: int
    working_side: int
    cross: str = ""
    self_: str = ""
    timestep: int = 100
    settings: dict[str, Any] = field(default_factory=dict)


PAPER_CROSS = "output.3-5, output.6-7"
PAPER_SELF = "output.9-11"

FAMILIES: dict[str, Family] = {
    "sd1": Family("sd1", 768, 512, PAPER_CROSS, PAPER_SELF),
    "sd2": Family("sd2", 1024, 512, PAPER_CROSS, PAPER_SELF),
    "sd2-768": Family("sd2-768", 1024, 768, PAPER_CROSS, PAPER_SELF),
    # Features of one SDXL view take 40 MB: fewer views than elsewhere.
    "sdxl": Family("sdxl", 2048, 1024, "output.0-5", "output.3-5", settings={"views": 16}),
    # The demo's own model; chosen on its validation scenes, see benchmarks/RESULTS.md.
    "tiny": Family(
        "tiny",
        96,
        256,
        cross="output.3-11",
        self_="output.9-10",
        settings={"recolor": 1.0, "row_groups": "layer", "l2": 0.1, "views": 96, "class_weights": 0.8},
    ),
}


def family_for(context_dim: int, prediction: str) -> Family:
    """The known family with this width of text rows, or a nameless one that uses the automatic layer rule.

    SD2.x comes in two: eps at 512 pixels (base) and v at 768.
    """
    if context_dim == FAMILIES["sd2"].context_dim:
        return FAMILIES["sd2" if prediction == "eps" else "sd2-768"]
    known = [family for family in FAMILIES.values() if family.context_dim == context_dim]
    return known[0] if known else Family(f"unet-{context_dim}", context_dim, 512)


_PATTERN = re.compile(r"^(input|middle|output)\.(\d+)(?:-(\d+))?(?:\.(\d+))?$")


def select_layers(pattern: str, layers: Sequence[AttentionLayer]) -> tuple[LayerKey, ...]:
    """Layers that match a pattern such as ``"output.3-5, output.6.0, middle.0"``; no depth means every depth.

    Raises:
        SlimeError: for a malformed pattern or one that names no layer of this model.
    """
    chosen: list[LayerKey] = []
    for item in filter(None, (part.strip() for part in pattern.split(","))):
        match = _PATTERN.match(item)
        if match is None:
            raise SlimeError(f'"{item}" is not a layer pattern; write for example "output.3-5, output.6.0".')
        place, first, last, depth = match.groups()
        numbers = range(int(first), int(last or first) + 1)
        found = [
            layer.key
            for layer in layers
            if layer.key.place == place and layer.key.number in numbers and depth in (None, str(layer.key.depth))
        ]
        if not found:
            known = ", ".join(str(layer.key) for layer in layers)
            raise SlimeError(f'No attention layer of this model matches "{item}". It has: {known}.')
        chosen += [key for key in found if key not in chosen]
    return tuple(chosen)


def automatic_layers(layers: Sequence[AttentionLayer]) -> LayerChoice:
    """The paper's choice put as a rule of resolution, for a UNet that has no table.

    Cross-attention of the decoder at a half and a quarter of the latent's side, self-attention of the decoder at its
    finest side.
    """
    decoder = [layer for layer in layers if layer.key.place == "output"] or list(layers)
    if not decoder:
        raise SlimeError("This model has no cross-attention layers; SLiMe needs a UNet of Stable Diffusion's kind.")
    finest = min(layer.scale for layer in decoder)
    cross = tuple(layer.key for layer in decoder if layer.scale in (2, 4)) or tuple(layer.key for layer in decoder)
    return LayerChoice(cross, tuple(layer.key for layer in decoder if layer.scale == finest))


def choose_layers(family: Family, layers: Sequence[AttentionLayer], cross: str = "", self_: str = "") -> LayerChoice:
    """User's patterns first, then the family's table, then :func:`automatic_layers`."""
    automatic = automatic_layers(layers)
    cross, self_ = cross or family.cross, self_ or family.self_
    return LayerChoice(
        select_layers(cross, layers) if cross else automatic.cross,
        select_layers(self_, layers) if self_ else automatic.self_,
    )
