"""Training-free baselines on the same UNet, and other methods to refine maps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slime import Example
from slime.backbones.base import Backbone, ExtractionSpec, seeded_noise
from slime.backbones.layers import LayerChoice
from slime.backbones.text import TextConditioned, capture_attention
from slime.images import resize_image, resize_maps, soft_labels, working_size
from slime.parts.metrics import evaluate
from testing import scenes

from .sources import as_tensor, scene_task

NEIGHBOURS = 5


@dataclass(frozen=True)
class FeatureChoice:
    """Source of descriptors: self-attention layers of the decoder, and the timestep of the noise."""

    layers: tuple[str, ...]
    timestep: int


DIFT = 261  # the timestep of DIFT's semantic correspondences (Tang et al. 2023)
TIMESTEPS = (50, 100, DIFT)


def feature_choices(backbone: Backbone) -> list[FeatureChoice]:
    """Return all sources: all layers together (of a UNet those of the decoder) and each alone, at every timestep."""
    decoder = tuple(layer.name for layer in backbone.layers if layer.name.startswith("output."))
    names = decoder or tuple(layer.name for layer in backbone.layers)
    return [
        FeatureChoice(layers, timestep) for timestep in TIMESTEPS for layers in (names, *((name,) for name in names))
    ]


def descriptors(
    backbone: Backbone, images: Tensor, chosen: Sequence[FeatureChoice], seed: int
) -> dict[FeatureChoice, Tensor]:
    """Return descriptors of unit length as in DIFT, [B, D, h, w] by source.

    They are self-attention queries on the finest grid of their layers. DIFT takes the decoder's activations. The
    queries are a linear map of them, and both ComfyUI and diffusers give access to them. For a model without text
    conditioning the descriptors are its features.
    """
    size = working_size(images.shape[1], images.shape[2], backbone.info.side, backbone.info.multiple)
    latents = backbone.encode_images(resize_image(images, size).to(backbone.device))
    noise = seeded_noise(latents.shape, seed, latents.device)
    found = {}
    for timestep in sorted({choice.timestep for choice in chosen}):
        mine = [choice for choice in chosen if choice.timestep == timestep]
        seen = _looked(backbone, latents, timestep, noise, dict.fromkeys(name for one in mine for name in one.layers))
        for choice in mine:
            maps = [seen[name] for name in choice.layers]
            grid = max((one.shape[2], one.shape[3]) for one in maps)
            joined = torch.cat([F.normalize(resize_maps(one, grid), dim=1) for one in maps], 1)
            found[choice] = F.normalize(joined, dim=1)
    return found


def _looked(
    backbone: Backbone, latents: Tensor, timestep: int, noise: Tensor, names: Iterable[str]
) -> dict[str, Tensor]:
    """Return the queries of these layers, or their features for a model without text, [B, D, h, w] each."""
    chosen = tuple(names)
    if isinstance(backbone, TextConditioned):
        layers = LayerChoice((), chosen)
        seen = capture_attention(backbone, latents, timestep, noise, backbone.encode_prompt(""), layers).self_
        return {
            name: one.query.float().transpose(1, 2).unflatten(2, (one.height, one.width)) for name, one in seen.items()
        }
    spec = ExtractionSpec(LayerChoice(chosen, ()), backbone.condition(""), timestep, grouping="layer")
    return dict(backbone.extract(latents, spec, noise).groups)


def neighbours(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Return scores [N, K] of descriptors [N, D]: the mean label of their 5 nearest neighbours.

    The neighbours are from the bank [M, D] with labels [M, K].
    """
    return labels[(query @ bank.T).topk(NEIGHBOURS, dim=1).indices].mean(1)


