"""A UNet small enough to work out by hand: queries are linear in the (noisy) colours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slime.backbones.attention import Attention
from slime.backbones.base import EndOfPass
from slime.backbones.layers import Layer
from slime.backbones.sd_unet import Family, SDUNet
from slime.backbones.text import Capture, Context

DIM, HEADS, HEAD_DIM = 12, 2, 6
LAYERS = (Layer("output.3.0", 4), Layer("output.6.0", 2), Layer("output.9.0", 1))


class ToyUNet(SDUNet):
    """It works at ``side`` pixels, and counts its passes and the images it encodes."""

    def __init__(
        self,
        name: str = "toy",
        side: int = 128,
        device: torch.device = torch.device("cpu"),  # noqa: B008  immutable
        dtype: torch.dtype = torch.float32,
    ) -> None:
        g = torch.Generator().manual_seed(3)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)
        super().__init__(Family(name, DIM, side), "eps", LAYERS, abar, device, channels=4, cell=8)
        queries = {layer.name: torch.randn(4, HEADS * HEAD_DIM, generator=g) for layer in LAYERS}
        keys = {layer.name: torch.randn(DIM, HEADS * HEAD_DIM, generator=g) for layer in LAYERS}
        self.w_out = (torch.randn(DIM, 4, generator=g) * 0.05).to(device, dtype)
        self.w_q, self.w_k = ({name: w.to(device, dtype) for name, w in kind.items()} for kind in (queries, keys))
        self.passes = 0
        self.encoded = 0

    def encode_images(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        small = F.avg_pool2d(images.to(self.device).movedim(-1, 1).float(), 8) * 4 - 2
        return torch.cat([small, torch.ones_like(small[:, :1])], 1)

    def encode_prompt(self, prompt: str) -> Context:
        g = torch.Generator().manual_seed(sum(prompt.encode()) + 1)
        return Context(torch.randn(77, DIM, generator=g) * 0.3)

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        self.passes += 1
        noisy, rows = noisy.to(self.w_out), context.for_batch(len(noisy)).to(self.w_out)
        try:
            for layer in LAYERS:
                size = (max(1, noisy.shape[2] // layer.stride), max(1, noisy.shape[3] // layer.stride))
                x = F.adaptive_avg_pool2d(noisy, size).flatten(2).transpose(1, 2)
                q, k = x @ self.w_q[layer.name], rows @ self.w_k[layer.name]
                if capture is not None and layer.name in capture.choice.read:
                    capture.record("cross", layer.name, Attention(q, k, HEADS, *size))
                if capture is not None and layer.name in capture.choice.propagate:
                    capture.record("self", layer.name, Attention(4 * q, q, HEADS, *size))
        except EndOfPass:
            return None
        attended = rows[:, : context.tokens]
        return (noisy * 0.5 + (attended.mean(1) @ self.w_out)[:, :, None, None]).float()

    def fitting_batch(self, size: tuple[int, int]) -> int:
        return 4

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        return _with_gradients()


@contextmanager
def _with_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield
