"""What a place of a scene is: losses on queries and keys of the decoder, for :mod:`tools.train_on`, without masks."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from testing.tiny import model as tiny_model
from tools.train_tiny import TextToImage, attention

CLUSTERS, POINTS = 128, 512  # of the decoder's queries, and points of a pair that are compared
ASKED = 24  # clusters whose rows compete with the start token at a time
SEEDS = 64  # points of an image from which clusters begin
FED = 8  # rows of clusters that stand in a context
ROW_SPREAD = 0.8  # deviation of the text encoder's rows
REDUNDANCY, SPREAD = 0.02, 0.02  # of what queries of a place say twice, and of variances that differ
HEAD_WIDTH = 32  # of the UNet's attention
HIDDEN = -1e4  # score of rows that nobody attends to


class Watch:
    """The decoder's queries, and what cross-attention, computed openly, does not give to start token and words.

    Attributes:
        ends: bool [B, L], rows that end and pad a text.
        hidden: bool [B, L], rows that are not there.
        fed: bool [B], images whose context has rows of clusters.
    """

    def __init__(self) -> None:
        self.ends: Tensor | None = None
        self.hidden: Tensor | None = None
        self.fed: Tensor | None = None
        self.shares: list[Tensor] = []  # by layer: not to the start token, to rows that end and pad
        self.queries: dict[str, Tensor] = {}  # [B, h * w, D]

    def options(self) -> dict[str, Any]:
        decoder = [("output", n) for n in range(3, 12)]
        places = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0), *decoder]
        self.shares, self.queries = [], {}
        return {
            "patches_replace": {
                "attn2": {place: functools.partial(self._cross, place) for place in places},
                "attn1": {place: functools.partial(self._self, place) for place in decoder},
            },
        }

    def _cross(
        self, place: tuple[str, int], query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]
    ) -> Tensor:
        if place[0] == "output":
            self.queries[f"cross{place[1]}"] = query
        heads = extra["n_heads"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden[:, None, None], HIDDEN)
        shares = scores.softmax(-1)
        rows = shares.float().mean((1, 2))  # [B, L]
        if self.fed is not None:
            # Where rows of clusters attend is another loss's business; this one makes what they add harmless.
            shares = torch.where(self.fed[:, None, None, None], shares.detach(), shares)
            rows = rows * ~self.fed[:, None] * (len(rows) / (~self.fed).sum().clamp(min=1))
        ended = rows.new_zeros(()) if self.ends is None else (rows * self.ends).sum(1).mean()
        self.shares.append(torch.stack([rows[:, 1:].sum(1).mean(), ended]))
        return (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def _self(self, place: tuple[str, int], query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        self.queries[f"self{place[1]}"] = query
        return attention(query, key, value, extra["n_heads"])


class Places(nn.Module):
    """Swapped prediction (SwAV, Caron et al. 2020) of clusters of single places, from every layer's queries.

    A place's cluster is found from all layers together, clusters being kept of like size, and must be told at the same
    place of the pair's other image: by each layer's queries, and by each layer's cross-attention to a row of text a
    cluster, beside the start token, which is to take what none of the rows at hand stands for. Words of billions of
    captions do that in Stable Diffusion; the few dozen words of ours do not.
    """

    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        widths = decoder_widths(model)
        self.centres = nn.ParameterDict({name: 0.1 * torch.randn(CLUSTERS, width) for name, width in widths.items()})
        self.handicap: Tensor
        self.register_buffer("handicap", torch.zeros(CLUSTERS))
        for name, width in widths.items():
            self.register_buffer(f"mean_{name}", torch.zeros(width))
        self.words = nn.Parameter(torch.randn(CLUSTERS, tiny_model.CONTEXT_DIM))
        self._to_key = {
            f"cross{n}": model.unet.output_blocks[n][1].transformer_blocks[0].attn2.to_k for n in range(3, 12)
        }

    def rows(self) -> Tensor:
        """A row of text a cluster, [CLUSTERS, D], of the text encoder's usual length."""
        return ROW_SPREAD * nn.functional.layer_norm(self.words, self.words.shape[1:])

    @torch.no_grad()
    def seed(self, looks: list[dict[str, Tensor]]) -> None:
        """Centres by k-means of the queries of some batches: where they begin at random they stay empty for long."""
        self.handicap.zero_()
        found: dict[str, Tensor] = {}
        for name, centres in self.centres.items():
            all_queries = torch.cat([look[name].float() for look in looks])  # [B, h * w, D]
            side = math.isqrt(all_queries.shape[1])
            spots = torch.rand(len(all_queries), SEEDS, 2, generator=torch.Generator().manual_seed(0)).to(centres)
            points = sample(all_queries.transpose(1, 2).unflatten(2, (side, side)), spots).flatten(0, 1)
            self._mean(name).copy_(points.mean(0))
            found[name] = nn.functional.normalize(points - points.mean(0), dim=1)
        joint = torch.cat(list(found.values()), 1)
        centres = joint[torch.randperm(len(joint), generator=torch.Generator().manual_seed(0))[:CLUSTERS]]
        for _ in range(15):
            nearest = (joint @ nn.functional.normalize(centres, dim=1).T).argmax(1)
            picked = nn.functional.one_hot(nearest, CLUSTERS).to(joint)
            counts = picked.sum(0)[:, None]
            centres = torch.where(counts > 0, picked.T @ joint / counts.clamp(min=1), centres)
        for name, part in zip(found, centres.split([one.shape[1] for one in found.values()], 1), strict=True):
            self.centres[name].copy_(part)

    def _targets(self, likeness: Tensor) -> Tensor:
        """Soft clusters [N, K] of likeness [N, K]; what clusters took too much of in other batches costs them."""
        targets = (likeness / 0.05 - self.handicap).softmax(1)
        self.handicap.add_(0.02 * (CLUSTERS * targets.mean(0) - 1).clamp(max=5))
        return targets

    def _mean(self, name: str) -> Tensor:
        mean: Tensor = getattr(self, f"mean_{name}")
        return mean

    @torch.no_grad()
    def feed(self, contexts: Tensor) -> Tensor:
        """Contexts [B, L, D] with rows of :data:`FED` clusters after the start, more or less disturbed and enlarged."""
        count, device = len(contexts), contexts.device
        rows = self.rows()[torch.randint(CLUSTERS, (count, FED), device=device)]
        size = torch.empty(count, 1, 1, device=device).uniform_(0.7, 5)
        noise = torch.empty(count, 1, 1, device=device).uniform_(0, 0.6) * torch.randn_like(rows)
        return torch.cat([contexts[:, :1], size * (rows + noise), contexts[:, 1 + FED :]], 1)

    def forward(self, queries: dict[str, Tensor], boxes: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of queries [2 P, h * w, D] of P pairs whose second images are the boxes [P, 4] of the first.

        The loss of the queries; that of the rows, where the start token's row is ``start`` [D]; and that of
        :func:`spread_alike`, all of them means over layers.
        """
        spots = torch.rand(len(boxes), POINTS, 2, device=boxes.device)  # of the second image
        within = torch.where(boxes[:, None, 3:] > 0, torch.stack([1 - spots[..., 0], spots[..., 1]], -1), spots)
        first = boxes[:, None, :2] + within * boxes[:, None, 2:3]
        asked = torch.rand(CLUSTERS, device=boxes.device).topk(ASKED).indices
        rows = torch.cat([start[None], self.rows()[asked]])
        likeness, scores, unlike = {}, {}, []
        for name, query in queries.items():
            side = math.isqrt(query.shape[1])
            maps = query.float().transpose(1, 2).unflatten(2, (side, side))
            pair = [sample(maps[0::2], first).flatten(0, 1), sample(maps[1::2], spots).flatten(0, 1)]
            mean = self._mean(name)
            mean.lerp_(torch.cat(pair).mean(0).detach(), 0.01)
            centres = nn.functional.normalize(self.centres[name], dim=1)
            likeness[name] = [nn.functional.normalize(one - mean, dim=-1) @ centres.T for one in pair]
            if name in self._to_key:
                key = _heads(self._to_key[name](rows)).transpose(1, 2)
                scores[name] = [_heads(one) @ key * HEAD_WIDTH**-0.5 for one in pair]
            unlike.append(spread_alike(*pair))
        with torch.no_grad():
            targets = [
                self._targets(torch.stack([pair[view] for pair in likeness.values()]).mean(0)) for view in (0, 1)
            ]
            shown = [one[:, asked] for one in targets]
            shown = [torch.cat([1 - one.sum(1, keepdim=True), one], 1) for one in shown]
        return _swapped(likeness, targets, 0.1), _swapped(scores, shown, 1.0), torch.stack(unlike).mean()


def spread_alike(first: Tensor, second: Tensor) -> Tensor:
    """How far two views [N, D] of the same places are from features that agree in both, say something else in each
    dimension, and vary alike in all: 0 there, at least 1 where they have nothing in common.

    Barlow Twins (Zbontar et al. 2021), and the spread of the variances besides. A loss of mere distance lets one
    direction outgrow the others, which then say nothing (``benchmark testbed``, directions of queries).
    """
    first, second = first - first.mean(0), second - second.mean(0)
    variance = (first.square().mean(0) + second.square().mean(0)) / 2 + 1e-6
    correlation = (first / variance.sqrt()).T @ (second / variance.sqrt()) / len(first)
    agreement = correlation.diagonal()
    redundancy = correlation.square().sum() - agreement.square().sum()
    spread = variance.log().var(correction=0)
    return (1 - agreement).square().mean() + REDUNDANCY * redundancy / len(agreement) + SPREAD * spread


def _heads(tensor: Tensor) -> Tensor:
    """[N, heads * d] -> [heads, N, d]."""
    return tensor.unflatten(1, (-1, HEAD_WIDTH)).transpose(0, 1)


def _swapped(found: dict[str, list[Tensor]], targets: list[Tensor], temperature: float) -> Tensor:
    """Mean cross-entropy over layers of what one view says, [..., N, K], and what the other is taken for, [N, K]."""
    losses = [
        -(targets[1 - view] * (pair[view] / temperature).log_softmax(-1)).sum(-1).mean()
        for pair in found.values()
        for view in (0, 1)
    ]
    return torch.stack(losses).mean()


def sample(maps: Tensor, spots: Tensor) -> Tensor:
    """Maps [P, D, h, w] at spots [P, N, 2], x and y in 0..1, as [P, N, D]."""
    found = nn.functional.grid_sample(maps, 2 * spots[:, :, None] - 1, align_corners=False, padding_mode="border")
    return found[..., 0].transpose(1, 2)


@torch.no_grad()
def decoder_widths(model: TextToImage) -> dict[str, int]:
    """Width of the queries of every layer that is watched."""
    watch, device = Watch(), model.tokens.weight.device
    latents, context = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, tiny_model.CONTEXT_DIM)
    options = watch.options()
    model.unet(latents.to(device), torch.zeros(1).to(device), context=context.to(device), transformer_options=options)
    return {name: query.shape[-1] for name, query in watch.queries.items()}
