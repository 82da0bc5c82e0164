"""Progress reports of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..embeddings import PartEmbeddings


@dataclass(frozen=True)
class StepReport:
    """Progress of training.

    Attributes:
        stage: "layers" (passes of the layer probe), "views" (encoding views), "features" (passes over them before the
            first step), "fit" or "train", and "done" after an instant fit.
        step, steps: of the stage, 1-based.
        losses: terms by name; empty before the first step.
        embeddings: returns the best embeddings so far, or None when there are none.
        preview: image [h, w, 3] and part maps [K, h', w'] of the current segmentation, every few steps, else None. With
            the first report of "views" the labels of the example, at "done" the first example and its final maps.
        remark: what was found out and the user should know.
    """

    stage: str
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    embeddings: Callable[[], PartEmbeddings | None] = lambda: None
    preview: tuple[Tensor, Tensor] | None = None
    remark: str = ""


OnStep = Callable[[StepReport], None]
