"""The protocol of a backbone: what an image is looked at with, and what a look gives."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..settings import InstantSettings
from .attention import Attention
from .layers import Layer, LayerChoice, select_layers

TOGETHER = "+"  # between the ids of backbones that look together


@dataclass(frozen=True)
class BackboneInfo:
    """What depends on the kind of model.

    Attributes:
        id: stored in embeddings; embeddings of one kind do not fit another.
        side: side in pixels of the square whose area the model works on.
        cell: pixels a cell of the encoded image spans, a side.
        multiple: sides of images must be multiples of so many pixels.
        channels: of encoded images.
        timestep: noise level of its features.
        instant: what the instant trainer does on it where nobody says otherwise.
    """

    id: str
    side: int
    cell: int
    multiple: int
    channels: int
    timestep: int = 0
    instant: InstantSettings = field(default_factory=InstantSettings)


@dataclass(frozen=True)
class Plan:
    """One pass: what it reads, and under which condition.

    Attributes:
        layers: layers to read.
        condition: tensors of :meth:`Backbone.condition`.
        timestep: noise level.
        grouping: what has features of its own: every "resolution" or every "layer".
    """

    layers: LayerChoice
    condition: Mapping[str, Tensor]
    timestep: int
    grouping: str = "resolution"

    def to(self, device: torch.device) -> Plan:
        """The same with its condition on a device, so that no pass has to send it there again."""
        return replace(self, condition={name: tensor.to(device) for name, tensor in self.condition.items()})


@dataclass(frozen=True)
class Observation:
    """What one pass says about a batch of images.

    Attributes:
        features: one [B, D, h, w] for every group, coarse to fine. The score of a part is the sum over the groups of
            (features . the part's row), brought to one size; the background's is 0.
        attention: self-attention to propagate maps along.
        grid: height and width of the part maps that are read from it.
    """

    features: tuple[Tensor, ...]
    attention: tuple[Attention, ...]
    grid: tuple[int, int]

    def to(self, device: torch.device | str) -> Observation:
        """The same on another device."""
        features = tuple(maps.to(device) for maps in self.features)
        return replace(self, features=features, attention=tuple(a.to(device) for a in self.attention))


class Scores(NamedTuple):
    """What one pass says about a batch of images and rows known beforehand, for every set of rows.

    ``logits`` [B, K, *grid] of the background and the parts; ``propagated`` their maps [B, K, *grid] after
    ``attention``, where the pass itself could make them, else empty.
    """

    logits: tuple[Tensor, ...]
    attention: tuple[Attention, ...]
    propagated: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> Scores:
        """The same on another device."""
        logits, propagated = (tuple(maps.to(device) for maps in kind) for kind in (self.logits, self.propagated))
        return Scores(logits, tuple(a.to(device) for a in self.attention), propagated)


class Backbone(Protocol):
    """A model, and how to look with it. Raises SlimeError where something is missing or does not fit."""

    @property
    def info(self) -> BackboneInfo: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> Sequence[Layer]:
        """All that can be read, in the order it runs."""
        ...

    def default_layers(self) -> LayerChoice:
        """What is known to serve; empty where nothing is, and the probe has to choose."""
        ...

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """What a pass runs on beside the image, on the CPU, by name; empty where there is no such thing."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] in [0, 1], sides multiples of ``info.multiple`` -> [B, C, H / cell, W / cell], float32."""
        ...

    def observe(self, encoded: Tensor, plan: Plan, noise: Tensor) -> Observation:
        """ONE pass over encoded images with noise of their shape, ended after the last layer that is read."""
        ...

    def fitting_batch(self, size: tuple[int, int]) -> int:
        """How many encoded images of this height and width one pass should take, from the free memory; at least 1."""
        ...


class EndOfPass(Exception):  # noqa: N818  a signal, not an error
    """Ends a pass whose remaining layers nobody reads."""


@runtime_checkable
class Identified(Protocol):
    """A backbone that can say whether it still sees as it did, so that what it saw may be used again."""

    def identity(self) -> tuple[object, Hashable] | None:
        """Whose life the memory shares, and what tells its states apart; None where that cannot be told."""
        ...


@runtime_checkable
class ScoresRows(Protocol):
    """A backbone that can score known rows in the pass itself, which saves the features."""

    def score(
        self, encoded: Tensor, plan: Plan, noise: Tensor, rows: Sequence[Tensor], parts: Sequence[int]
    ) -> Scores: ...


def choose_layers(backbone: Backbone, read: str = "", propagate: str = "") -> LayerChoice:
    """The user's patterns first, then the backbone's own choice."""
    default = backbone.default_layers() if not (read and propagate) else LayerChoice((), ())
    return LayerChoice(
        select_layers(read, backbone.layers) if read else default.read,
        select_layers(propagate, backbone.layers) if propagate else default.propagate,
    )


def halved(tensor: Tensor) -> Tensor:
    """In half precision, where that holds its numbers; else in single: some text encoders exceed 65504."""
    half = tensor.detach().half().cpu().contiguous()
    return half if bool(torch.isfinite(half).all()) else tensor.detach().float().cpu().contiguous()


def seeded_noise(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Gaussian noise that depends on the seed alone, not on the device; one draw serves every image of a batch."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, *shape[1:]), generator=generator).to(device).expand(tuple(shape))
