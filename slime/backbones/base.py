"""Define what a backbone is: a frozen model whose features of an image a part segmenter is learned on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..settings import RESOLUTION
from .attention import Attention
from .layers import Layer, LayerChoice, select_layers


@dataclass(frozen=True)
class BackboneInfo:
    """Properties of a kind of model.

    Attributes:
        id: stored in embeddings; embeddings of one id do not fit another.
        side: side in pixels of the square whose area the model works on.
        cell: pixels per side of one position (cell) of an encoded image.
        multiple: sides of images must be multiples of this many pixels.
        channels: channels of encoded images.
        timestep: noise level of the features.
        views: of the examples for the instant trainer, by default.
        grouping: how layers form feature groups by default, see :class:`ExtractionSpec`.
    """

    id: str
    side: int
    cell: int
    multiple: int
    channels: int
    timestep: int = 0
    views: int = 24
    grouping: str = RESOLUTION


@dataclass(frozen=True)
class ExtractionSpec:
    """What one forward pass extracts, and under which condition.

    Attributes:
        layers: layers to read features from and to propagate along.
        condition: tensors of :meth:`Backbone.condition`.
        timestep: noise level.
        grouping: "resolution" adds up the layers of one resolution, "layer" keeps every layer apart.
    """

    layers: LayerChoice
    condition: Mapping[str, Tensor]
    timestep: int
    grouping: str = RESOLUTION

    def to(self, device: torch.device) -> ExtractionSpec:
        """Return the spec with its condition on a device, so that no pass has to copy it again."""
        return replace(self, condition={name: tensor.to(device) for name, tensor in self.condition.items()})


@dataclass(frozen=True)
class Features:
    """Features of a batch of images.

    Attributes:
        groups: [B, D, h, w] by name of the group, coarse to fine. The logit of a part is the sum over the groups of
            (features . the part's vector for the group), resized to ``grid``; the background's logit is 0.
        attention: self-attention along which part maps are propagated.
        grid: height and width of the part maps.
    """

    groups: Mapping[str, Tensor]
    attention: tuple[Attention, ...]
    grid: tuple[int, int]

    def to(self, device: torch.device | str, copy: bool = False) -> Features:
        """Return the features on another device, as tensors of their own with ``copy``."""
        groups = {name: maps.detach().to(device, copy=copy) for name, maps in self.groups.items()}
        return replace(self, groups=groups, attention=tuple(a.to(device, copy) for a in self.attention))

    def of_image(self, index: int) -> Features:
        """Return the features of one image, as a batch of one."""
        groups = {name: maps[index, None] for name, maps in self.groups.items()}
        return replace(self, groups=groups, attention=tuple(a.of_image(index) for a in self.attention))

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(maps.nbytes for maps in self.groups.values()) + sum(a.nbytes for a in self.attention)


class PartLogits(NamedTuple):
    """Logits that the pass itself computed for known part vectors, one entry per set of embeddings.

    ``logits`` [B, K, *grid] of the background and the parts; ``propagated`` the softmax of them [B, K, *grid],
    propagated once along ``attention``, empty where the pass could not do that.
    """

    logits: tuple[Tensor, ...]
    attention: tuple[Attention, ...]
    propagated: tuple[Tensor, ...] = ()


class Backbone(Protocol):
    """A frozen model that turns images into features. Raises SlimeError where something is missing or does not fit."""

    @property
    def info(self) -> BackboneInfo: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> Sequence[Layer]:
        """All layers that can be read, in the order they run."""
        ...

    def default_layers(self) -> LayerChoice:
        """Return the layers that are known to work; empty where none are, and the probe has to choose."""
        ...

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """Return the inputs of a pass besides the image, on the CPU, by name; empty where there are none."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [B, H, W, 3] in [0, 1], sides multiples of ``info.multiple``: [B, C, H / cell, W / cell]."""
        ...

    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        """Run ONE pass over encoded images with noise of their shape; it ends after the last layer that is read."""
        ...

    def fitting_batch(self, size: tuple[int, int]) -> int:
        """Return how many encoded images of this height and width one pass can take, from the free memory; >= 1."""
        ...

    def cache_key(self) -> tuple[object, Hashable] | None:
        """Return the object whose lifetime bounds a cache, and a key of the weights' state; None disables caching."""
        ...


class EndOfPass(Exception):  # a signal, not an error
    """Ends a pass whose remaining layers are not read."""


@runtime_checkable
class ScoresParts(Protocol):
    """A backbone that can compute the logits of known part vectors inside the pass, which saves the features."""

    def score_parts(
        self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor, vectors: Sequence[Mapping[str, Tensor]]
    ) -> PartLogits: ...


def choose_layers(backbone: Backbone, read: str = "", propagate: str = "") -> LayerChoice:
    """Return the layers of the user's patterns, or the backbone's own choice where a pattern is empty."""
    default = backbone.default_layers() if not (read and propagate) else LayerChoice((), ())
    return LayerChoice(
        select_layers(read, backbone.layers) if read else default.read,
        select_layers(propagate, backbone.layers) if propagate else default.propagate,
    )


def halved(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision, or in single where half cannot hold it: some text encoders exceed 65504."""
    half = tensor.detach().half().cpu().contiguous()
    return half if bool(torch.isfinite(half).all()) else tensor.detach().float().cpu().contiguous()


def seeded_noise(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Return Gaussian noise that depends on the seed alone, not on the device; all images of a batch share it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, *shape[1:]), generator=generator).to(device).expand(tuple(shape))
