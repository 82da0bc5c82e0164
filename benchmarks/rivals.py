"""Training-free rivals that use the same UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slime.attention import resize_maps
from slime.augment import resize_image, soft_labels, working_size
from slime.denoiser import Capture, CaptureComplete, add_noise, seeded_noise
from slime.examples import Example
from slime.layers import LayerChoice

NEIGHBOURS = 5


def descriptors(denoiser: Any, images: Tensor, timestep: int, seed: int) -> Tensor:
    """DIFT-style descriptors of unit length, [B, D, h, w]: self-attention queries of the decoder on its finest grid.

    DIFT takes the decoder's activations; the queries are a linear map of them, and both hosts give them.
    """
    layers = LayerChoice((), tuple(layer.key for layer in denoiser.layers if layer.key.place == "output"))
    size = working_size(images.shape[1], images.shape[2], denoiser.family.working_side)
    latents = denoiser.encode_images(resize_image(images, size).to(denoiser.device))
    noise = seeded_noise(latents.shape, seed, latents.device)
    capture = Capture(layers, stop_early=True)
    try:
        noisy = add_noise(denoiser, latents, noise, timestep)
        denoiser.predict_noise(noisy, timestep, denoiser.encode_prompt(""), capture, size)
    except CaptureComplete:
        pass
    grid = max((a.height, a.width) for a in capture.self_.values())
    maps = []
    for key in layers.self_:
        attention = capture.self_[key]
        query = attention.query.float().transpose(1, 2).unflatten(2, (attention.height, attention.width))
        maps.append(F.normalize(resize_maps(query, grid), dim=1))
    return F.normalize(torch.cat(maps, 1), dim=1)


@torch.inference_mode()
def feature_neighbours(
    denoiser: Any, examples: Sequence[Example], images: Tensor, timestep: int = 100, seed: int = 0
) -> list[np.ndarray]:
    """Label maps of images [B, H, W, 3] by the 5 nearest example positions in descriptor space."""
    classes = len(examples[0].names) + 1
    known, labels = [], []
    for example in examples:
        maps = descriptors(denoiser, example.image[None], timestep, seed)[0]
        known.append(maps.flatten(1).T)
        labels.append(soft_labels(example.labels, classes, (maps.shape[1], maps.shape[2])).flatten(1).T)
    bank, votes = torch.cat(known), torch.cat(labels)
    found = []
    for image in images:
        maps = descriptors(denoiser, image[None], timestep, seed)[0]
        nearest = (maps.flatten(1).T @ bank.T).topk(NEIGHBOURS, dim=1).indices
        probability = votes[nearest].mean(1).T.unflatten(1, (maps.shape[1], maps.shape[2]))
        found.append(resize_maps(probability[None], (image.shape[0], image.shape[1]))[0].argmax(0).numpy())
    return found
