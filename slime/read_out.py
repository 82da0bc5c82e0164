"""How scores become part maps: one of two ways, each with what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Propagated:
    """Softmax over the parts, half of it propagated by self-attention.

    Attributes:
        order: times the maps are propagated (1 as in the paper, 2 as in GoCA, 0 not at all).
        mix: share of the propagated (WAS) map in the result; the rest is the plain map.
        sharpen: exponent that calibrates the final probabilities, which moves no border; see
            :func:`slime.reading.read.calibrating_exponent`.
    """

    kind: ClassVar[str] = "propagated"

    order: int = 1
    mix: float = 0.5
    sharpen: float = 1.0


@dataclass(frozen=True)
class Official:
    """As the official code does, see :mod:`slime.reading.official`."""

    kind: ClassVar[str] = "official"


ReadOut = Propagated | Official
KINDS: dict[str, type[Propagated] | type[Official]] = {one.kind: one for one in (Propagated, Official)}
