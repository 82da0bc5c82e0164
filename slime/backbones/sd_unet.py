"""Stable Diffusion UNets, whatever host runs them: which layers are read, and how attention becomes features.

A score of the paper is linear in the text embedding row: the queries times the layer's key projection are a feature map
(:func:`.attention.score_features`). Rows are kept as offsets from the start token's, which stands for the background.

A layer is named by its place in the UNet as ComfyUI numbers it: ``output.3.0`` is the first transformer block of output
block 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..errors import SlimeError
from ..images import resize_maps
from ..settings import InstantSettings
from .attention import Attention, cross_scores, score_features
from .base import BackboneInfo, Observation, Plan, Scores
from .layers import Layer, LayerChoice, select_layers
from .text import Capture, Context, capture_attention

PROBE_LATENT = 8  # side of the smallest latent that three halvings accept
PAPER_CROSS = "output.3-5, output.6-7"
PAPER_SELF = "output.9-11"
PAPER_LAYERS = LayerChoice(
    tuple(f"output.{block}.0" for block in range(3, 8)), tuple(f"output.{block}.0" for block in range(9, 12))
)


@dataclass(frozen=True)
class Family:
    """A kind of UNet.

    Attributes:
        name: the backbone's id.
        context_dim: width of a text embedding row.
        side: pixels of the square whose area it works on.
        cross, self_: layer patterns; empty for the automatic rule.
        timestep: noise level of the features.
        instant: what the instant trainer does on it.
    """

    name: str
    context_dim: int
    side: int
    cross: str = ""
    self_: str = ""
    timestep: int = 100
    instant: InstantSettings = field(default_factory=InstantSettings)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Family:
        """From plain values, which a model that is not known here may bring along; ``instant`` is a dictionary."""
        return cls(**{**fields, "instant": InstantSettings(**fields.get("instant", {}))})


# The paper's layers (diffusers' up_blocks[1..2] and [3]); SDXL by resolution: its up_blocks[1] is the 64x64 level.
FAMILIES = (
    Family("sd1", 768, 512, PAPER_CROSS, PAPER_SELF),
    Family("sd2", 1024, 512, PAPER_CROSS, PAPER_SELF),
    Family("sd2-768", 1024, 768, PAPER_CROSS, PAPER_SELF),
    # Features of one SDXL view take 40 MB: fewer views than elsewhere.
    Family("sdxl", 2048, 1024, "output.0-5", "output.3-5", instant=InstantSettings(views=16)),
)


def family_for(context_dim: int, prediction: str) -> Family:
    """The known family with this width of text rows, or a nameless one that uses the automatic layer rule.

    SD2.x comes in two: eps at 512 pixels (base) and v at 768.
    """
    known = [family for family in FAMILIES if family.context_dim == context_dim]
    if not known:
        return Family(f"unet-{context_dim}", context_dim, 512)
    return known[-1 if prediction == "v" else 0]


class SDUNet:
    """What all hosts of Stable Diffusion share. A host adds ``encode_images``, ``encode_prompt``, ``predict_noise``,
    ``differentiable`` and ``fitting_batch``, see :class:`.base.Backbone` and :class:`.text.TextConditioned`.

    Args:
        family: of the UNet.
        prediction: "eps" or "v".
        layers: every transformer block in the order it runs.
        alphas_cumprod: [T].
        device: the UNet's.
        channels: of the latents.
        cell: pixels a latent's cell spans, a side.
    """

    def __init__(
        self,
        family: Family,
        prediction: str,
        layers: Sequence[Layer],
        alphas_cumprod: Tensor,
        device: torch.device,
        channels: int,
        cell: int,
    ) -> None:
        self.family, self.prediction, self.layers = family, prediction, tuple(layers)
        self.alphas_cumprod = alphas_cumprod.cpu().double()
        self.device, self.channels = device, channels
        self._projections: dict[str, Tensor] = {}
        if not self.layers:
            raise SlimeError("This UNet has no cross-attention layers; load an SD1.x, SD2.x or SDXL checkpoint.")
        # Every halving must come out even.
        multiple = cell * max(PROBE_LATENT, *(layer.stride for layer in self.layers))
        self.info = BackboneInfo(family.name, family.side, cell, multiple, channels, family.timestep, family.instant)

    @property
    def context_dim(self) -> int:
        return self.family.context_dim

    # What a host adds.

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_prompt(self, prompt: str) -> Context:
        raise NotImplementedError

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        raise NotImplementedError

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        raise NotImplementedError

    def fitting_batch(self, size: tuple[int, int]) -> int:
        raise NotImplementedError

    # What is shared.

    def default_layers(self) -> LayerChoice:
        """The family's table, else :func:`automatic_layers`."""
        cross, self_ = self.family.cross, self.family.self_
        if not (cross and self_):
            return automatic_layers(self.layers)
        return LayerChoice(select_layers(cross, self.layers), select_layers(self_, self.layers))

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """ "context" [T, D] in half precision, and SDXL's "pooled" [P]."""
        context = self.encode_prompt(prompt)
        if context.rows.shape[-1] != self.context_dim:
            raise SlimeError(
                f"The CLIP gives text rows {context.rows.shape[-1]} wide, but the model needs {self.context_dim}: "
                "connect the CLIP of the same checkpoint as the model."
            )
        pooled = {} if context.pooled is None else {"pooled": context.pooled}
        return {"context": context.rows.cpu().half()} | pooled

    def observe(self, encoded: Tensor, plan: Plan, noise: Tensor) -> Observation:
        context = Context.of(plan.condition)
        projections = self._key_projections(plan.layers, context.pooled)
        capture = capture_attention(self, encoded, plan.timestep, noise, context, plan.layers)
        looked = [capture.cross[name]._replace(key=projections[name][None]) for name in plan.layers.read]
        groups: dict[tuple[int, ...], Tensor] = {}
        for group, share, attention in _in_groups(looked, plan.grouping):
            features = score_features(attention, attention.key[0]) * share
            groups[group] = groups[group] + features if group in groups else features
        self_attention = tuple(capture.self_[name] for name in plan.layers.propagate)
        grid = max((a.height, a.width) for a in (*self_attention, *looked))
        return Observation(tuple(groups[group] for group in sorted(groups)), self_attention, grid)

    def score(self, encoded: Tensor, plan: Plan, noise: Tensor, rows: Sequence[Tensor], parts: Sequence[int]) -> Scores:
        """Scores of sets of rows [1 or G, P, D], which ride through the pass behind the context's own.

        The layers make their keys themselves, so that no other pass is needed. A key projection has no bias, so the key
        of an offset scores the row against the background.
        """
        extra = torch.cat([one.flatten(0, 1) for one in rows])
        context = replace(Context.of(plan.condition), extra=extra)
        chosen = {*plan.layers.read, *plan.layers.propagate}
        stride = min(layer.stride for layer in self.layers if layer.name in chosen)
        grid = (-(-encoded.shape[-2] // stride), -(-encoded.shape[-1] // stride))
        logits: list[Tensor] = []

        def maps(capture: Capture) -> Tensor:
            layers = [capture.cross[name] for name in plan.layers.read]
            logits.extend(_score(layers, plan.grouping, rows, context.tokens, grid))
            return torch.cat([F.softmax(one, 1) for one in logits], 1)

        capture = capture_attention(self, encoded, plan.timestep, noise, context, plan.layers, maps)
        if not logits:
            maps(capture)
        propagated: tuple[Tensor, ...] = ()
        if plan.layers.propagate and len(capture.propagated) == len(plan.layers.propagate):
            was = torch.stack([resize_maps(one, grid) for one in capture.propagated.values()]).mean(0)
            propagated = was.split([count + 1 for count in parts], 1)
        return Scores(tuple(logits), tuple(capture.self_[name] for name in plan.layers.propagate), propagated)

    @torch.no_grad()
    def _key_projections(self, choice: LayerChoice, pooled: Tensor | None) -> dict[str, Tensor]:
        """W_K^T [D, heads*d] of every chosen cross-attention layer.

        A key projection has no bias, so the keys of the identity matrix are the projection itself. Going through the
        model's own layers includes LoRA, quantised and offloaded weights. Costs one pass over a tiny latent, once for a
        backbone, whose weights do not change; ``pooled`` is SDXL's, of any prompt.
        """
        if not set(choice.read) <= self._projections.keys():
            probe = Capture(LayerChoice(choice.read, ()), stop_early=True)
            latent = torch.zeros(1, self.channels, PROBE_LATENT, PROBE_LATENT, device=self.device)
            self.predict_noise(latent, 0, Context(torch.eye(self.context_dim), pooled), probe)
            self._projections.update({name: attention.key[0] for name, attention in probe.cross.items()})
        return self._projections


def automatic_layers(layers: Sequence[Layer]) -> LayerChoice:
    """The paper's choice put as a rule of resolution, for a UNet that has no table.

    Cross-attention of the decoder at a half and a quarter of the latent's side, self-attention of the decoder at its
    finest side.
    """
    decoder = [layer for layer in layers if layer.name.startswith("output.")] or list(layers)
    finest = min(layer.stride for layer in decoder)
    cross = tuple(layer.name for layer in decoder if layer.stride in (2, 4)) or tuple(layer.name for layer in decoder)
    return LayerChoice(cross, tuple(layer.name for layer in decoder if layer.stride == finest))


def _in_groups(layers: Sequence[Attention], grouping: str) -> Iterator[tuple[tuple[int, ...], float, Attention]]:
    """What is scored, with the name of its group (they sort coarse to fine) and its share in the score."""
    for index, layer in enumerate(layers):
        yield (layer.height, layer.width, index if grouping == "layer" else 0), 1 / len(layers), layer


def _score(
    layers: Sequence[Attention], grouping: str, rows: Sequence[Tensor], first: int, grid: tuple[int, int]
) -> list[Tensor]:
    """Logits of every set of rows, whose keys stand from ``first`` on in the layers."""
    looks = list(_in_groups(layers, grouping))
    order = {group: place for place, group in enumerate(sorted({look[0] for look in looks}))}
    logits = []
    for one in rows:
        sets, count = one.shape[:2]
        starts = [first + count * min(order[group], sets - 1) for group, _, _ in looks]
        scores = [
            share * resize_maps(cross_scores(attention, count, start), grid)
            for (_, share, attention), start in zip(looks, starts, strict=True)
        ]
        logits.append(F.pad(torch.stack(scores).sum(0), (0, 0, 0, 0, 1, 0)))
        first += sets * count
    return logits
