"""Two backbones that look at one image: their features stand side by side in one fit, as groups of their own.

A diffusion model and a vision encoder see different things: OIParts (arXiv 2503.01144) joined Stable Diffusion and
DINOv2 for one-shot parts, there by cosine likeness without training.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..errors import SlimeError
from .base import TOGETHER, Backbone, BackboneInfo, Identified, Observation, Plan
from .layers import LayerChoice

SECOND = "second "  # begins the names of the second one's condition


class _Eye(NamedTuple):
    backbone: Backbone
    layers: frozenset[str]
    channels: slice  # of an encoded image


class Joined:
    """The first backbone decides the size, and by default propagates; the second looks at the same image, at the noise
    level that it usually does.

    Encoded images of both stand behind each other in channels, so their cells must span as many pixels. Features are
    filled up with zeros to the wider ones' width.

    Raises:
        SlimeError: cells of different sizes, or layers of the same name.
    """

    def __init__(self, first: Backbone, second: Backbone) -> None:
        one, other = first.info, second.info
        names = [{layer.name for layer in backbone.layers} for backbone in (first, second)]
        if one.cell != other.cell or names[0] & names[1]:
            raise SlimeError(f'"{one.id}" and "{other.id}" cannot look together.')
        split = one.channels
        self._eyes = (
            _Eye(first, frozenset(names[0]), slice(split)),
            _Eye(second, frozenset(names[1]), slice(split, split + other.channels)),
        )
        self.layers = (*first.layers, *(layer._replace(eye=1) for layer in second.layers))
        self.info = BackboneInfo(
            one.id + TOGETHER + other.id,
            one.side,
            one.cell,
            math.lcm(one.multiple, other.multiple),
            split + other.channels,
            one.timestep,
            one.instant,
        )

    @property
    def device(self) -> torch.device:
        return self._eyes[0].backbone.device

    def default_layers(self) -> LayerChoice:
        """Both are read as they are alone; where one is not known, the probe looks at all."""
        first, second = (eye.backbone.default_layers() for eye in self._eyes)
        read = (*first.read, *second.read) if first.read and second.read else ()
        return LayerChoice(read, first.propagate or second.propagate)

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """Of both; the second one's by names that begin with :data:`SECOND`."""
        first, second = (eye.backbone.condition(prompt) for eye in self._eyes)
        return first | {SECOND + name: tensor for name, tensor in second.items()}

    def encode_images(self, images: Tensor) -> Tensor:
        """On the CPU: pixels of a large batch would fill a device."""
        return torch.cat([eye.backbone.encode_images(images).to("cpu", torch.float32) for eye in self._eyes], 1)

    def encode_beside(self, latents: Tensor, images: Tensor) -> Tensor:
        """Encoded images, of which the first one's are at hand: latents [B, C, h, w] of any size, images as they are
        encoded, [B, H, W, 3]."""
        second = self._eyes[1].backbone.encode_images(images).to("cpu", torch.float32)
        first = F.interpolate(latents.to("cpu", torch.float32), second.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([first, second], 1)

    def observe(self, encoded: Tensor, plan: Plan, noise: Tensor) -> Observation:
        seen = []
        first = {name: tensor for name, tensor in plan.condition.items() if not name.startswith(SECOND)}
        second = {name[len(SECOND) :]: plan.condition[name] for name in plan.condition if name.startswith(SECOND)}
        timesteps = (plan.timestep, self._eyes[1].backbone.info.timestep)
        for eye, condition, timestep in zip(self._eyes, (first, second), timesteps, strict=True):
            layers = LayerChoice(*(tuple(n for n in chosen if n in eye.layers) for chosen in plan.layers))
            if any(layers):
                own = Plan(layers, condition, timestep, plan.grouping)
                seen.append(eye.backbone.observe(encoded[:, eye.channels], own, noise[:, eye.channels]).to(self.device))
        features = [maps for one in seen for maps in one.features]
        width = max((maps.shape[1] for maps in features), default=0)
        return Observation(
            tuple(F.pad(maps, (0, 0, 0, 0, 0, width - maps.shape[1])) for maps in features),
            tuple(layer for one in seen for layer in one.attention),
            max(one.grid for one in seen),
        )

    def fitting_batch(self, size: tuple[int, int]) -> int:
        return min(eye.backbone.fitting_batch(size) for eye in self._eyes)

    def identity(self) -> tuple[object, Hashable] | None:
        """The first one's model; what tells the state of both."""
        known = [eye.backbone.identity() if isinstance(eye.backbone, Identified) else None for eye in self._eyes]
        if known[0] is None or known[1] is None:
            return None
        (owner, state), (other, its_state) = known[0], known[1]
        return owner, (state, ref(other), its_state)
