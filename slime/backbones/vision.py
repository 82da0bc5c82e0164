"""Vision transformers (DINOv2, DINOv3, CLIP, SigLIP), whatever host runs them: their patch tokens are the features.

A layer "block.n" is the n-th transformer block's tokens behind the model's last norm, and its self-attention. DINO's
last block is read, at 60 x 60 cells (A Tale of Two Features, NeurIPS 2023, arXiv 2305.15347); what nobody published,
the probe chooses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..batches import CPU_BATCH, batch_for
from ..errors import SlimeError
from ..images import working_size
from .attention import Attention
from .base import BackboneInfo, EndOfPass, Observation, Plan
from .layers import Layer, LayerChoice

CELLS = 60  # a side
BEYOND = 2  # times the cells a side that learned positions of CLIP and SigLIP were trained with
READ_LAST = ("dinov2", "dinov3")  # kinds whose last block is known to serve
BYTES = 64  # of activations a token and channel: float32, four times as wide within the MLP, and its neighbours


class Standard(NamedTuple):
    """What pixels in [0, 1] are brought to before the model sees them: mean and deviation of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Standard((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = Standard((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Standard((0.5,) * 3, (0.5,) * 3)


class VisionTransformer:
    """What all hosts of vision transformers share. A host adds :meth:`run` and :meth:`free_memory`.

    "Encoded" images are their pixels, those of a cell one behind the other: [B, 3 * cell * cell, H / cell, W / cell].

    Args:
        module: the model; its blocks, their queries and keys are found by name.
        kind: "dinov2", "dinov3", "clip" and so on.
        side: pixels a side it was trained at, 0 where positions are relative.
        standard: how its pixels are scaled.
        device: where it computes.
        cell: pixels a cell of the encoded image spans; its own patch, or what it is joined with asks for.

    Raises:
        SlimeError: no such model.
    """

    def __init__(
        self, module: nn.Module, kind: str, side: int, standard: Standard, device: torch.device, cell: int = 0
    ) -> None:
        self.module: Any = module
        self.kind, self.device = kind, device
        self._blocks, self._norm = _blocks(module), _last_norm(module)
        self.patch, self.width = _patch_and_width(module)
        self.layers: Sequence[Layer] = tuple(Layer(f"block.{n}", 1) for n in range(len(self._blocks)))
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in standard)
        fixed = kind not in READ_LAST and side
        self.cells = min(CELLS, BEYOND * side // self.patch) if fixed else CELLS
        name = f"{kind}-{self.width}" + (f"-{side}" if fixed else "")
        cell = cell or self.patch
        self.info = BackboneInfo(name, self.cells * self.patch, cell, cell, 3 * cell**2)

    def run(self, pixels: Tensor) -> None:
        """One forward of standardised pixels [B, 3, H, W], sides multiples of the patch."""
        raise NotImplementedError

    def free_memory(self) -> float:
        """Bytes on a device that is not the CPU."""
        raise NotImplementedError

    def default_layers(self) -> LayerChoice:
        return LayerChoice((self.layers[-1].name,) if self.kind in READ_LAST else (), ())

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """Nothing: it reads no text."""
        del prompt
        return {}

    def encode_images(self, images: Tensor) -> Tensor:
        """On the CPU: a large batch of them would fill a device."""
        return F.pixel_unshuffle(images[..., :3].cpu().movedim(-1, 1).float(), self.info.cell)

    @torch.no_grad()
    def observe(self, encoded: Tensor, plan: Plan, noise: Tensor) -> Observation:
        del noise
        pixels = F.pixel_shuffle(encoded.to(self.device), self.info.cell)
        size = working_size(pixels.shape[2], pixels.shape[3], self.cells * self.patch, self.patch)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False).clamp(0, 1)
        grid = (size[0] // self.patch, size[1] // self.patch)
        seen = _Seen(plan.layers, grid)
        with self._watched(seen):
            try:
                self.run((pixels - self._mean.to(pixels)) / self._std.to(pixels))
            except EndOfPass:
                pass
        if not seen.complete:
            raise SlimeError("This vision encoder is compiled or patched, so that SLiMe cannot look at it.")
        tokens = [self._norm(seen.tokens[name]).float() for name in plan.layers.read]
        maps = [one[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid) for one in tokens]
        if plan.grouping == "resolution" and maps:
            maps = [torch.stack(maps).mean(0)]
        return Observation(tuple(maps), tuple(seen.attention[name] for name in plan.layers.propagate), grid)

    def fitting_batch(self, size: tuple[int, int]) -> int:
        if self.device.type == "cpu":
            return CPU_BATCH
        return batch_for(self.free_memory(), float(BYTES * self.width * self.cells**2))

    @contextmanager
    def _watched(self, seen: _Seen) -> Iterator[None]:
        """Hooks on the blocks that the plan names, gone afterwards."""
        handles = []
        wanted = {*seen.layers.read, *seen.layers.propagate}
        try:
            for layer, (block, projections) in zip(self.layers, self._blocks, strict=True):
                if layer.name in wanted:
                    handles += seen.hooks(layer.name, block, projections)
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Projections(NamedTuple):
    """A block's layers that make queries and keys, and its number of heads."""

    query: nn.Module
    key: nn.Module
    heads: int


class _Seen:
    """What hooks on blocks catch during one pass: ``tokens`` [B, T, D], and ``attention`` of the image's tokens."""

    def __init__(self, layers: LayerChoice, grid: tuple[int, int]) -> None:
        self.layers, self.grid = layers, grid
        self.tokens: dict[str, Tensor] = {}
        self.attention: dict[str, Attention] = {}

    @property
    def complete(self) -> bool:
        """Whether all that is wanted has come."""
        return len(self.tokens) == len(self.layers.read) and len(self.attention) == len(self.layers.propagate)

    def hooks(self, name: str, block: nn.Module, projections: _Projections) -> list[Any]:
        query, key, heads = projections
        caught: dict[str, Any] = {}

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            caught["rotation"] = kwargs.get("position_embeddings")

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if name in self.layers.read:
                tokens = output[0] if isinstance(output, tuple) else output
                self.tokens[name] = tokens.clone()  # some blocks add to what the last one gave, in place
            if name in self.layers.propagate:
                count = self.grid[0] * self.grid[1]
                q, k = (_rotated(caught[n][:, -count:], heads, caught["rotation"]) for n in ("query", "key"))
                self.attention[name] = Attention(q, k, heads, *self.grid)
            caught.clear()
            if self.complete:
                raise EndOfPass

        handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
        for which, module in (("query", query), ("key", key)):
            handles.append(module.register_forward_hook(lambda _m, _a, out, which=which: caught.update({which: out})))
        return handles


def _rotated(tokens: Tensor, heads: int, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys [B, N, heads * d] turned by their places (RoPE); as they are where the model does not."""
    if rotation is None:
        return tokens
    cos, sin = (one[..., None, :].to(tokens) for one in rotation)  # [N, 1, d]
    by_head = tokens.unflatten(-1, (heads, -1))
    first, second = by_head.chunk(2, -1)
    return (by_head * cos + torch.cat([-second, first], -1) * sin).flatten(-2)


def interpolated(positions: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Learned positions [1, prefix + n * n, D] for a grid of another size or aspect, as transformers does it."""
    side = math.isqrt(positions.shape[1] - prefix)
    if grid == (side, side):
        return positions
    square = positions[:, prefix:].float().transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :prefix], resized.to(positions)], 1)


def _blocks(module: nn.Module) -> list[tuple[nn.Module, _Projections]]:
    """The transformer blocks, each with its queries' and keys' layers."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            found = [(block, _projections(block)) for block in part]
            known = [(block, projections) for block, projections in found if projections is not None]
            if len(known) == len(found):
                return known
    raise SlimeError(f"{type(module).__name__} is no vision transformer that SLiMe knows. Load DINOv2, DINOv3 or CLIP.")


def _projections(block: nn.Module) -> _Projections | None:
    for part in block.modules():
        query, key = (getattr(part, a, getattr(part, b, None)) for a, b in (("query", "q_proj"), ("key", "k_proj")))
        counts = [getattr(part, n, None) for n in ("num_attention_heads", "num_heads", "heads")]
        heads = next((n for n in counts if isinstance(n, int)), None)
        if isinstance(query, nn.Module) and isinstance(key, nn.Module) and heads is not None:
            return _Projections(query, key, heads)
    return None


def _last_norm(module: nn.Module) -> nn.Module:
    known = ("layernorm", "norm", "post_layernorm")
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in known and not any(piece.isdigit() for piece in name.split(".")):
            return part
    return nn.Identity()


def _patch_and_width(module: nn.Module) -> tuple[int, int]:
    """Pixels a token spans a side, and a token's width."""
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if "patch_embedding" in name and isinstance(weight, Tensor) and weight.ndim in (2, 4):
            if weight.ndim == 4:
                return int(weight.shape[-1]), int(weight.shape[0])
            return math.isqrt(weight.shape[1] // 3), int(weight.shape[0])  # a linear layer of flat patches
    raise SlimeError(f"{type(module).__name__} has no patches that SLiMe knows.")
