"""What only a text-conditioned denoiser can do: a prompt, rows in its context, attention captured, gradients.

The paper's trainer and the official read-out need it; everything else gets by with :class:`.base.Backbone`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import SlimeError
from .attention import Attention
from .base import Backbone, EndOfPass
from .layers import LayerChoice


@dataclass(frozen=True)
class Context:
    """Text conditioning: ``rows`` [T, D] for a whole batch, or [B, T, D], and, for SDXL, ``pooled`` [P].

    ``extra`` [E, D] are further rows whose keys are recorded, behind those of ``rows``, but which nothing attends to.
    """

    rows: Tensor
    pooled: Tensor | None = None
    extra: Tensor | None = None

    @classmethod
    def of(cls, condition: Mapping[str, Tensor]) -> Context:
        """From :meth:`.base.Backbone.condition`."""
        return cls(condition["context"].float(), condition.get("pooled"))

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows.shape[-2]

    def to(self, device: torch.device) -> Context:
        """The same on a device, so that no pass has to send it there again."""
        pooled, extra = (None if tensor is None else tensor.to(device) for tensor in (self.pooled, self.extra))
        return Context(self.rows.to(device), pooled, extra)

    def for_batch(self, batch: int) -> Tensor:
        """[batch, T + E, D]."""
        rows = self.rows if self.rows.ndim == 3 else self.rows[None].expand(batch, -1, -1)
        if self.extra is None:
            return rows
        return torch.cat([rows, self.extra.to(rows)[None].expand(batch, -1, -1)], 1)


class Capture:
    """The attention inputs of chosen layers during one pass: ``cross`` of ``choice.read``, ``self_`` of
    ``choice.propagate``.

    A host calls :meth:`record` for every chosen layer; with gradient checkpointing it may do so twice, the second
    record replaces an equal first one. ``maps`` gives part maps once all cross-attention layers are there; a host may
    propagate them in the self-attention layers that come later, see :meth:`to_propagate`.
    """

    def __init__(
        self, choice: LayerChoice, stop_early: bool = False, maps: Callable[[Capture], Tensor] | None = None
    ) -> None:
        self.choice = choice
        self.stop_early = stop_early
        self.cross: dict[str, Attention] = {}
        self.self_: dict[str, Attention] = {}
        self.propagated: dict[str, Tensor] = {}
        self._make_maps = maps
        self._maps: Tensor | None = None

    def record(self, kind: str, name: str, attention: Attention) -> None:
        """Store one layer's inputs, ``kind`` "cross" or "self"; ends the pass when the last wanted layer has come."""
        (self.cross if kind == "cross" else self.self_)[name] = attention
        complete = len(self.cross) == len(self.choice.read) and len(self.self_) == len(self.choice.propagate)
        if self.stop_early and complete:
            raise EndOfPass

    def to_propagate(self, name: str) -> Tensor | None:
        """Part maps [B, K, h, w] whose WAS of this self-attention layer may be left in ``propagated``, or None."""
        if self._make_maps is None or name not in self.choice.propagate or len(self.cross) < len(self.choice.read):
            return None
        if self._maps is None:
            self._maps = self._make_maps(self)
        return self._maps


@runtime_checkable
class TextConditioned(Backbone, Protocol):
    """A denoiser whose cross-attention reads text. Latents are in its own scale (after the VAE's factor)."""

    @property
    def context_dim(self) -> int:
        """Width of a text embedding row."""
        ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """[T]: cumulative product of the noise schedule's alphas, on the CPU."""
        ...

    def encode_prompt(self, prompt: str) -> Context:
        """Text -> context; raises SlimeError where no text encoder is at hand."""
        ...

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        """eps [B, C, h, w] for latents noised to ``timestep``, whatever the model predicts; None when ``capture`` ended
        the pass early."""
        ...

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        """Lend the weights to autograd (frozen): gradients flow through ``predict_noise`` to the context."""
        ...


def text_conditioned(backbone: Backbone, purpose: str) -> TextConditioned:
    """The same backbone where it is one.

    Raises:
        SlimeError: it has no text to put rows into.
    """
    if not isinstance(backbone, TextConditioned):
        raise SlimeError(
            f'{purpose} puts rows into the text of a Stable Diffusion UNet, which "{backbone.info.id}" does not have. '
            "Use the preset instant, or an SD1.x, SD2.x or SDXL checkpoint alone."
        )
    return backbone


def add_noise(backbone: TextConditioned, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """sqrt(abar_t) z + sqrt(1 - abar_t) eps (DDPM's forward process)."""
    abar = float(backbone.alphas_cumprod[timestep])  # it lies on the CPU: nothing waits
    return abar**0.5 * latents + (1 - abar) ** 0.5 * noise


@torch.no_grad()
def capture_attention(
    backbone: TextConditioned,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    context: Context,
    layers: LayerChoice,
    maps: Callable[[Capture], Tensor] | None = None,
) -> Capture:
    """One pass over noised latents, ended after the last chosen layer.

    Raises:
        SlimeError: a timestep that the model does not have, or rows of another width.
    """
    if not 0 <= timestep < len(backbone.alphas_cumprod) or context.rows.shape[-1] != backbone.context_dim:
        raise SlimeError(
            f"A timestep of {timestep} and text rows {context.rows.shape[-1]} wide do not fit the model, which has "
            f"{len(backbone.alphas_cumprod)} timesteps and rows {backbone.context_dim} wide."
        )
    capture = Capture(layers, stop_early=True, maps=maps)
    backbone.predict_noise(add_noise(backbone, latents, noise, timestep), timestep, context, capture)
    return capture
