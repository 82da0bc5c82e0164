"""Toy backbones, small enough to compute by hand, and toy images of two parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slime import Example, PartEmbeddings, SegmentSettings, segment
from slime.backbones.attention import Attention
from slime.backbones.base import Backbone, BackboneInfo, EndOfPass, ExtractionSpec, Features
from slime.backbones.layers import Layer, LayerChoice
from slime.backbones.sd_unet import Family, SDUNet
from slime.backbones.text import Capture, Context
from slime.parts.metrics import evaluate

DIM, HEADS, HEAD_DIM = 12, 2, 6
LAYERS = (Layer("output.3.0", 4), Layer("output.6.0", 2), Layer("output.9.0", 1))


class ToyUNet(SDUNet):
    """A UNet whose queries are linear in the (noisy) colours; it counts its passes and the images it encodes."""

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
        noisy, tokens = noisy.to(self.w_out), context.for_batch(len(noisy)).to(self.w_out)
        try:
            for layer in LAYERS:
                size = (max(1, noisy.shape[2] // layer.stride), max(1, noisy.shape[3] // layer.stride))
                x = F.adaptive_avg_pool2d(noisy, size).flatten(2).transpose(1, 2)
                q, k = x @ self.w_q[layer.name], tokens @ self.w_k[layer.name]
                if capture is not None and layer.name in capture.choice.read:
                    capture.record("cross", layer.name, Attention(q, k, HEADS, *size))
                if capture is not None and layer.name in capture.choice.propagate:
                    capture.record("self", layer.name, Attention(4 * q, q, HEADS, *size))
        except EndOfPass:
            return None
        attended = tokens[:, : len(context)]
        return (noisy * 0.5 + (attended.mean(1) @ self.w_out)[:, :, None, None]).float()

    def fitting_batch(self, size: tuple[int, int]) -> int:
        return 4

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        return _with_gradients()


@contextmanager
def _with_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


CELL = 4


class ColorAndPlace:
    """A backbone of colours and their squares ("color.0") and of positions ("place.0").

    Similar cells attend to each other.
    """

    info = BackboneInfo("color-and-place", 96, CELL, CELL, channels=3, views=4)
    device = torch.device("cpu")
    layers = (Layer("color.0", 1), Layer("place.0", 2))

    def default_layers(self) -> LayerChoice:
        return LayerChoice(("color.0", "place.0"), ("color.0",))

    def condition(self, prompt: str) -> dict[str, Tensor]:
        return {}

    def encode_images(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.movedim(-1, 1), CELL)

    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        groups, attention = {}, {}
        for layer in reversed(self.layers):
            cells = F.avg_pool2d(encoded, layer.stride)
            b, _, h, w = cells.shape
            y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
            place = torch.stack([x, y, x * y, x**2, y**2, torch.ones(h, w)]).expand(b, -1, -1, -1)
            maps = torch.cat([cells, cells**2], 1) if layer.name == "color.0" else place
            if layer.name in spec.layers.read:
                groups[layer.name] = maps
            query = 8 * maps.flatten(2).transpose(1, 2)
            attention[layer.name] = Attention(query, query, 1, h, w)
        chosen = tuple(attention[name] for name in spec.layers.propagate)
        return Features(groups, chosen, (encoded.shape[2], encoded.shape[3]))

    def fitting_batch(self, size: tuple[int, int]) -> int:
        return 2

    def cache_key(self) -> None:
        return None


COLORS = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.1, 0.2], [0.1, 0.8, 0.9]])


def toy_example(seed: int, height: int = 128, width: int = 128) -> Example:
    """Return a red and a blue square on dark grey, at random places."""
    rng = np.random.default_rng(seed)
    labels = torch.zeros(height, width, dtype=torch.int64)
    for part in (1, 2):
        y, x = int(rng.integers(0, height - 56)), (part - 1) * width // 2
        labels[y : y + 48, x + 8 : x + 56] = part
    return Example.from_label_map(COLORS[labels], labels, ["red", "blue"])


def toy_score(embeddings: PartEmbeddings, backbone: Backbone, **settings: Any) -> float:
    """Return the part mIoU on four other toy images."""
    tests = [toy_example(100 + i) for i in range(4)]
    images = torch.stack([t.image for t in tests])
    maps = segment(backbone, images, embeddings, SegmentSettings(**settings))[0]
    return evaluate(list(maps.label_map.numpy()), [t.labels.numpy() for t in tests], 3).part_miou


def all_vectors(embeddings: PartEmbeddings) -> Tensor:
    """Return all vectors of embeddings, flattened, in the order of their names, for comparisons."""
    return torch.cat([vector.flatten() for _, vector in sorted(embeddings.vectors.items())])
