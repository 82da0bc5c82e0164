"""Narrow autoencoder that is trained in TAESD's format.

It is trained narrow, and written into TAESD's 64 channels padded with zeros. The stock loader can load it, and training
is an order of magnitude cheaper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from demo.pack.shapes import CLIP_CONFIG, CONTEXT_DIM, DOWNSCALE, LATENT_CHANNELS, LATENT_SCALE, UNET_CONFIG

__all__ = ["CLIP_CONFIG", "CONTEXT_DIM", "DOWNSCALE", "LATENT_CHANNELS", "LATENT_SCALE", "UNET_CONFIG"]


class Block(nn.Module):
    """TAESD's residual block; ``identity`` leaves its convolutions out (they are written as zeros)."""

    def __init__(self, width: int, identity: bool = False) -> None:
        super().__init__()
        self.width, self.identity = width, identity
        if not identity:
            conv = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
            self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x if self.identity else self.conv(x) + x)


class PassThrough(nn.Module):
    """Stand-in for TAESD's first convolution that copies the three colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def narrow_encoder(widths: tuple[int, int, int] = (24, 48, 64)) -> nn.Sequential:
    """Return an encoder [B, 3, H, W] in [0, 1] -> [B, 4, H/8, W/8]; module indices are those of TAESD's encoder."""
    half, quarter, eighth = widths
    return nn.Sequential(
        PassThrough(),
        Block(3, identity=True),
        nn.Conv2d(3, half, 3, 2, 1, bias=False),
        Block(half),
        Block(half, True),
        Block(half, True),
        nn.Conv2d(half, quarter, 3, 2, 1, bias=False),
        Block(quarter),
        Block(quarter),
        Block(quarter, True),
        nn.Conv2d(quarter, eighth, 3, 2, 1, bias=False),
        Block(eighth),
        Block(eighth),
        Block(eighth),
        nn.Conv2d(eighth, LATENT_CHANNELS, 3, padding=1),
    )


def narrow_decoder(widths: tuple[int, int, int, int] = (64, 48, 32, 12)) -> nn.Sequential:
    """Return a decoder [B, 4, h, w] -> [B, 3, 8h, 8w] in about [0, 1]; module indices are those of TAESD's decoder."""
    eighth, quarter, half, full = widths
    return nn.Sequential(
        Clamp(),
        nn.Conv2d(LATENT_CHANNELS, eighth, 3, padding=1),
        nn.ReLU(),
        Block(eighth),
        Block(eighth),
        Block(eighth),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(eighth, quarter, 3, padding=1, bias=False),
        Block(quarter),
        Block(quarter),
        Block(quarter, True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(quarter, half, 3, padding=1, bias=False),
        Block(half),
        Block(half, True),
        Block(half, True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(half, full, 3, padding=1, bias=False),
        Block(full, True),
        nn.Conv2d(full, 3, 3, padding=1),
    )


def widen(narrow: nn.Sequential, width: int = 64) -> dict[str, Tensor]:
    """Return the state dict of the full-width TAESD half that computes what ``narrow`` computes (zero padding)."""
    state: dict[str, Tensor] = {}
    last = len(narrow) - 1

    def put(name: str, weight: Tensor, bias: Tensor | None, first: bool, final: bool) -> None:
        out_width = weight.shape[0] if final else width
        in_width = weight.shape[1] if first else width
        padded = torch.zeros(out_width, in_width, 3, 3)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        state[f"{name}.weight"] = padded
        if bias is not None:
            padded_bias = torch.zeros(out_width)
            padded_bias[: bias.shape[0]] = bias
            state[f"{name}.bias"] = padded_bias

    for index, module in enumerate(narrow):
        if isinstance(module, PassThrough):
            identity = torch.zeros(3, 3, 3, 3)
            identity[range(3), range(3), 1, 1] = 1.0
            put(str(index), identity, torch.zeros(3), first=True, final=False)
        elif isinstance(module, nn.Conv2d):
            first = module.in_channels == LATENT_CHANNELS
            put(
                str(index),
                module.weight.detach(),
                None if module.bias is None else module.bias.detach(),
                first,
                index == last,
            )
        elif isinstance(module, Block):
            for k in (0, 2, 4):
                shape = (module.width, module.width, 3, 3)
                conv: Any = None if module.identity else module.conv[k]
                weight = torch.zeros(shape) if conv is None else conv.weight.detach()
                bias = torch.zeros(module.width) if conv is None or conv.bias is None else conv.bias.detach()
                put(f"{index}.conv.{k}", weight, bias, False, False)
    return state
