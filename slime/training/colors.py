"""Find out on the examples whether features hang on colour, and training should use recoloured views.

A fit to a few views as they are is judged on other views of the same examples twice: as they are, and with every part
recoloured. Where many of the pixels are lost, training uses recoloured views; where nearly all are, colour is what
tells the parts apart, and views stay as they are. The limits were chosen on validation scenes (``benchmark colors``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batches import check_finite
from ..decode.linear import part_logits
from ..images import resize_maps
from .cache import CachedView
from .fit import fit_vectors

if TYPE_CHECKING:
    from .features import ViewFeatures

VIEWS = 4  # that are fitted, and as many that are judged
STEPS = 50
LOST, COLOR_ALONE = 0.7, 0.25  # IoU left on recoloured views, below which features hang on colour, or parts are colours


@dataclass(frozen=True)
class ColorCheck:
    """Result of the check.

    Attributes:
        recolored: IoU of the parts on recoloured held-out views, relative to that on the same views as they are.
    """

    recolored: float

    @property
    def recolor(self) -> bool:
        """Whether to train on recoloured views."""
        return COLOR_ALONE <= self.recolored < LOST

    def said(self) -> str:
        """Return what was found, for the user."""
        if self.recolor:
            return "Parts were lost when their colours changed: trained on recoloured views."
        if self.recolored < COLOR_ALONE:
            return "Colour alone tells the parts apart: trained on views as they are."
        return "Parts were found in other colours too: trained on views as they are."


def check_colors(views: ViewFeatures, examples: int, count: int, l2: float) -> ColorCheck:
    """Fit and judge on up to four examples, see the module.

    Args:
        views: of the examples.
        examples: how many there are.
        count: how many views will be trained on; the check needs at most a third more.
        l2: weight decay of the fit.
    """
    most = max(1, min(VIEWS, count // 6))
    used = min(examples, most)
    rounds = most // used
    fitted = [turn * examples + example for turn in range(rounds) for example in range(used)]
    held = [number + rounds * examples for number in fitted]
    found = views.get([*((number, 0.0) for number in (*fitted, *held)), *((number, 1.0) for number in held)])
    plain, recolored = found[len(fitted) : -len(held)], found[-len(held) :]
    vectors = _fit(found[: len(fitted)], [views.labels(number) for number in fitted], l2)
    labels = [views.labels(number) for number in held]
    return ColorCheck(_iou(recolored, labels, vectors) / max(_iou(plain, labels, vectors), 1e-6))


def _fit(views: Sequence[CachedView], labels: Sequence[Tensor], l2: float) -> dict[str, Tensor]:
    first = views[0]
    features = {
        group: torch.stack([resize_maps(view.groups[group][None], (maps.shape[1], maps.shape[2]))[0] for view in views])
        for group, maps in first.groups.items()
    }
    check_finite(features.values())
    truth = torch.stack([resize_maps(one[None], first.grid)[0] for one in labels])
    return fit_vectors(features, truth.to(next(iter(features.values()))), steps=STEPS, l2=l2).vectors


def _iou(views: Sequence[CachedView], labels: Sequence[Tensor], vectors: dict[str, Tensor]) -> float:
    """Return the mean IoU of the parts over all views together, on the features' grid."""
    both = either = torch.zeros(())
    for view, truth in zip(views, labels, strict=True):
        found = part_logits(view.features(), vectors)[0].argmax(0).cpu()
        counts, real = truth.sum(0) > 0.5, truth.argmax(0)
        classes = torch.arange(1, len(truth))[:, None, None]
        inside, wanted = (found == classes) & counts, (real == classes) & counts
        both = both + (inside & wanted).sum((1, 2))
        either = either + (inside | wanted).sum((1, 2))
    return float((both / either.clamp(min=1))[either > 0].mean()) if bool((either > 0).any()) else 0.0
