"""Combine any number of backbones: each is a branch, whose features stand in groups of their own in one fit.

A diffusion model and a vision encoder capture different things: OIParts (arXiv 2503.01144) combined Stable Diffusion
and DINOv2 for one-shot parts, there by cosine similarity without training.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SlimeError
from .base import Backbone, BackboneInfo, ExtractionSpec, Features
from .layers import BRANCH, Layer, LayerChoice

TOGETHER = "+"  # joins the ids of the branches
Value = TypeVar("Value")


class _Branch(NamedTuple):
    backbone: Backbone
    prefix: str  # of the names of its layers, groups and conditions
    channels: slice  # of an encoded image


class FusedBackbone:
    """Several backbones that see the same image.

    The first one decides the image size and the noise level, and by default propagates; the others keep their usual
    noise level. Encoded images are concatenated along the channels, so all cells must span the same number of pixels.

    Raises:
        SlimeError: fewer than two backbones, one twice, or cells of different sizes.
    """

    def __init__(self, *backbones: Backbone) -> None:
        infos = [backbone.info for backbone in backbones]
        ids = [info.id for info in infos]
        if len(set(ids)) < 2 or len(set(ids)) < len(ids) or len({info.cell for info in infos}) > 1:
            raise SlimeError(
                f"These models cannot be combined: {', '.join(ids)}. Connect a diffusion model to model, and a vision "
                "encoder or SAM3 to clip_vision."
            )
        ends = list(accumulate(info.channels for info in infos))
        self._branches = tuple(
            _Branch(backbone, backbone.info.id + BRANCH, slice(end - backbone.info.channels, end))
            for backbone, end in zip(backbones, ends, strict=True)
        )
        self.layers = tuple(
            Layer(branch.prefix + layer.name, layer.stride)
            for branch in self._branches
            for layer in branch.backbone.layers
        )
        first = infos[0]
        self.info = BackboneInfo(
            TOGETHER.join(ids),
            first.side,
            first.cell,
            math.lcm(*(info.multiple for info in infos)),
            ends[-1],
            first.timestep,
            first.views,
            first.grouping,
        )

    @property
    def device(self) -> torch.device:
        return self._branches[0].backbone.device

    def default_layers(self) -> LayerChoice:
        """Return the default layers of all branches; where one has none, the probe chooses among all layers."""
        choices = [
            LayerChoice(*(_prefixed(branch.prefix, names) for names in branch.backbone.default_layers()))
            for branch in self._branches
        ]
        read = tuple(name for choice in choices for name in choice.read) if all(c.read for c in choices) else ()
        return LayerChoice(read, next((choice.propagate for choice in choices if choice.propagate), ()))

    def condition(self, prompt: str) -> dict[str, Tensor]:
        return {
            branch.prefix + name: tensor
            for branch in self._branches
            for name, tensor in branch.backbone.condition(prompt).items()
        }

    def encode_images(self, images: Tensor) -> Tensor:
        """Return encoded images on the CPU: pixels of a large batch would fill a device."""
        return torch.cat([_encoded(branch, images) for branch in self._branches], 1)

    def encode_beside(self, latents: Tensor, images: Tensor) -> Tensor:
        """Encode images [B, H, W, 3] of which the first branch's latents [B, C, h, w], of any size, are at hand."""
        others = [_encoded(branch, images) for branch in self._branches[1:]]
        first = latents.to("cpu", torch.float32)
        first = F.interpolate(first, others[0].shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([first, *others], 1)

    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        extracted: list[Features] = []
        groups: dict[str, Tensor] = {}
        for number, branch in enumerate(self._branches):
            layers = LayerChoice(*(_local(branch.prefix, names) for names in spec.layers))
            if not any(layers):
                continue
            timestep = branch.backbone.info.timestep if number else spec.timestep
            own = ExtractionSpec(layers, _local_items(branch.prefix, spec.condition), timestep, spec.grouping)
            channels = branch.channels
            features = branch.backbone.extract(encoded[:, channels], own, noise[:, channels]).to(self.device)
            groups |= {branch.prefix + name: maps for name, maps in features.groups.items()}
            extracted.append(features)
        attention = tuple(layer for features in extracted for layer in features.attention)
        return Features(groups, attention, max(features.grid for features in extracted))

    def fitting_batch(self, size: tuple[int, int]) -> int:
        return min(branch.backbone.fitting_batch(size) for branch in self._branches)

    def cache_key(self) -> tuple[object, Hashable] | None:
        """Return the first branch's owner, and a key of the state of all branches."""
        backbones = [branch.backbone for branch in self._branches]
        keys = [backbone.cache_key() for backbone in backbones]
        known = [key for key in keys if key is not None]
        if len(known) < len(keys):
            return None
        return known[0][0], tuple((ref(owner), state) for owner, state in known)


def _encoded(branch: _Branch, images: Tensor) -> Tensor:
    return branch.backbone.encode_images(images).to("cpu", torch.float32)


def _prefixed(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def _local(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _local_items(prefix: str, items: Mapping[str, Value]) -> dict[str, Value]:
    return {name.removeprefix(prefix): value for name, value in items.items() if name.startswith(prefix)}
