"""The official training procedure, step by step, on our UNet: the reference of the speed benchmark.

Source: src/slime.py and src/stable_difusion.py of the official repository. A training step does here what it does
there, in the UNet's precision: VAE encoding, the unconditional and the conditional half as one batch, dense attention
everywhere, maps of the hooked layers, and a full inference for the training IoU, on one crop or on 2 x 2 crops. The
validation after every epoch is left out. The scores of the hooked layers are computed a second time for their maps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slime.backbones.attention import Attention
from slime.backbones.layers import LayerChoice, select_layers
from slime.backbones.sd_unet import PAPER_CROSS, PAPER_SELF
from slime.backbones.text import Capture, Context, TextConditioned, add_noise
from slime.extraction import crop_boxes
from slime.paper.losses import class_weights

TEST_TIMESTEP, TRAIN_TIMESTEPS = 100, (5, 100)
CROP = 400 / 512  # side of a crop, relative to the image's


@contextmanager
def dense_attention(backbone: TextConditioned) -> Iterator[None]:
    """Let ComfyUI's UNet form its attention matrices, as the official processors do."""
    module: Any = sys.modules[type(backbone).__module__]
    fused = getattr(module, "attend", None)
    if fused is None:  # an adapter with its own attention
        yield
        return
    from comfy.ldm.modules.attention import attention_basic

    module.attend = attention_basic
    try:
        yield
    finally:
        module.attend = fused


class Step(NamedTuple):
    """Loss terms of one step, and the segmentation of its inference."""

    losses: dict[str, Tensor]
    labels: Tensor


