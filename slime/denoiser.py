"""What the method needs from a diffusion model, and the record of attention it fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .layers import AttentionLayer, Family, LayerChoice, LayerKey


@dataclass(frozen=True)
class Context:
    """Text conditioning: ``rows`` [T, D] for a whole batch, or [B, T, D], and, for SDXL, ``pooled`` [P].

    ``extra`` [E, D] are further rows whose keys are recorded, behind those of ``rows``, but which nothing attends to.
    """

    rows: Tensor
    pooled: Tensor | None = None
    extra: Tensor | None = None

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


class Attention(NamedTuple):
    """Inputs of one attention layer: ``query`` [B, N, heads*d], ``key`` [B, T, heads*d], N = height*width.

    In cross-attention T counts a context's extra rows too, in self-attention it is N.
    """

    query: Tensor
    key: Tensor
    heads: int
    height: int
    width: int


class Capture:
    """The attention inputs of chosen layers during one UNet pass.

    A denoiser calls :meth:`record` for every layer named in ``choice``; with gradient checkpointing it may do so twice,
    the second record replaces an equal first one. ``maps`` gives part maps once all cross-attention layers are there;
    a denoiser may propagate them in the self-attention layers that come later, see :meth:`to_propagate`.
    """

    def __init__(
        self, choice: LayerChoice, stop_early: bool = False, maps: Callable[[Capture], Tensor] | None = None
    ) -> None:
        self.choice = choice
        self.stop_early = stop_early
        self.cross: dict[LayerKey, Attention] = {}
        self.self_: dict[LayerKey, Attention] = {}
        self.propagated: dict[LayerKey, Tensor] = {}
        self._make_maps = maps
        self._maps: Tensor | None = None

    def record(self, kind: str, key: LayerKey, attention: Attention) -> None:
        """Store one layer's inputs, ``kind`` "cross" or "self"; ends the pass when the last wanted layer has come."""
        (self.cross if kind == "cross" else self.self_)[key] = attention
        if self.stop_early and len(self.cross) == len(self.choice.cross) and len(self.self_) == len(self.choice.self_):
            raise CaptureComplete

    def to_propagate(self, key: LayerKey) -> Tensor | None:
        """Part maps [B, K, h, w] whose WAS of this self-attention layer may be left in ``propagated``, or None."""
        if self._make_maps is None or key not in self.choice.self_ or len(self.cross) < len(self.choice.cross):
            return None
        if self._maps is None:
            self._maps = self._make_maps(self)
        return self._maps


class CaptureComplete(Exception):  # noqa: N818  a signal, not an error
    """Ends a UNet pass whose remaining layers nobody reads."""


class Denoiser(Protocol):
    """A Stable Diffusion UNet with its VAE and text encoder.

    Latents are in the UNet's scale (after the VAE's factor). ``predict_noise`` gives eps whatever the UNet predicts.
    """

    @property
    def family(self) -> Family: ...

    @property
    def prediction(self) -> str:
        """ "eps" or "v"."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> Sequence[AttentionLayer]: ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """[1000]: cumulative product of the noise schedule's alphas."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] in [0, 1], H and W multiples of 8 -> latents [B, C, H/8, W/8], float32."""
        ...

    def encode_prompt(self, prompt: str) -> Context:
        """Text -> context; raises SlimeError where no text encoder is at hand."""
        ...

    def predict_noise(
        self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None, image_size: tuple[int, int]
    ) -> Tensor | None:
        """eps [B, C, h, w] for latents noised to ``timestep``; None when ``capture`` ended the pass early.

        ``image_size`` (height, width) in pixels conditions SDXL.
        """
        ...

    def fitting_batch(self, latent_size: tuple[int, int]) -> int:
        """How many latents of this height and width one UNet pass should take, from the free memory; at least 1."""
        ...

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        """Lend the weights to autograd (frozen): gradients flow through ``predict_noise`` to the context."""
        ...


LARGEST_BATCH = 16


def batch_for(free: float, one: float) -> int:
    """Sub-batch for ``free`` bytes when an image needs ``one``; half of the memory is left for the maps."""
    return int(min(max(0.5 * free / max(one, 1.0), 1), LARGEST_BATCH))


def add_noise(denoiser: Denoiser, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """sqrt(abar_t) z + sqrt(1 - abar_t) eps (DDPM's forward process)."""
    abar = float(denoiser.alphas_cumprod[timestep])  # it lies on the CPU: nothing waits
    return abar**0.5 * latents + (1 - abar) ** 0.5 * noise


def seeded_noise(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Gaussian noise that depends on the seed alone, not on the device; one draw serves every image of a batch."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, *shape[1:]), generator=generator).to(device).expand(tuple(shape))
