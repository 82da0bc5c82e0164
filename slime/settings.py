"""Settings of the trainers, of feature extraction and of decoding. ``Settings()`` is the preset."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, get_args, get_type_hints

import numpy as np

from .errors import SlimeError

RESOLUTION, LAYER = "resolution", "layer"  # how layers form feature groups
GROUPINGS = (RESOLUTION, LAYER)
SHARED = "shared"  # name of the vectors that all feature groups share
REFINEMENTS = ("off", "fast", "best")
_TYPES: dict[type, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: ((bool, np.bool_), "true or false"),
    str: (str, "a text"),
    type(None): (type(None), "empty"),
}


@dataclass(frozen=True)
class ViewSettings:
    """Seeded augmented views of the examples, which a trainer learns from.

    Attributes:
        views: number of views, divided evenly among the examples; at least one each.
        seed: seed of augmentation and noise.
        flip: mirror half of the views; None disables it when a part name says left or right.
        smallest_crop: smallest side of a random crop relative to the image's; 1 disables crops.
        rotation: largest rotation in degrees.
        blur: probability of a Gaussian blur.
        recolor: strength of independent colour changes of every part, 0..1.
    """

    views: int = 24
    seed: int = 0
    flip: bool | None = None
    smallest_crop: float = 0.7
    rotation: float = 15.0
    blur: float = 0.25
    recolor: float | None = 0.0

    official_views: ClassVar[bool] = False  # drawn as the official code draws them

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self, views=(1, 10_000), smallest_crop=(0.1, 1), rotation=(0, 180), blur=(0, 1), recolor=(0, 1))


@dataclass(frozen=True)
class TrainSettings(ViewSettings):
    """Settings of every trainer.

    Attributes:
        prompt: text conditioning of the passes; the default for an empty one depends on the trainer.
        read_layers, propagate_layers: layer patterns; empty for the model's own choice, "auto" for a probe.
    """

    prompt: str = ""
    read_layers: str = ""
    propagate_layers: str = ""


@dataclass(frozen=True)
class InstantSettings(TrainSettings):
    """Settings of the instant trainer: a convex fit on features, no gradient through the model.

    Attributes:
        timestep: noise level of the features; None for the model's own.
        recolor: as of every trainer; None lets :mod:`slime.training.colors` decide on the examples.
    """

    recolor: float | None = None
    timestep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, timestep=(0, 1_000_000))


@dataclass(frozen=True)
class PaperSettings(TrainSettings):
    """Settings of the paper's trainer: token embeddings in the text context, Adam through the whole UNet.

    Views are those of :func:`slime.paper.views.official_view`. The paper's figures have ``smallest_crop`` .6 for cars
    and faces and .8 for horses, and ``rotation`` 10 for faces (official README and src/dataset.py).

    Attributes:
        steps: of Adam.
        learning_rate: of Adam.
        checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    views: int = 200
    smallest_crop: float = 0.6
    rotation: float = 30.0
    blur: float = 0.5
    steps: int = 200
    learning_rate: float = 0.1
    checkpointing: bool = False

    official_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, steps=(1, 100_000), learning_rate=(1e-6, 10))


@dataclass(frozen=True)
class SegmentSettings:
    """How features of an image are extracted, and part maps decoded from them.

    Attributes:
        seed: seed of the noise; the same seed gives the same masks.
        tiles: 1 for the whole image, n for n x n overlapping crops (the paper uses 2 for faces).
        average_flip: also extract features of the mirrored image, and average the maps (twice the time).
        noise_samples: number of noise samples averaged; each costs one more pass.
        batch_size: images per pass; 0 chooses by the free memory.
        refine: "off", "fast" or "best", see :func:`slime.decode.refine.refine_maps`.
        min_confidence: images below this :attr:`slime.parts.maps.PartMaps.confidence` get empty masks; no effect where
            the confidence on the examples is unknown.
        closeups: number of objects to segment again in close-ups, 0 for none: for objects smaller in the image than
            in the examples. Up to 5 further passes per object and 5 extra (:mod:`slime.decode.closeups`).
    """

    seed: int = 0
    tiles: int = 1
    average_flip: bool = False
    noise_samples: int = 1
    batch_size: int = 0
    refine: str = "fast"
    min_confidence: float = 0.0
    closeups: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self, tiles=(1, 64), noise_samples=(1, 10_000), batch_size=(0, 1_000_000))
        check_settings(self, closeups=(0, 100), min_confidence=(0, 1))
        if self.refine not in REFINEMENTS:
            raise SlimeError(f'refine is "{self.refine}"; choose one of {", ".join(REFINEMENTS)}.')


def setting_names(kind: type[Any]) -> list[str]:
    """Return the names of the fields of a settings class."""
    return [field.name for field in fields(kind)]


def check_types(settings: Any) -> None:
    """Raise SlimeError for a setting of another type than its annotation's; NumPy's numbers count as numbers."""
    for name, hint in get_type_hints(type(settings)).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if kind in _TYPES]
        value = getattr(settings, name)
        if kinds and not any(isinstance(value, _TYPES[kind][0]) for kind in kinds if _is_bool(value) == (kind is bool)):
            wanted = " or ".join(_TYPES[kind][1] for kind in kinds)
            raise SlimeError(f"{name} is {value!r}; it must be {wanted}.")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool | np.bool_)


def check_settings(settings: object, **ranges: tuple[float, float]) -> None:
    """Raise SlimeError unless every named setting is None or within its range, ends included."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise SlimeError(f"{name} is {value}; it must be from {low:g} to {high:g}.")
