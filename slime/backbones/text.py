"""Text-conditioned denoisers: prompts, token embeddings in the context, captured attention, gradients.

The paper's trainer and decoder need these; everything else works with any :class:`.base.Backbone`.
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
    """Text conditioning.

    Attributes:
        tokens: token embeddings [T, D] for a whole batch, or [B, T, D].
        pooled: [P], for SDXL.
        extra: [E, D], further tokens whose keys are recorded after those of ``tokens`` but which nothing attends to.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    extra: Tensor | None = None

    @classmethod
    def of(cls, condition: Mapping[str, Tensor]) -> Context:
        """Make a context from the tensors of :meth:`.base.Backbone.condition`."""
        return cls(condition["context"].float(), condition.get("pooled"))

    def __len__(self) -> int:
        """Return T, without the extra tokens."""
        return self.tokens.shape[-2]

    def to(self, device: torch.device) -> Context:
        """Return the context on a device, so that no pass has to copy it again."""
        pooled, extra = (None if tensor is None else tensor.to(device) for tensor in (self.pooled, self.extra))
        return Context(self.tokens.to(device), pooled, extra)

    def for_batch(self, batch: int) -> Tensor:
        """Return the tokens and the extra tokens as [batch, T + E, D]."""
        tokens = self.tokens if self.tokens.ndim == 3 else self.tokens[None].expand(batch, -1, -1)
        if self.extra is None:
            return tokens
        return torch.cat([tokens, self.extra.to(tokens)[None].expand(batch, -1, -1)], 1)


class Capture:
    """Attention inputs of chosen layers, recorded during one pass: ``cross`` of ``choice.read``, ``self_`` of
    ``choice.propagate``.

    An adapter calls :meth:`record` for every chosen layer. With gradient checkpointing it may do so twice; the second
    record replaces the first, equal one. ``make_maps`` computes part maps once all cross-attention layers are recorded;
    an adapter may propagate them in the self-attention layers that follow, see :meth:`maps_to_propagate`.
    """

    def __init__(
        self, choice: LayerChoice, stop_early: bool = False, make_maps: Callable[[Capture], Tensor] | None = None
    ) -> None:
        self.choice = choice
        self.stop_early = stop_early
        self.cross: dict[str, Attention] = {}
        self.self_: dict[str, Attention] = {}
        self.propagated: dict[str, Tensor] = {}
        self._make_maps = make_maps
        self._maps: Tensor | None = None

    def record(self, attention_type: str, name: str, attention: Attention) -> None:
        """Store the inputs of one layer, "cross" or "self"; raise EndOfPass after the last one if asked to."""
        (self.cross if attention_type == "cross" else self.self_)[name] = attention
        complete = len(self.cross) == len(self.choice.read) and len(self.self_) == len(self.choice.propagate)
        if self.stop_early and complete:
            raise EndOfPass

    def maps_to_propagate(self, name: str) -> Tensor | None:
        """Return part maps [B, K, h, w] to propagate in this self-attention layer, into ``propagated``, or None."""
        if self._make_maps is None or name not in self.choice.propagate or len(self.cross) < len(self.choice.read):
            return None
        if self._maps is None:
            self._maps = self._make_maps(self)
        return self._maps


@runtime_checkable
class TextConditioned(Backbone, Protocol):
    """A denoiser with cross-attention to text. Latents are in the model's own scale (after the VAE's factor)."""

    @property
    def context_dim(self) -> int:
        """Width of a token embedding."""
        ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative product of the noise schedule's alphas [T], on the CPU."""
        ...

    def encode_prompt(self, prompt: str) -> Context:
        """Encode a text; raises SlimeError where there is no text encoder."""
        ...

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        """Predict eps [B, C, h, w] of latents noised to ``timestep``, whatever the model itself predicts.

        Returns None where ``capture`` ended the pass early.
        """
        ...

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        """Lend the frozen weights to autograd: gradients flow through ``predict_noise`` to the context."""
        ...


def text_conditioned(backbone: Backbone, purpose: str) -> TextConditioned:
    """Return the backbone if it is text-conditioned.

    Raises:
        SlimeError: it has no text context.
    """
    if not isinstance(backbone, TextConditioned):
        raise SlimeError(
            f'{purpose} learns token embeddings in the text of a Stable Diffusion UNet, which "{backbone.info.id}" '
            "does not have. Use the preset instant, or connect an SD1.x, SD2.x or SDXL checkpoint alone."
        )
    return backbone


def add_noise(backbone: TextConditioned, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Return sqrt(abar_t) z + sqrt(1 - abar_t) eps (DDPM's forward process)."""
    abar = float(backbone.alphas_cumprod[timestep])  # on the CPU: no host sync
    return abar**0.5 * latents + (1 - abar) ** 0.5 * noise


@torch.no_grad()
def capture_attention(
    backbone: TextConditioned,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    context: Context,
    layers: LayerChoice,
    make_maps: Callable[[Capture], Tensor] | None = None,
) -> Capture:
    """Run one pass over noised latents that ends after the last chosen layer.

    Raises:
        SlimeError: a timestep that the model does not have, or tokens of another width.
    """
    if not 0 <= timestep < len(backbone.alphas_cumprod) or context.tokens.shape[-1] != backbone.context_dim:
        raise SlimeError(
            f"Timestep {timestep} with token embeddings {context.tokens.shape[-1]} wide does not fit this model: it "
            f"has {len(backbone.alphas_cumprod)} timesteps and embeddings {backbone.context_dim} wide."
        )
    capture = Capture(layers, stop_early=True, make_maps=make_maps)
    backbone.predict_noise(add_noise(backbone, latents, noise, timestep), timestep, context, capture)
    return capture
