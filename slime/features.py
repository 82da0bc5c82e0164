"""Features of an image: one UNet pass gives everything the read-out needs, for any set of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import score_features
from .denoiser import Attention, Capture, Context, Denoiser, add_noise
from .errors import SlimeError
from .layers import LayerChoice, LayerKey

PROBE_LATENT = 8  # side of the smallest latent that three halvings accept


@dataclass(frozen=True)
class FeaturePlan:
    """What one UNet pass shall give.

    Attributes:
        layers: layers to read.
        context: text context the UNet runs on.
        timestep: noise level, 0..999.
        per_layer: keep score features of every layer apart, instead of summing layers of equal resolution.
        keep_cross: keep the captured cross-attention layers too, for the official read-out.
    """

    layers: LayerChoice
    context: Context
    timestep: int
    per_layer: bool = False
    keep_cross: bool = False


@dataclass(frozen=True)
class Features:
    """Attention features of a batch of images.

    Attributes:
        scores: one [B, D, h, w] for every resolution (or layer) of the chosen cross-attention layers, coarse to fine;
            the score of embedding row e is the sum over these groups of (features . e), brought to one size.
        self_attention: captured self-attention layers.
        cross_attention: captured cross-attention layers, where the plan keeps them.
        grid: height and width of the part maps read from these features: the finest captured layer's.
    """

    scores: tuple[Tensor, ...]
    self_attention: tuple[Attention, ...]
    grid: tuple[int, int]
    cross_attention: tuple[Attention, ...] = ()


@torch.no_grad()
def key_projections(denoiser: Denoiser, choice: LayerChoice, pooled: Tensor | None = None) -> dict[LayerKey, Tensor]:
    """W_K^T [D, heads*d] of every chosen cross-attention layer.

    A key projection has no bias, so the keys of the identity matrix are the projection itself. Going through the
    model's own layers includes LoRA, quantised and offloaded weights. Costs one pass over an 8x8 latent; ``pooled`` is
    SDXL's, of any prompt.
    """
    probe = Capture(LayerChoice(choice.cross, ()), stop_early=True)
    latent = torch.zeros(1, 4, PROBE_LATENT, PROBE_LATENT, device=denoiser.device)
    context = Context(torch.eye(denoiser.family.context_dim), pooled)
    denoiser.predict_noise(latent, 0, context, probe, (PROBE_LATENT * 8, PROBE_LATENT * 8))
    return {key: attention.key[0] for key, attention in probe.cross.items()}


@torch.no_grad()
def extract_features(
    denoiser: Denoiser,
    latents: Tensor,
    plan: FeaturePlan,
    noise: Tensor,
    image_size: tuple[int, int],
    projections: Mapping[LayerKey, Tensor] | None = None,
) -> Features:
    """Add ``noise`` to latents, both [B, C, h, w], run the UNet once and keep what the read-out needs.

    ``projections`` saves :func:`key_projections` when many batches are run.

    Raises:
        SlimeError: the UNet gave NaN or infinite values (half precision that overflows).
    """
    if projections is None:
        projections = key_projections(denoiser, plan.layers, plan.context.pooled)
    capture = Capture(plan.layers, stop_early=True)
    noisy = add_noise(denoiser, latents, noise, plan.timestep)
    denoiser.predict_noise(noisy, plan.timestep, plan.context, capture, image_size)
    features = collect_features(capture, projections, plan.per_layer)
    cross = tuple(capture.cross[key] for key in plan.layers.cross) if plan.keep_cross else ()
    return replace(features, cross_attention=cross)


def collect_features(capture: Capture, projections: Mapping[LayerKey, Tensor], per_layer: bool = False) -> Features:
    """Turn a finished capture into features; layers of equal resolution are summed unless ``per_layer``."""
    groups: dict[tuple[int, ...], Tensor] = {}
    count = len(capture.choice.cross)
    for index, key in enumerate(capture.choice.cross):
        attention = capture.cross[key]
        size = (attention.height, attention.width, index if per_layer else 0)
        features = score_features(attention, projections[key]) / count
        groups[size] = groups[size] + features if size in groups else features
    self_attention = tuple(capture.self_[key] for key in capture.choice.self_)
    sizes = [size[:2] for size in groups] + [(a.height, a.width) for a in self_attention]
    if not all(bool(torch.isfinite(features).all()) for features in groups.values()):
        raise SlimeError("The UNet returned NaN or infinite values; start ComfyUI with --force-fp32 or --bf16-unet.")
    height, width = max(sizes)
    return Features(tuple(groups[size] for size in sorted(groups)), self_attention, (height, width))
