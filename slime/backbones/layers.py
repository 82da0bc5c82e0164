"""Layers of a model by name, and patterns that choose among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import SlimeError

AUTO = "auto"  # layers chosen by slime.training.probe


class Layer(NamedTuple):
    """Something that can be read.

    Attributes:
        name: dotted text such as "output.3.0".
        stride: encoded cells it spans a side.
        eye: place of its model where several look together.
    """

    name: str
    stride: int
    eye: int = 0


class LayerChoice(NamedTuple):
    """Names of the layers to read part scores from, and of those whose self-attention propagates the maps."""

    read: tuple[str, ...]
    propagate: tuple[str, ...]


_PATTERN = re.compile(r"^([a-z_]+)\.(\d+)(?:-(\d+))?(?:\.(\d+))?$")


def select_layers(pattern: str, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Layers that match a pattern such as ``"output.3-5, output.6.0, middle.0"``; no last number means every one.

    Raises:
        SlimeError: for a malformed pattern or one that names no layer of this model.
    """
    chosen: list[str] = []
    for item in filter(None, (part.strip() for part in pattern.split(","))):
        match = _PATTERN.match(item)
        if match is None:
            raise SlimeError(f'"{item}" is not a layer pattern; write for example "output.3-5, output.6.0".')
        place, first, last, depth = match.groups()
        found = []
        for layer in layers:
            name, number, *inner = layer.name.split(".")
            if name == place and int(first) <= int(number) <= int(last or first) and depth in (None, *inner):
                found.append(layer.name)
        if not found:
            known = ", ".join(layer.name for layer in layers)
            raise SlimeError(f'No layer of this model matches "{item}". It has: {known}.')
        chosen += [name for name in found if name not in chosen]
    return tuple(chosen)
