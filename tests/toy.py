"""The toy UNet under the name that the tests know."""

from __future__ import annotations

from testing.toy_unet import DIM, HEAD_DIM, HEADS, LAYERS, ToyUNet

__all__ = ["DIM", "HEADS", "HEAD_DIM", "LAYERS", "ToyUNet"]
