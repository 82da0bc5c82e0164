"""Learn part embeddings: :func:`train`, with settings from :func:`preset`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .backbones.base import Backbone, BackboneInfo
from .embeddings import CONTEXT, LINEAR, PartEmbeddings
from .errors import SlimeError
from .examples import Example, common_names
from .paper.train import train_paper
from .settings import InstantSettings, PaperSettings, TrainSettings, setting_names
from .training.instant import train_instant
from .training.progress import OnStep, StepReport

__all__ = ["TRAINERS", "OnStep", "StepReport", "Trainer", "preset", "train"]


class Trainer(NamedTuple):
    """A way to learn part embeddings.

    Attributes:
        settings: its settings class; an instance without arguments is the preset.
        mode: of the embeddings it learns, see :class:`slime.PartEmbeddings`.
        train: takes backbone, checked examples, settings, init_embeddings, validation examples and on_step.
    """

    settings: type[TrainSettings]
    mode: str
    train: Callable[
        [Backbone, Sequence[Example], Any, PartEmbeddings | None, Sequence[Example], OnStep], PartEmbeddings
    ]


TRAINERS = {
    "instant": Trainer(InstantSettings, LINEAR, train_instant),
    "paper": Trainer(PaperSettings, CONTEXT, train_paper),
}


def preset(name: str, info: BackboneInfo | None = None, **changes: object) -> TrainSettings:
    """Return the settings of a preset, for instant as the backbone recommends them, with changes.

    Raises:
        SlimeError: for an unknown preset, or a setting that its trainer does not use.
    """
    if name not in TRAINERS:
        raise SlimeError(f'Unknown preset "{name}"; choose one of {", ".join(TRAINERS)}.')
    settings: TrainSettings = TRAINERS[name].settings()
    if info is not None and name == "instant":
        settings = replace(settings, views=info.views)
    known = setting_names(type(settings))
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise SlimeError(f"The preset {name} has no setting {', '.join(unknown)}; it has: {', '.join(known)}.")
    return replace(settings, **changes)  # type: ignore[arg-type]


def train(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: TrainSettings | None = None,
    *,
    init_embeddings: PartEmbeddings | None = None,
    validation: Sequence[Example] = (),
    on_step: OnStep | None = None,
) -> PartEmbeddings:
    """Learn the parts of one or a few labelled images.

    Args:
        backbone: the model.
        examples: all with the same part names.
        settings: InstantSettings or PaperSettings, which choose the trainer; by default what the backbone recommends
            for the instant one.
        init_embeddings: embeddings of the same parts to continue from.
        validation: further labelled images by which the paper's trainer chooses among its tokens, as the official code
            does with ten examples; with none the examples themselves, as it does with one.
        on_step: progress callback; an exception from it ends the training.

    Raises:
        SlimeError: no examples, differing names, ``init_embeddings`` of other parts or another model, or what the
            trainer itself refuses.
    """
    settings = settings or preset("instant", backbone.info)
    trainer = next((one for one in TRAINERS.values() if type(settings) is one.settings), None)
    if trainer is None:
        raise SlimeError(f"There is no trainer for {type(settings).__name__}; use settings of {', '.join(TRAINERS)}.")
    names = common_names(*examples, *(validation if examples else ()))
    if init_embeddings is not None:
        init_embeddings = _check_init(init_embeddings, backbone, names, trainer.mode)
    trained = _with_ignored_pixels(examples)
    others = [example.with_ignored_pixels() for example in validation]
    return trainer.train(backbone, trained, settings, init_embeddings, others, on_step or (lambda report: None))


def _check_init(init: PartEmbeddings, backbone: Backbone, names: tuple[str, ...], mode: str) -> PartEmbeddings:
    init.check_model(backbone)
    if init.names != names:
        raise SlimeError(
            f"The embeddings to continue from have the parts {', '.join(init.names)}, the examples {', '.join(names)}. "
            "Use the same names in the same order, or disconnect init_embeddings."
        )
    if init.mode != mode:
        raise SlimeError(
            "These embeddings were learned by the other trainer: instant continues instant, paper continues paper. "
            "Disconnect init_embeddings, or choose the other preset."
        )
    return init.completed(backbone)


def _with_ignored_pixels(examples: Sequence[Example]) -> list[Example]:
    if all((example.labels > 0).all() for example in examples):
        raise SlimeError(
            "Every pixel of the examples belongs to a part, so there is no background to learn. Is the mask "
            "inverted, or does it cover the whole image? Leave some background unpainted."
        )
    trained = [example.with_ignored_pixels() for example in examples]
    if not any((example.labels == 0).any() for example in trained):
        raise SlimeError(
            "There is no background to learn: every example ignores its unlabelled pixels. Label all parts in "
            "one of the images. With SLiMe Example you can also set its advanced input unlabelled to "
            '"background".'
        )
    return trained