def prototypes(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Return the similarity to the mean descriptor of every class and of the background, as in PerSAM and INSID3."""
    return query @ F.normalize(labels.T @ bank, dim=1).T


def density_ratio(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Return the log density of every class on the unit sphere with equal priors, as in FROST (arXiv 2606.31136).

    The concentration of the kernel comes from the bank itself: one over the median distance of a descriptor to its
    nearest neighbour. FROST's spatial gate, made for one class, is left out.
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


class Bank:
    """Descriptors of examples and their labels, for every source; one noise is used for all images."""

    @torch.inference_mode()
    def __init__(
        self, backbone: Backbone, examples: Sequence[Example], chosen: Sequence[FeatureChoice], seed: int = 0
    ) -> None:
        self.backbone, self.seed = backbone, seed
        classes = len(examples[0].names) + 1
        known: dict[FeatureChoice, list[tuple[Tensor, Tensor]]] = {choice: [] for choice in chosen}
        for example in examples:
            for choice, (maps,) in descriptors(backbone, example.image[None], chosen, seed).items():
                labels = soft_labels(example.labels, classes, (maps.shape[1], maps.shape[2])).to(maps.device)
                known[choice].append((maps.flatten(1).T, labels.flatten(1).T))
        self._known = {choice: tuple(map(torch.cat, zip(*pairs, strict=True))) for choice, pairs in known.items()}

    @torch.inference_mode()
    def find(
        self, images: Tensor, wanted: Sequence[tuple[str, FeatureChoice]]
    ) -> dict[tuple[str, FeatureChoice], list[np.ndarray]]:
        """Segment images [B, H, W, 3] by each rule with its source; return label maps."""
        found: dict[tuple[str, FeatureChoice], list[np.ndarray]] = {one: [] for one in wanted}
        for image in images:
            seen = descriptors(self.backbone, image[None], list(self._known), self.seed)
            for (rule, choice), mine in found.items():
                (maps,) = seen[choice]
                scores = RULES[rule](maps.flatten(1).T, *self._known[choice]).T.unflatten(1, tuple(maps.shape[1:]))
                mine.append(resize_maps(scores[None], (image.shape[0], image.shape[1]))[0].argmax(0).cpu().numpy())
        return found


def best_feature_choices(backbone: Backbone, style: str = scenes.WORLD, images: int = 6) -> dict[str, FeatureChoice]:
    """Choose for every rule the source with the highest part mIoU on validation scenes.

    This runs a baseline at its best layer, as its author would choose it. For a large model the source is all layers at
    DIFT's timestep.
    """
    everything = feature_choices(backbone)
    if not backbone.info.id.startswith("tiny"):
        return dict.fromkeys(RULES, next(choice for choice in everything if choice.timestep == DIFT))
    pairs = [(rule, choice) for rule in RULES for choice in everything]
    scores = dict.fromkeys(pairs, 0.0)
    for domain in scenes.DOMAINS:
        task = scene_task(domain, 1, 0, images, "validation", style=style)
        test = task.tests["plain"]
        found = Bank(backbone, task.examples, everything).find(as_tensor(test.images), pairs)
        for pair, maps in found.items():
            scores[pair] += evaluate(maps, test.truths, len(task.names) + 1).part_miou / len(scenes.DOMAINS)
    best = {rule: max(everything, key=lambda choice: scores[rule, choice]) for rule in RULES}
    for rule, choice in best.items():
        sys.stdout.write(
            f"{rule}: best of {len(everything)} choices of layers and timestep: {choice}, "
            f"{scores[rule, choice]:.3f} on validation\n"
        )
    return best


def bilateral(maps: Tensor, images: Tensor) -> Tensor:
    """Apply a joint bilateral filter over two cells to maps [B, K, h, w], guided by images [B, H, W, 3].

    Returns:
        Maps [B, K, H, W].
    """
    from kornia.filters import joint_bilateral_blur

    height, width = images.shape[1:3]
    kernel = 2 * round(2 * height / maps.shape[-2]) + 1
    smooth, guide = resize_maps(maps, (height, width)), images.movedim(-1, 1)
    return joint_bilateral_blur(smooth, guide, kernel, 0.1, (kernel / 4, kernel / 4))


def pamr(maps: Tensor, images: Tensor, iterations: int = 10, dilations: Sequence[int] = (1, 2, 4, 8)) -> Tensor:
    """Spread maps [B, K, h, w] along similar colours, up to [B, K, H, W].

    This is pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020).
    """
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
    """Return the eight neighbours at every dilation: [B, C, H, W] -> [B, C, 8 * len(dilations), H, W]."""
    height, width = x.shape[-2:]
    found = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        steps = [(i, j) for i in (0, d, 2 * d) for j in (0, d, 2 * d) if (i, j) != (d, d)]
        found += [padded[..., i : i + height, j : j + width] for i, j in steps]
    return torch.stack(found, 2)
