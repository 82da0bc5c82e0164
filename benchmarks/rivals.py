"""Training-free rivals that use the same UNet, and other ways to refine maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slime import Example
from slime.backbones.base import seeded_noise
from slime.backbones.layers import LayerChoice
from slime.backbones.text import TextConditioned, capture_attention
from slime.images import resize_image, resize_maps, soft_labels, working_size

NEIGHBOURS = 5


def descriptors(backbone: TextConditioned, images: Tensor, timestep: int, seed: int) -> Tensor:
    """DIFT-style descriptors of unit length, [B, D, h, w]: self-attention queries of the decoder on its finest grid.

    DIFT takes the decoder's activations; the queries are a linear map of them, and both hosts give them.
    """
    layers = LayerChoice((), tuple(layer.name for layer in backbone.layers if layer.name.startswith("output.")))
    size = working_size(images.shape[1], images.shape[2], backbone.info.side, backbone.info.multiple)
    latents = backbone.encode_images(resize_image(images, size).to(backbone.device))
    noise = seeded_noise(latents.shape, seed, latents.device)
    seen = capture_attention(backbone, latents, timestep, noise, backbone.encode_prompt(""), layers).self_.values()
    grid = max((attention.height, attention.width) for attention in seen)
    maps = []
    for attention in seen:
        query = attention.query.float().transpose(1, 2).unflatten(2, (attention.height, attention.width))
        maps.append(F.normalize(resize_maps(query, grid), dim=1))
    return F.normalize(torch.cat(maps, 1), dim=1)


def neighbours(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Scores [N, K] of descriptors [N, D]: the mean label of the 5 nearest of the bank [M, D] with labels [M, K]."""
    return labels[(query @ bank.T).topk(NEIGHBOURS, dim=1).indices].mean(1)


def prototypes(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Likeness to the mean descriptor of every class, as in PerSAM and INSID3, the background's included."""
    return query @ F.normalize(labels.T @ bank, dim=1).T


def density_ratio(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Log density of every class on the unit sphere, equal priors, as in FROST (arXiv 2606.31136).

    The kernel's concentration comes from the bank itself: one over the median distance of a descriptor to its nearest
    neighbour. FROST's spatial gate, made for one class, is left out.
    """
    likeness = bank @ bank.T
    likeness.fill_diagonal_(-1)
    concentration = 1 / (1 - likeness.amax(1)).median().clamp(min=1e-3)
    logits = concentration * (query @ bank.T)
    return torch.stack([(logits + one.log()).logsumexp(1) - one.sum().log() for one in labels.T], 1)


RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "feature neighbours": neighbours,
    "prototypes": prototypes,
    "density ratio": density_ratio,
}


@torch.inference_mode()
def by_descriptors(
    rules: Sequence[str],
    backbone: TextConditioned,
    examples: Sequence[Example],
    images: Tensor,
    timestep: int = 100,
    seed: int = 0,
) -> dict[str, list[np.ndarray]]:
    """Label maps of images [B, H, W, 3] by comparing their descriptors with those of the examples, by each rule."""
    classes = len(examples[0].names) + 1
    known, labels = [], []
    for example in examples:
        maps = descriptors(backbone, example.image[None], timestep, seed)[0]
        known.append(maps.flatten(1).T)
        labels.append(soft_labels(example.labels, classes, (maps.shape[1], maps.shape[2])).flatten(1).T)
    bank = torch.cat(known)
    shown = torch.cat(labels).to(bank.device)
    found: dict[str, list[np.ndarray]] = {rule: [] for rule in rules}
    for image in images:
        maps = descriptors(backbone, image[None], timestep, seed)[0]
        for rule, mine in found.items():
            scores = RULES[rule](maps.flatten(1).T, bank, shown).T.unflatten(1, (maps.shape[1], maps.shape[2]))
            mine.append(resize_maps(scores[None], (image.shape[0], image.shape[1]))[0].argmax(0).cpu().numpy())
    return found


def bilateral(maps: Tensor, images: Tensor) -> Tensor:
    """Joint bilateral filter of maps [B, K, h, w] with images [B, H, W, 3], over two cells: [B, K, H, W]."""
    from kornia.filters import joint_bilateral_blur

    height, width = images.shape[1:3]
    kernel = 2 * round(2 * height / maps.shape[-2]) + 1
    smooth, guide = resize_maps(maps, (height, width)), images.movedim(-1, 1)
    return joint_bilateral_blur(smooth, guide, kernel, 0.1, (kernel / 4, kernel / 4))


def pamr(maps: Tensor, images: Tensor, iterations: int = 10, dilations: Sequence[int] = (1, 2, 4, 8)) -> Tensor:
    """Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020): maps [B, K, h, w] spread along like colours."""
    height, width = images.shape[1:3]
    guide = images.movedim(-1, 1)
    near = _neighbours(guide, dilations)  # [B, 3, n, H, W]
    deviation = near.std(2, keepdim=True).clamp(min=1e-4)
    weights = (-((near - guide[:, :, None]).abs() / (0.1 * deviation))).mean(1, keepdim=True).softmax(2)
    result = resize_maps(maps, (height, width))
    for _ in range(iterations):
        result = (_neighbours(result, dilations) * weights).sum(2)
    return result


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """The eight neighbours at every dilation: [B, C, H, W] -> [B, C, 8 * len(dilations), H, W]."""
    height, width = x.shape[-2:]
    found = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        steps = [(i, j) for i in (0, d, 2 * d) for j in (0, d, 2 * d) if (i, j) != (d, d)]
        found += [padded[..., i : i + height, j : j + width] for i, j in steps]
    return torch.stack(found, 2)
