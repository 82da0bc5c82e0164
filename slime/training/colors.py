"""Check on the examples whether the features depend on colour, and training should use recoloured views.

A fit to a few views as they are is judged on other views of the same examples twice: as they are, and with every part
recoloured. Where parts are lost, training uses recoloured views, unless a part's name says a colour: an example cannot
tell whether colour is what makes the part. The limit was chosen on validation scenes (``benchmark colors``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backbones.base import Features
from ..decode.linear import part_logits
from .augment import words
from .fit import fit_vectors

if TYPE_CHECKING:
    from .features import ViewFeatures

VIEWS = 4  # that are fitted, and as many that are judged
STEPS = 50
FOUND = 0.05  # IoU on views as they are, below which nothing can be told, and views stay as they are
LOST = 0.9  # of the IoU that must be left on recoloured views, or else the features hang on colour
# Names of colours in several languages, last Chinese, Japanese, Korean. A false alarm leaves views as they are.
COLORS = re.compile(
    r"(?<![a-zäöüß])(red|green|blue|yellow|orange|purple|violet|pink|brown|black|white|gr[ae]y|gold(en)?|silver|cyan|beige"
    r"|(rot|grün|blau|gelb|schwarz|weiß|braun|grau|lila|rosa)(e[rsnm]?)?"
    r"|rouges?|verte?s?|bleue?s?|jaunes?|noire?s?|blanc(he)?s?|roj[oa]s?|verdes?|azul(es)?|amarill[oa]s?|negr[oa]s?"
    r"|blanc[oa]s?)(?![a-zäöüß])"
    r"|[\u7ea2\u7d05\u8d64\u7eff\u7da0\u7dd1\u84dd\u85cd\u9752\u9ec4\u9ec3\u9ed1\u767d\u7d2b]"
    r"|\ube68\uac15|\ube68\uac04|\ucd08\ub85d|\ud30c\ub780|\ud30c\ub791|\ub178\ub780|\ub178\ub791|\uac80\uc740|\uac80\uc815"
    r"|\ud770|\ud558\uc580",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ColorCheck:
    """Result of the check.

    Attributes:
        recolored: IoU of the parts on recoloured held-out views, relative to that on the same views as they are; None
            where it was not measured, or the parts were not found on views as they are.
        named: whether a part's name says a colour.
    """

    recolored: float | None
    named: bool = False

    @property
    def recolor(self) -> bool:
        """Whether to train on recoloured views."""
        return self.recolored is not None and self.recolored < LOST

    def said(self) -> str:
        """Return what was found, for the user."""
        if self.named:
            return "A part's name says a colour: trained with unchanged colours."
        if self.recolored is None:
            return "The check of colours hardly found the parts, so it says nothing: trained with unchanged colours."
        if self.recolor:
            return "Parts were lost when their colours changed: trained with changed colours."
        return "Parts were found in other colours too: trained with unchanged colours."


def extra_views(count: int) -> int:
    """Return how many views the check may need beside ``count`` that are trained on."""
    return 2 * max(1, min(VIEWS, count // 6))


def check_colors(views: ViewFeatures, names: Sequence[str], examples: int, count: int) -> ColorCheck:
    """Fit and judge on up to four examples, see the module.

    Args:
        views: of the examples.
        names: of the parts.
        examples: how many there are.
        count: how many views will be trained on; from 6 on the check needs at most a third more.
    """
    if any(COLORS.search(words(name)) for name in names):
        return ColorCheck(None, named=True)
    most = extra_views(count) // 2
    used = min(examples, most)
    rounds = most // used
    fitted = [turn * examples + example for turn in range(rounds) for example in range(used)]
    held = [number + rounds * examples for number in fitted]
    found = views.get([*((number, 0.0) for number in (*fitted, *held)), *((number, 1.0) for number in held)])
    plain, recolored = found[len(fitted) : -len(held)], found[-len(held) :]
    features, truth = views.stacked([(number, 0.0) for number in fitted])
    vectors = fit_vectors(features, truth, steps=STEPS).vectors
    labels = [views.labels(number) for number in held]
    best = _iou(plain, labels, vectors)
    return ColorCheck(_iou(recolored, labels, vectors) / best if best > FOUND else None)


def _iou(views: Sequence[Features], labels: Sequence[Tensor], vectors: dict[str, Tensor]) -> float:
    """Return the mean IoU of the parts that are there over all views together, on the features' grid."""
    both = either = there = torch.zeros(())
    for view, truth in zip(views, labels, strict=True):
        found = part_logits(view, vectors)[0].argmax(0).cpu()
        counts, real = truth.sum(0) > 0.5, truth.argmax(0)
        classes = torch.arange(1, len(truth))[:, None, None]
        inside, wanted = (found == classes) & counts, (real == classes) & counts
        both = both + (inside & wanted).sum((1, 2))
        either = either + (inside | wanted).sum((1, 2))
        there = there + wanted.sum((1, 2))
    return float((both / either.clamp(min=1))[there > 0].mean()) if bool((there > 0).any()) else 0.0