class Reference:
    """Official training of token embeddings for one image, with ``crops`` x ``crops`` crops at inference."""

    def __init__(self, backbone: TextConditioned, parts: int, crops: int = 1) -> None:
        self.backbone, self.parts, self.crops = backbone, parts, crops
        self.side = backbone.info.side
        self.output = self.side // backbone.info.cell  # side of the maps, the finest self-attention's: 64 at 512 pixels
        self.layers = LayerChoice(
            select_layers(PAPER_CROSS, backbone.layers), select_layers(PAPER_SELF, backbone.layers)
        )
        context = backbone.encode_prompt(" ".join(["part"] * (parts + 1)))
        self.pooled = context.pooled
        self.base = context.tokens.to(backbone.device).clone()
        self.empty = backbone.encode_prompt("").tokens.to(backbone.device).clone()
        self.rows = self.base[1 : parts + 1].clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.rows], lr=0.1)
        self.generator = torch.Generator().manual_seed(0)

    def context(self) -> Context:
        """Return the unconditional and the conditional token embeddings as one batch."""
        learned = torch.cat([self.base[:1], self.rows, self.base[self.parts + 1 :]])
        return Context(torch.stack([self.empty, learned]), self.pooled)

    def step(self, image: Tensor, labels: Tensor) -> Step:
        """Run one training step on an image [1, H, W, 3] with a label map [h, w] of the official maps' size."""
        low, high = TRAIN_TIMESTEPS
        timestep = int(torch.randint(low, high + 1, [1], generator=self.generator))
        labels = labels.to(self.backbone.device)
        prediction, noise, cross, self_ = self._pass(image, timestep, probabilities=False)
        one_hot = F.one_hot(labels, self.parts + 1).movedim(-1, 0)[None].float()
        weights = class_weights(one_hot)
        maps = cross.softmax(0)
        was = (self_[None] * maps.flatten(1)[..., None, None]).sum(1)
        losses = {
            "ce": F.cross_entropy(cross[None], labels[None], weight=weights),
            "was": (self.parts + 1) * F.mse_loss(was, one_hot[0]),
            "sd": 0.005 * F.mse_loss(prediction, noise),
        }
        found = self.infer(image)
        for part in labels.unique():  # the logged IoU of every class
            inter, union = ((found == part) & (labels == part)).sum(), ((found == part) | (labels == part)).sum()
            float(inter / union)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return Step({name: value.detach() for name, value in losses.items()}, found)

    @torch.no_grad()
    def infer(self, image: Tensor) -> Tensor:
        """Return the label map [side / 8, side / 8] of the official decoder."""
        height, width = image.shape[1:3]
        output = self.output
        total = torch.zeros(self.parts + 1, output, output, device=self.backbone.device)
        seen = torch.full_like(total, 1e-7)
        overlap = 2 - 1 / CROP
        for top, left, h, w in crop_boxes(height, width, self.crops, overlap):
            _, _, cross, self_ = self._pass(image[:, top : top + h, left : left + w], TEST_TIMESTEP, probabilities=True)
            flat = cross.flatten(1)
            high, low = flat.max(1).values, flat.min(1).values
            passed = torch.where(high >= 0.2)[0]
            y0, y1 = round(top * output / height), round((top + h) * output / height)
            x0, x1 = round(left * output / width), round((left + w) * output / width)
            kept = flat[passed]
            if len(kept):
                kept[0] = torch.where(kept[0] > kept[0].mean(), kept[0], 0)
            for index, part in enumerate(passed):
                was = (kept[index][:, None, None] * self_).sum(0)
                was = F.interpolate(was[None, None], (y1 - y0, x1 - x0), mode="bilinear")[0, 0]
                stretch = (was.max() - was.min()) / (high[part] - low[part])
                total[part, y0:y1, x0:x1] += (was - was.min()) / stretch + low[part]
                seen[part, y0:y1, x0:x1] += 1
        return (total / seen).argmax(0)

    def _pass(self, image: Tensor, timestep: int, probabilities: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the guided prediction, the noise, class maps [K, h, w] and dense self-attention [N, h, w]."""
        backbone = self.backbone
        pixels = F.interpolate(image.movedim(-1, 1), size=self.side, mode="bilinear").movedim(1, -1)
        with torch.inference_mode():
            encoded = backbone.encode_images(pixels)
        latents = encoded.clone()
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        noisy = add_noise(backbone, latents, noise, timestep)
        capture = Capture(self.layers)
        with dense_attention(backbone):
            both = backbone.predict_noise(noisy.repeat(2, 1, 1, 1), timestep, self.context(), capture)
        if both is None:
            raise RuntimeError("a pass that nothing ends early gave no prediction")
        # The official hooks make dense maps of both halves for cross-attention, and of one half for self-attention.
        cross = [_dense_cross(a, self.parts + 1, probabilities, self.output) for a in capture.cross.values()]
        dense = torch.stack([_dense_self(a, self.output) for a in capture.self_.values()]).mean(0)
        unconditional, conditional = both.chunk(2)
        guided = unconditional + 100 * (conditional - unconditional)
        return guided, noise, torch.stack(cross).mean(0)[1], dense


def _dense_cross(attention: Attention, classes: int, probabilities: bool, side: int) -> Tensor:
    """Return maps [2, K, side, side]: scores, or probabilities over all tokens, averaged over heads."""
    query, key = (t.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in attention[:2])
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    maps = (scores.softmax(-1) if probabilities else scores)[..., :classes]
    maps = maps.movedim(-1, 2).unflatten(3, (attention.height, attention.width)).flatten(0, 1)
    resized = F.interpolate(maps, size=side, mode="bilinear")
    return resized.unflatten(0, (2, attention.heads)).mean(1)


def _dense_self(attention: Attention, side: int) -> Tensor:
    """Return attention maps [N, side, side] of the conditional half, averaged over heads.

    Each map holds how much every position attends to one of the N keys.
    """
    query, key = (t[1].float().unflatten(-1, (attention.heads, -1)).transpose(0, 1) for t in attention[:2])
    matrix = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
    maps = matrix.movedim(-1, 1).unflatten(2, (attention.height, attention.width))
    return F.interpolate(maps, size=side, mode="bilinear").mean(0)
