"""Learn part embeddings: :func:`train` is the one call, :func:`preset` gives settings by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from .backbones.base import Backbone, BackboneInfo
from .backbones.text import text_conditioned
from .batches import OUT_OF_MEMORY, free_memory
from .embeddings import CONTEXT, KEYS, PartEmbeddings
from .errors import SlimeError
from .examples import Example
from .settings import InstantSettings, PaperSettings, setting_names
from .training.gradient import train_by_gradient
from .training.instant import train_instant
from .training.probe import with_probed_layers
from .training.progress import OnStep, StepReport
from .training.template import part_prompt

__all__ = ["OnStep", "PRESETS", "StepReport", "preset", "train"]

Settings = InstantSettings | PaperSettings
PRESETS: dict[str, type[Settings]] = {"instant": InstantSettings, "paper": PaperSettings}
GONE = {
    "thorough": "The preset thorough is gone: it was less accurate than instant and slower. Choose instant, or paper "
    "for the recipe of the SLiMe paper. Files learned with it still segment."
}
logger = logging.getLogger(__name__)

_NO_MEMORY = (
    "The GPU's memory does not suffice to train through the model, even with checkpointing. Take the preset instant, "
    "which needs no gradients, close other programs, or use a smaller model."
)


def preset(name: str, info: BackboneInfo | None = None, **changes: object) -> Settings:
    """A preset by name, the instant one as the backbone recommends it, with changes.

    Raises:
        SlimeError: for an unknown preset, or a setting that its trainer does not use.
    """
    if name not in PRESETS:
        raise SlimeError(GONE.get(name, f'Unknown preset "{name}"; choose one of {", ".join(PRESETS)}.'))
    settings = info.instant if info is not None and name == "instant" else PRESETS[name]()
    known = setting_names(type(settings))
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise SlimeError(f"The preset {name} has no setting {', '.join(unknown)}; it has: {', '.join(known)}.")
    return replace(settings, **changes)  # type: ignore[arg-type]


def train(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: Settings | None = None,
    *,
    start: PartEmbeddings | None = None,
    validation: Sequence[Example] = (),
    on_step: OnStep | None = None,
) -> PartEmbeddings:
    """Learn one row a part from one or a few labelled images.

    Args:
        backbone: the model.
        examples: all with the same part names.
        settings: :class:`InstantSettings` or :class:`PaperSettings`, which choose the trainer; default is what the
            backbone recommends for the instant one.
        start: embeddings of the same parts to continue from.
        validation: further labelled images by which the paper's trainer chooses among its rows, as the official code
            does with ten examples; with none the examples themselves, as it does with one.
        on_step: progress; what it raises ends the training.

    Raises:
        SlimeError: no examples, differing names, ``start`` of other parts or another model, a backbone without text for
            the paper's trainer, or no memory for gradients even after a second try with checkpointing.
    """
    settings = settings or backbone.info.instant
    if not examples:
        raise SlimeError("No example given: connect at least one SLiMe Example.")
    names = examples[0].names
    if any(example.names != names for example in (*examples, *validation)):
        named = sorted({example.names for example in (*examples, *validation)})
        raise SlimeError(f"All examples must name the same parts; got {named}.")
    if start is not None:
        start.check_model(backbone)
        if start.names != names:
            raise SlimeError(f"The embeddings to start from name {start.names}, the examples {names}.")
        if start.mode != (CONTEXT if isinstance(settings, PaperSettings) else KEYS):
            raise SlimeError(
                "These embeddings were learned by the other trainer: instant continues instant, paper continues paper. "
                "Leave start empty, or choose the other preset."
            )
        start = start.completed(backbone)
    if all((example.labels > 0).all() for example in examples):
        raise SlimeError(
            "Every pixel of the examples belongs to a part, so nothing shows what is no part. Is the mask inverted, or "
            "does it cover the whole image? Leave some background unpainted."
        )
    examples, validation = ([example.taught() for example in kind] for kind in (examples, validation))
    if not any((example.labels == 0).any() for example in examples):
        raise SlimeError(
            "No pixel teaches the background: every example ignores what is not labelled. Label all parts in one "
            'example, or set its unlabelled pixels to "background".'
        )
    if not isinstance(settings, InstantSettings | PaperSettings):
        raise SlimeError(f"There is no trainer for {type(settings).__name__}; give InstantSettings or PaperSettings.")
    on_step = on_step or (lambda report: None)
    prompt = settings.prompt or ("" if isinstance(settings, InstantSettings) else part_prompt(names))
    if isinstance(settings, InstantSettings):
        settings = with_probed_layers(backbone, examples, settings, prompt, on_step)
        return train_instant(backbone, examples, settings, start, on_step)
    denoiser = text_conditioned(backbone, "The preset paper")
    settings = with_probed_layers(backbone, examples, settings, prompt, on_step)
    try:
        return train_by_gradient(denoiser, examples, settings, start, validation, on_step)
    except OUT_OF_MEMORY:
        if settings.checkpointing:
            raise SlimeError(_NO_MEMORY) from None
    # Outside the handler, whose traceback would keep the tensors of the failed step alive.
    logger.warning("SLiMe: out of memory; training starts again with checkpointing, which needs less and takes longer.")
    free_memory()
    lighter = replace(settings, checkpointing=True)
    try:
        return train_by_gradient(denoiser, examples, lighter, start, validation, on_step)
    except OUT_OF_MEMORY as error:
        raise SlimeError(_NO_MEMORY) from error
