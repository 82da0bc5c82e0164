"""Name the layers of a model, and select them by patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import SlimeError

AUTO = "auto"  # layers are chosen by slime.training.probe
BRANCH = ":"  # separates the branch of a FusedBackbone from the name within it


class Layer(NamedTuple):
    """A layer that can be read.

    Attributes:
        name: dotted text such as "output.3.0"; "dinov2-1024:block.3" within a fused backbone.
        stride: encoded cells per side that one position of it spans.
    """

    name: str
    stride: int


class LayerChoice(NamedTuple):
    """Names of the layers to read features from, and of those whose self-attention propagates the part maps."""

    read: tuple[str, ...]
    propagate: tuple[str, ...]


_PATTERN = re.compile(r"^(?:(?P<branch>[\w.+-]+):)?(?P<place>[a-z_]+)\.(\d+)(?:-(\d+))?(?:\.(\d+))?$")


def select_layers(pattern: str, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Return the layers that match a pattern such as ``"output.3-5, output.6.0, middle.0"``.

    A pattern without the last number matches every layer of the block, one without a branch matches every branch.

    Raises:
        SlimeError: for a malformed pattern or one that names no layer of this model.
    """
    chosen: list[str] = []
    for item in filter(None, (text.strip() for text in pattern.split(","))):
        match = _PATTERN.match(item)
        if match is None:
            raise SlimeError(f'"{item}" is not a layer pattern; write for example "output.3-5, output.6.0".')
        branch, place, first, last, depth = match.groups()
        matching = []
        for layer in layers:
            its_branch, _, local = layer.name.rpartition(BRANCH)
            name, number, *inner = local.split(".")
            in_branch = branch in (None, its_branch)
            if in_branch and name == place and int(first) <= int(number) <= int(last or first):
                if depth in (None, *inner):
                    matching.append(layer.name)
        if not matching:
            known = ", ".join(layer.name for layer in layers)
            raise SlimeError(f'No layer of this model matches "{item}". It has: {known}.')
        chosen += [name for name in matching if name not in chosen]
    return tuple(chosen)
