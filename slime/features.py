"""Features of an image: one UNet pass gives everything the read-out needs, for any set of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .attention import cross_scores, join_background, resize_maps, score_features, split_heads
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
        grouping: what has score features of its own: every "resolution" (layers of equal size are summed), every
            "layer", or every "head".
        keep_cross: keep the captured cross-attention layers instead of score features, for the official read-out.
    """

    layers: LayerChoice
    context: Context
    timestep: int
    grouping: str = "resolution"
    keep_cross: bool = False

    def to(self, device: torch.device) -> FeaturePlan:
        """The same with its context on a device."""
        return replace(self, context=self.context.to(device))


@dataclass(frozen=True)
class Features:
    """Attention features of a batch of images.

    Attributes:
        scores: one [B, D, h, w] for every group of the chosen cross-attention layers, coarse to fine;
            the score of embedding row e is the sum over these groups of (features . e), brought to one size.
        self_attention: captured self-attention layers.
        cross_attention: captured cross-attention layers, where the plan keeps them.
        grid: height and width of the part maps read from these features: the finest captured layer's.
        logits: instead of score features, scores [B, 1 + R, *grid] of the rows that were asked for, one for each set.
        propagated: with ``logits``, the WAS maps [B, K, *grid] of each set, where the pass itself could make them.
    """

    scores: tuple[Tensor, ...]
    self_attention: tuple[Attention, ...]
    grid: tuple[int, int]
    cross_attention: tuple[Attention, ...] = ()
    logits: tuple[Tensor, ...] = ()
    propagated: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        tensors = [*self.scores, *self.logits, *(attention.query for attention in self.cross_attention)]
        return tensors[0].device

    def to(self, device: torch.device | str) -> Features:
        """The same on another device."""

        def moved(attentions: tuple[Attention, ...]) -> tuple[Attention, ...]:
            return tuple(a._replace(query=a.query.to(device), key=a.key.to(device)) for a in attentions)

        scores = tuple(maps.to(device) for maps in self.scores)
        return Features(scores, moved(self.self_attention), self.grid, moved(self.cross_attention))


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

    ``projections`` saves :func:`key_projections` when many batches are run. Values are not checked here, which would
    make the host wait: see :func:`check_finite`.
    """
    if projections is None and not plan.keep_cross:
        projections = key_projections(denoiser, plan.layers, plan.context.pooled)
    capture = Capture(plan.layers, stop_early=True)
    noisy = add_noise(denoiser, latents, noise, plan.timestep)
    denoiser.predict_noise(noisy, plan.timestep, plan.context, capture, image_size)
    return collect_features(capture, projections or {}, plan)


def collect_features(capture: Capture, projections: Mapping[LayerKey, Tensor], plan: FeaturePlan) -> Features:
    """Turn a finished capture into features, summed within the plan's groups."""
    self_attention = tuple(capture.self_[key] for key in capture.choice.self_)
    cross_attention = tuple(capture.cross[key] for key in capture.choice.cross)
    grid = max((attention.height, attention.width) for attention in (*self_attention, *cross_attention))
    if plan.keep_cross:
        return Features((), self_attention, grid, cross_attention)
    layers = [
        attention._replace(key=projections[key][None])
        for key, attention in zip(capture.choice.cross, cross_attention, strict=True)
    ]
    groups: dict[tuple[int, ...], Tensor] = {}
    for group, share, attention in _in_groups(layers, plan.grouping):
        features = score_features(attention, attention.key[0]) * share
        groups[group] = groups[group] + features if group in groups else features
    return Features(tuple(groups[group] for group in sorted(groups)), self_attention, grid)


def _in_groups(layers: Sequence[Attention], grouping: str) -> Iterator[tuple[tuple[int, ...], float, Attention]]:
    """What is scored, with the name of its group (they sort coarse to fine) and its share in the score."""
    for index, layer in enumerate(layers):
        size, share = (layer.height, layer.width), 1 / len(layers)
        if grouping == "head":
            for head, one in enumerate(split_heads(layer)):
                yield (*size, index, head), share / layer.heads, one
        else:
            yield (*size, index if grouping == "layer" else 0), share, layer


@torch.no_grad()
def extract_scores(
    denoiser: Denoiser,
    latents: Tensor,
    plan: FeaturePlan,
    noise: Tensor,
    image_size: tuple[int, int],
    offsets: Sequence[Tensor],
    parts: Sequence[int],
) -> Features:
    """As :func:`extract_features`, for rows known beforehand: their scores in place of score features.

    The rows go through the pass behind the context's own (:attr:`slime.denoiser.Context.extra`), so that the layers
    make their keys themselves and no other pass is needed.

    Args:
        offsets: sets of rows, as offsets from the background row, [1 or G, R, D] each. A key projection has no bias,
            so the key of an offset scores the row against the background, whose score is 0.
        parts: of every set: so many of its rows are parts, the others stand for the background. Their maps are
            propagated in the pass itself where the layers' order and the denoiser allow it.
    """
    extra = torch.cat([rows.flatten(0, 1) for rows in offsets])
    context = replace(plan.context, extra=extra)
    scale = min(layer.scale for layer in denoiser.layers if layer.key in (*plan.layers.cross, *plan.layers.self_))
    grid = (-(-latents.shape[-2] // scale), -(-latents.shape[-1] // scale))

    def score(capture: Capture) -> list[Tensor]:
        layers = [capture.cross[key] for key in plan.layers.cross]
        return _score(layers, plan.grouping, offsets, plan.context.tokens, grid)

    logits: list[Tensor] = []

    def maps(capture: Capture) -> Tensor:
        logits.extend(score(capture))
        pairs = zip(logits, parts, strict=True)
        return torch.cat([F.softmax(join_background(one, count), 1) for one, count in pairs], 1)

    capture = Capture(plan.layers, stop_early=True, maps=maps)
    noisy = add_noise(denoiser, latents, noise, plan.timestep)
    denoiser.predict_noise(noisy, plan.timestep, context, capture, image_size)
    self_attention = tuple(capture.self_[key] for key in plan.layers.self_)
    logits = logits or score(capture)
    propagated: tuple[Tensor, ...] = ()
    if plan.layers.self_ and len(capture.propagated) == len(plan.layers.self_):
        was = torch.stack([resize_maps(one, grid) for one in capture.propagated.values()]).mean(0)
        propagated = was.split([count + 1 for count in parts], 1)
    return Features((), self_attention, grid, (), tuple(logits), propagated)


def _score(
    layers: Sequence[Attention], grouping: str, offsets: Sequence[Tensor], first: int, grid: tuple[int, int]
) -> list[Tensor]:
    """Logits of every set of rows, whose keys stand from ``first`` on in the layers."""
    looks = list(_in_groups(layers, grouping))
    order = {group: place for place, group in enumerate(sorted({look[0] for look in looks}))}
    logits = []
    for rows in offsets:
        sets, count = rows.shape[:2]
        starts = [first + count * min(order[group], sets - 1) for group, _, _ in looks]
        scores = [
            share * resize_maps(cross_scores(attention, count, start), grid)
            for (_, share, attention), start in zip(looks, starts, strict=True)
        ]
        logits.append(F.pad(torch.stack(scores).sum(0), (0, 0, 0, 0, 1, 0)))
        first += sets * count
    return logits


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Raises SlimeError where a UNet gave NaN or infinite values (half precision that overflows)."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise SlimeError("The UNet returned NaN or infinite values; start ComfyUI with --force-fp32 or --bf16-unet.")
