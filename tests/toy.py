"""A denoiser small enough to work out by hand: queries are linear in the (noisy) colours."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812

from slime.denoiser import Attention, Capture, CaptureComplete, Context
from slime.layers import AttentionLayer, Family, LayerKey

DIM, HEADS, HEAD_DIM = 12, 2, 6
LAYERS = (
    AttentionLayer(LayerKey("output", 3, 0), 4),
    AttentionLayer(LayerKey("output", 6, 0), 2),
    AttentionLayer(LayerKey("output", 9, 0), 1),
)


class ToyDenoiser:
    def __init__(self, name: str = "toy") -> None:
        g = torch.Generator().manual_seed(3)
        self.family = Family(name, DIM, 128)
        self.prediction = "eps"
        self.device = torch.device("cpu")
        self.layers = LAYERS
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.w_q = {layer.key: torch.randn(4, HEADS * HEAD_DIM, generator=g) for layer in LAYERS}
        self.w_k = {layer.key: torch.randn(DIM, HEADS * HEAD_DIM, generator=g) for layer in LAYERS}
        self.w_out = torch.randn(DIM, 4, generator=g) * 0.05
        self.passes = 0
        self.encoded = 0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += len(images)
        small = F.avg_pool2d(images.movedim(-1, 1).float(), 8) * 4 - 2
        return torch.cat([small, torch.ones_like(small[:, :1])], 1)

    def encode_prompt(self, prompt: str) -> Context:
        g = torch.Generator().manual_seed(sum(prompt.encode()) + 1)
        return Context(torch.randn(77, DIM, generator=g) * 0.3)

    def predict_noise(self, noisy, timestep, context, capture: Capture | None, image_size):
        self.passes += 1
        rows = context.for_batch(len(noisy))
        try:
            for layer in LAYERS:
                size = (max(1, noisy.shape[2] // layer.scale), max(1, noisy.shape[3] // layer.scale))
                x = F.adaptive_avg_pool2d(noisy, size).flatten(2).transpose(1, 2)
                q, k = x @ self.w_q[layer.key], rows @ self.w_k[layer.key]
                if capture is not None and layer.key in capture.choice.cross:
                    capture.record("cross", layer.key, Attention(q, k, HEADS, *size))
                if capture is not None and layer.key in capture.choice.self_:
                    capture.record("self", layer.key, Attention(4 * q, q, HEADS, *size))
        except CaptureComplete:
            return None
        attended = rows[:, : context.tokens]
        return noisy * 0.5 + (attended.mean(1) @ self.w_out)[:, :, None, None]

    def fitting_batch(self, latent_size: tuple[int, int]) -> int:
        return 4

    @contextmanager
    def differentiable(self, checkpointing: bool):
        with torch.inference_mode(False), torch.enable_grad():
            yield
