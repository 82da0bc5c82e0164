"""Learn part embeddings: ``train`` is the one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from .batches import OUT_OF_MEMORY, free_memory
from .denoiser import Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import Example
from .gradient import train_through_unet
from .instant import train_instant
from .recipe import OnStep, StepReport
from .settings import TrainSettings, preset

__all__ = ["OnStep", "StepReport", "train"]


logger = logging.getLogger(__name__)

_NO_MEMORY = (
    "The GPU's memory does not suffice to train through the model, even with checkpointing. Take the preset instant, "
    "which needs no gradients, close other programs, or use a smaller model."
)


def train(
    denoiser: Denoiser,
    examples: Sequence[Example],
    settings: TrainSettings | None = None,
    *,
    start: PartEmbeddings | None = None,
    on_step: OnStep | None = None,
) -> PartEmbeddings:
    """Learn one embedding row a part from one or a few labelled images.

    Args:
        denoiser: the diffusion model.
        examples: all with the same part names.
        settings: default is the "instant" preset with the model family's adjustments.
        start: embeddings of the same parts to continue from.
        on_step: progress; what it raises ends the training.

    Raises:
        SlimeError: no examples, differing names, ``start`` of other parts or another model, or no memory for gradients
            even after a second try with checkpointing.
    """
    settings = settings or preset("instant", denoiser.family)
    if not examples:
        raise SlimeError("No example given: connect at least one SLiMe Example.")
    names = examples[0].names
    if any(example.names != names for example in examples):
        raise SlimeError(f"All examples must name the same parts; got {sorted({e.names for e in examples})}.")
    if start is not None:
        start.check_model(denoiser.family)
        if start.names != names:
            raise SlimeError(f"The embeddings to start from name {start.names}, the examples {names}.")
        mode = "keys" if settings.preset == "instant" else "context"
        if start.mode != mode:
            raise SlimeError(
                f'These embeddings were learned by another kind of trainer than "{settings.preset}": instant continues '
                "instant, thorough and paper continue each other. Leave start empty, or choose the other preset."
            )
        start = start.with_context(denoiser)
    examples = [example.taught() for example in examples]
    if not any((example.labels == 0).any() for example in examples):
        raise SlimeError(
            "No pixel teaches the background: every example ignores what is not labelled. Label all parts in one "
            'example, or set its unlabelled pixels to "background".'
        )
    on_step = on_step or (lambda report: None)
    if settings.preset == "instant":
        return train_instant(denoiser, examples, settings, start, on_step)
    try:
        return train_through_unet(denoiser, examples, settings, start, on_step)
    except OUT_OF_MEMORY:
        if settings.checkpointing:
            raise SlimeError(_NO_MEMORY) from None
    # Outside the handler, whose traceback would keep the tensors of the failed step alive.
    logger.warning("SLiMe: out of memory; training starts again with checkpointing, which needs less and takes longer.")
    free_memory()
    try:
        return train_through_unet(denoiser, examples, replace(settings, checkpointing=True), start, on_step)
    except OUT_OF_MEMORY as error:
        raise SlimeError(_NO_MEMORY) from error
