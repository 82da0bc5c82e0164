"""Settings of the trainers, of looking at images and of reading parts from them. ``Settings()`` is the preset."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .errors import SlimeError

ROW_GROUPS = ("resolution", "layer")
REFINEMENTS = ("off", "fast", "best")


@dataclass(frozen=True)
class ViewSettings:
    """The seeded views of the examples that a trainer learns from.

    Attributes:
        views: how many, shared out evenly among the examples; at least one each.
        seed: of augmentation and noise.
        flip: mirror half of the views; None switches it off when a name says left or right.
        crop: smallest side of a random crop relative to the image's; 1 switches crops off.
        rotation: largest rotation in degrees.
        blur: probability of a Gaussian blur.
        recolor: strength of independent colour changes of every part, 0..1.
    """

    views: int = 24
    seed: int = 0
    flip: bool | None = None
    crop: float = 0.7
    rotation: float = 15.0
    blur: float = 0.25
    recolor: float = 0.0

    official_views: ClassVar[bool] = False  # drawn as the official code draws them

    def __post_init__(self) -> None:
        _check(
            self,
            views=1 <= self.views <= 10_000,
            crop=0.1 <= self.crop <= 1,
            rotation=0 <= self.rotation <= 180,
            blur=0 <= self.blur <= 1,
            recolor=0 <= self.recolor <= 1,
        )


@dataclass(frozen=True)
class TrainSettings(ViewSettings):
    """What every trainer has.

    Attributes:
        steps: optimiser steps; L-BFGS iterations of the instant trainer.
        prompt: text the model sees while it looks; what an empty one means is the trainer's.
        read_layers, propagate_layers: layer patterns; empty for the model's own choice, "auto" for a probe.
    """

    steps: int = 100
    prompt: str = ""
    read_layers: str = ""
    propagate_layers: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, steps=1 <= self.steps <= 100_000)


@dataclass(frozen=True)
class InstantSettings(TrainSettings):
    """Rows from features looked up once: a convex fit, no gradient through the model.

    Attributes:
        timestep: noise level of the features; None for the model's own.
        l2: weight of the squared length of the rows, in whitened coordinates.
        row_groups: one row a part and "resolution", or one a part and "layer".
        class_weights: exponent of the class weights (1: background pixels / pixels of the part; 0: none).
    """

    timestep: int | None = None
    l2: float = 1e-3
    row_groups: str = "resolution"
    class_weights: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self,
            timestep=self.timestep is None or self.timestep >= 0,
            l2=self.l2 >= 0,
            row_groups=self.row_groups in ROW_GROUPS,
            class_weights=0 <= self.class_weights <= 1,
        )


@dataclass(frozen=True)
class PaperSettings(TrainSettings):
    """The paper's recipe: rows in the text context, Adam through the whole UNet, the official read-out.

    Views are those of :func:`slime.training.augment.official_view`. The paper's figures have ``crop`` .6 for cars and
    faces and .8 for horses, and ``rotation`` 10 for faces (official README and src/dataset.py).

    Attributes:
        learning_rate: of Adam.
        noise_range: timesteps drawn, both included.
        checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    views: int = 200
    crop: float = 0.6
    rotation: float = 30.0
    blur: float = 0.5
    steps: int = 200
    learning_rate: float = 0.1
    noise_range: tuple[int, int] = (5, 100)
    checkpointing: bool = False

    official_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self,
            learning_rate=0 < self.learning_rate <= 10,
            noise_range=0 <= self.noise_range[0] <= self.noise_range[1],
        )


@dataclass(frozen=True)
class LookSettings:
    """How an image is looked at.

    Attributes:
        seed: of the noise; the same seed gives the same masks.
        crops: 1 for the whole image, n for n x n overlapping crops (the paper uses 2 for faces).
        overlap: share of a crop's side that neighbours share.
        flip: also look at the mirrored image and average (twice the time).
        draws: noise draws averaged; each costs another pass.
        batch_size: images of one pass; 0 asks the backbone how many fit the free memory.
    """

    seed: int = 0
    crops: int = 1
    overlap: float = 0.25
    flip: bool = False
    draws: int = 1
    batch_size: int = 0

    def __post_init__(self) -> None:
        _check(
            self,
            crops=self.crops >= 1,
            overlap=0 <= self.overlap < 1,
            draws=self.draws >= 1,
            batch_size=self.batch_size >= 0,
        )


@dataclass(frozen=True)
class ReadSettings:
    """How parts are read from a look.

    Attributes:
        refine: "off", "fast" or "best", see :func:`slime.reading.refine.refine_maps`.
        min_confidence: images of a lower :attr:`slime.parts.maps.PartMaps.confidence` hold no part at all; no effect
            where the examples' sureness is unknown.
    """

    refine: str = "fast"
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        _check(self, refine=self.refine in REFINEMENTS, min_confidence=0 <= self.min_confidence <= 2)


@dataclass(frozen=True)
class SegmentSettings(ReadSettings, LookSettings):
    """Looking and reading in one.

    Attributes:
        zoom: objects to look for more closely, 0 for none, for objects smaller in the image than in the examples: up to
            5 further passes an object and 5 to spare (:mod:`slime.reading.zoom`).
    """

    zoom: int = 0

    def __post_init__(self) -> None:
        LookSettings.__post_init__(self)
        ReadSettings.__post_init__(self)
        _check(self, zoom=self.zoom >= 0)


def setting_names(kind: type[Any]) -> list[str]:
    """Names of a settings class."""
    return [field.name for field in fields(kind)]


def _check(settings: object, **valid: bool) -> None:
    wrong = [f"{name} = {getattr(settings, name)!r}" for name, holds in valid.items() if not holds]
    if wrong:
        raise SlimeError(f"Setting out of range: {', '.join(wrong)}.")
