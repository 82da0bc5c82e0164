"""Settings of training and of segmentation, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .errors import SlimeError
from .layers import Family


@dataclass(frozen=True)
class TrainSettings:
    """How part embeddings are learned.

    Attributes:
        preset: "instant" (rows from cached features, no gradient through the UNet), "thorough" (the paper's objective
            through the UNet with our views and read-out) or "paper" (the paper's recipe and the official read-out).
        steps: optimiser steps; L-BFGS iterations for "instant".
        learning_rate: of Adam; "instant" does not use it.
        seed: of noise and augmentation.
        prompt: base prompt of the UNet; "part" is repeated once a class for "thorough" and "paper" when empty.
        views: augmented views of the examples, shared out evenly; at least one each.
        timestep: noise level of the features of "instant"; 0 means the family's.
        draws: noise draws whose features "instant" averages; each costs another UNet pass a view.
        noise_range: timesteps drawn by "thorough" and "paper".
        l2: weight of the squared length of the rows' offsets, which "instant" takes in whitened coordinates.
        row_groups: "shared" one row a part, "resolution" one a part and feature resolution, "layer" one a part and
            cross-attention layer, "head" one a part and attention head ("instant").
        background_rows: rows learned for the background beside the frozen one ("instant"); the surest counts.
        class_weights: exponent of the paper's class weights (1: foreground pixels / pixels of the part; 0: none).
        balance: every view with a part counts alike for it, however small the part is there ("instant").
        was_weight, guard_weight, guidance: alpha and beta of the paper's loss, and the guidance in its "SD loss".
        dice, focal: weight of a Dice loss beside the cross-entropy, gamma of a focal one ("thorough", "paper").
        schedule: of the learning rate, "constant" or "cosine".
        ema: decay of a moving average of the rows, 0 for none.
        keep: which rows are the result: of the lowest "loss", of the highest training "iou", of the lowest loss on
            crops held out ("crop"), or the "last".
        short_context: run the UNet on the learned rows alone, without the rest of the prompt's 77 rows.
        flip: mirror half of the views; None switches it off when a name says left or right.
        crop: smallest side of a random crop relative to the image's; 1 switches crops off.
        zoom_out: largest view relative to the image's side; beyond 1 the image is mirrored at its borders.
        rotation: largest rotation in degrees.
        blur: probability of a Gaussian blur.
        recolor: strength of independent colour changes of every part, 0..1.
        soft_labels: area-averaged labels; False takes the nearest pixel as the paper does.
        checkpointing: recompute activations in the backward pass: less memory, more time.
        cross_layers, self_layers: layer patterns; empty for the family's, "auto" for :mod:`slime.probe`.
    """

    preset: str = "instant"
    steps: int = 100
    learning_rate: float = 0.1
    seed: int = 0
    prompt: str = ""
    views: int = 24
    timestep: int = 0
    draws: int = 1
    noise_range: tuple[int, int] = (5, 100)
    l2: float = 1e-3
    row_groups: str = "resolution"
    background_rows: int = 0
    class_weights: float = 1.0
    balance: bool = False
    was_weight: float = 1.0
    guard_weight: float = 0.005
    guidance: float = 100.0
    dice: float = 0.0
    focal: float = 0.0
    schedule: str = "constant"
    ema: float = 0.0
    keep: str = "loss"
    short_context: bool = False
    flip: bool | None = None
    crop: float = 0.7
    zoom_out: float = 1.0
    rotation: float = 15.0
    blur: float = 0.25
    recolor: float = 0.0
    soft_labels: bool = True
    checkpointing: bool = False
    cross_layers: str = ""
    self_layers: str = ""

    def __post_init__(self) -> None:
        checks = {
            "preset": self.preset in PRESET_NAMES,
            "row_groups": self.row_groups in ("shared", "resolution", "layer", "head"),
            "schedule": self.schedule in ("constant", "cosine"),
            "keep": self.keep in ("loss", "iou", "crop", "last"),
            "ema": 0 <= self.ema < 1,
            "steps": 1 <= self.steps <= 100_000,
            "learning_rate": 0 < self.learning_rate <= 10,
            "views": 1 <= self.views <= 10_000,
            "timestep": 0 <= self.timestep <= 999,
            "draws": 1 <= self.draws <= 100,
            "noise_range": 0 <= self.noise_range[0] <= self.noise_range[1] <= 999,
            "crop": 0.1 <= self.crop <= 1,
            "zoom_out": 1 <= self.zoom_out <= 8,
            "background_rows": 0 <= self.background_rows <= 16,
            "l2": self.l2 >= 0,
            "recolor": 0 <= self.recolor <= 1,
        }
        wrong = [f"{name} = {getattr(self, name)!r}" for name, valid in checks.items() if not valid]
        if wrong:
            raise SlimeError(f"Training setting out of range: {', '.join(wrong)}.")


PRESET_NAMES = ("instant", "thorough", "paper")


def preset(name: str, family: Family | None = None, **changes: object) -> TrainSettings:
    """A named preset with the family's adjustments and the caller's changes on top.

    Raises:
        SlimeError: for an unknown preset or setting.
    """
    base: dict[str, dict[str, object]] = {
        "instant": {},
        "thorough": {"steps": 200, "learning_rate": 0.05, "views": 60, "row_groups": "shared", "l2": 0.0},
        "paper": {
            "steps": 200,
            "learning_rate": 0.1,
            "views": 200,
            "crop": 0.6,
            "rotation": 30.0,
            "blur": 0.5,
            "soft_labels": False,
            "row_groups": "shared",
            "l2": 0.0,
            "keep": "iou",
        },
    }
    if name not in base:
        raise SlimeError(f'Unknown preset "{name}"; choose one of {", ".join(base)}.')
    known = {field.name for field in fields(TrainSettings)}
    adjustments = dict(family.settings) if family is not None and name == "instant" else {}
    values = base[name] | adjustments | changes
    unknown = sorted(set(values) - known)
    if unknown:
        raise SlimeError(f"Unknown training settings: {', '.join(unknown)}.")
    return replace(TrainSettings(), preset=name, **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SegmentSettings:
    """How an image is segmented.

    Attributes:
        seed: of the noise; the same seed gives the same masks.
        crops: 1 for the whole image, n for n x n overlapping crops (the paper uses 2 for faces).
        overlap: share of a crop's side that neighbours share.
        flip: also segment the mirrored image and average (twice the time).
        draws: noise draws averaged; each costs another UNet pass.
        zoom: objects to look for more closely, 0 for none, for objects smaller in the image than in the examples: up to
            5 further passes an object and 5 to spare (:mod:`slime.zoom`).
        min_confidence: images of a lower :attr:`slime.segment.PartMaps.confidence` hold no part at all; no effect
            where the examples' sureness is unknown.
        refine: "off", "fast" or "best", see :func:`slime.refine.refine_maps`.
        batch_size: images of one UNet pass; 0 asks the denoiser how many fit the free memory.
    """

    seed: int = 0
    crops: int = 1
    overlap: float = 0.25
    flip: bool = False
    draws: int = 1
    zoom: int = 0
    min_confidence: float = 0.0
    refine: str = "fast"
    batch_size: int = 0

    def __post_init__(self) -> None:
        checks = {
            "crops": self.crops >= 1,
            "overlap": 0 <= self.overlap < 1,
            "draws": self.draws >= 1,
            "zoom": self.zoom >= 0,
            "min_confidence": 0 <= self.min_confidence <= 2,
            "batch_size": self.batch_size >= 0,
        }
        wrong = [f"{name} = {getattr(self, name)!r}" for name, valid in checks.items() if not valid]
        if wrong:
            raise SlimeError(f"Segmentation setting out of range: {', '.join(wrong)}.")
        if self.refine not in ("off", "fast", "best"):
            raise SlimeError(f'Unknown refinement "{self.refine}"; choose off, fast or best.')
