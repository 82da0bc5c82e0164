"""Vision transformers (DINOv2, DINOv3, CLIP, SigLIP) in any runtime: their patch tokens are the features.

A layer "block.n" is the output tokens of the n-th transformer block after the model's last norm, and the block's
self-attention. DINO's last block is read at 60 x 60 tokens (A Tale of Two Features, NeurIPS 2023, arXiv 2305.15347);
for other encoders nothing is published, and the probe chooses.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import batch_for, check_finite
from ..errors import SlimeError
from ..images import working_size
from ..settings import LAYER
from .attention import Attention
from .base import BackboneInfo, EndOfPass, ExtractionSpec, Features
from .layers import Layer, LayerChoice

TOKENS = 60  # per side
MOST_TOKENS = 2  # per side, relative to the learned positions of CLIP and SigLIP
READ_LAST = ("dinov2", "dinov3")  # kinds whose last block is known to work
# DINOv3's features hold the position of a patch, which misleads comparison. What they say of an image of zeros is all
# position: the strongest directions of that are removed, 500 of 1024 (INSID3). Attention keeps them.
POSITIONAL_SHARE = {"dinov3": 500 / 1024}
BYTES = 64  # of activations per token and channel: float32, four times as wide within the MLP, and its neighbours
GROUP = "tokens"  # of the features of all layers together
# Of every model: what the pass over zeros gave, by the state of the weights, the layers and the size.
_positional: WeakKeyDictionary[nn.Module, dict[Hashable, Mapping[str, Tensor]]] = WeakKeyDictionary()


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, by which pixels in [0, 1] are normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Normalization((0.5,) * 3, (0.5,) * 3)


class PixelEncoder:
    """Base class of encoders without text. "Encoded" images are their pixels, unshuffled.

    Their shape is [B, 3 * cell * cell, H / cell, W / cell].
    """

    info: BackboneInfo

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """Return nothing: a vision encoder reads no text."""
        del prompt
        return {}

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the pixels on the CPU: a large batch of them would fill a device."""
        return F.pixel_unshuffle(images[..., :3].cpu().movedim(-1, 1).float(), self.info.cell)


class VisionTransformer(PixelEncoder):
    """Base class of vision transformer adapters. A subclass adds :meth:`run`.

    Args:
        module: the model; its blocks, queries and keys are found by name.
        kind: "dinov2", "dinov3", "clip" and so on.
        side: pixels per side it was trained at, 0 where positions are relative.
        normalization: of its pixels.
        device: device of the model.
        cell: pixels per side of one position of the encoded image; its own patch by default, or what the backbone it
            is fused with needs.

    Raises:
        SlimeError: not such a model.
    """

    def __init__(
        self, module: nn.Module, kind: str, side: int, normalization: Normalization, device: torch.device, cell: int = 0
    ) -> None:
        self.module: Any = module
        self.kind, self.device = kind, device
        self._blocks, self._norm = _blocks(module), _last_norm(module)
        self.patch, self.width = _patch_and_width(module)
        self.layers: Sequence[Layer] = tuple(Layer(f"block.{n}", 1) for n in range(len(self._blocks)))
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in normalization)
        fixed = kind not in READ_LAST and side
        self.tokens_per_side = min(TOKENS, MOST_TOKENS * side // self.patch) if fixed else TOKENS
        name = f"{kind}-{self.width}" + (f"-{side}" if fixed else "")
        cell = cell or self.patch
        self.info = BackboneInfo(name, self.tokens_per_side * self.patch, cell, cell, 3 * cell**2)

    def run(self, pixels: Tensor) -> None:
        """Run the model over normalised pixels [B, 3, H, W], sides multiples of the patch."""
        raise NotImplementedError

    def default_layers(self) -> LayerChoice:
        return LayerChoice((self.layers[-1].name,) if self.kind in READ_LAST else (), ())

    @torch.no_grad()
    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        del noise
        pixels = F.pixel_shuffle(encoded.to(self.device), self.info.cell)
        size = working_size(pixels.shape[2], pixels.shape[3], self.tokens_per_side * self.patch, self.patch)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False).clamp(0, 1)
        recorder = self._recorded((pixels - self._mean.to(pixels)) / self._std.to(pixels), spec.layers)
        grid = recorder.grid
        groups = self._read(recorder)
        if self.kind in POSITIONAL_SHARE and groups:
            basis = self._positional_basis(spec.layers.read, size)
            groups = {name: maps - _projected(maps, basis[name]) for name, maps in groups.items()}
        if spec.grouping != LAYER and groups:
            groups = {GROUP: torch.stack(list(groups.values())).mean(0)}
        return Features(groups, tuple(recorder.attention[name] for name in spec.layers.propagate), grid)

    def _recorded(self, pixels: Tensor, layers: LayerChoice) -> _Recorder:
        """Run the model over normalised pixels, and return what was recorded of the layers."""
        recorder = _Recorder(layers, (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch))
        with self._recording(recorder):
            try:
                self.run(pixels)
            except EndOfPass:
                pass
        if not recorder.complete:
            raise SlimeError(
                "This vision encoder is compiled or patched, so its attention cannot be read. Load it with the node "
                "Load CLIP Vision and connect it directly."
            )
        return recorder

    def _read(self, recorder: _Recorder) -> dict[str, Tensor]:
        """Return the patch tokens [B, D, h, w] of every layer that is read, after the model's last norm."""
        height, width = recorder.grid
        tokens = {name: self._norm(recorder.tokens[name]).float() for name in recorder.layers.read}
        return {
            name: all_tokens[:, -height * width :].transpose(1, 2).unflatten(2, recorder.grid)
            for name, all_tokens in tokens.items()
        }

    def _positional_basis(self, read: tuple[str, ...], size: tuple[int, int]) -> Mapping[str, Tensor]:
        """Return orthonormal directions [D, m] of every layer that hold positions, at images of this size."""
        kept = _positional.setdefault(self.module, {})
        state = self.cache_key()
        key = (None if state is None else state[1], read, size)
        if key not in kept:
            zeros = torch.zeros(1, 3, *size, device=self.device)
            maps = self._read(self._recorded(zeros, LayerChoice(read, ())))
            check_finite(maps.values())
            most = round(POSITIONAL_SHARE[self.kind] * self.width)
            flat = {name: tokens[0].flatten(1).T for name, tokens in maps.items()}
            kept[key] = {name: _strongest(tokens.cpu(), most).to(tokens) for name, tokens in flat.items()}
        return kept[key]

    def cache_key(self) -> tuple[object, Hashable] | None:
        return None

    def free_memory(self) -> float | None:
        """Return the free bytes of the device; None where CUDA tells them."""
        return None

    def fitting_batch(self, size: tuple[int, int]) -> int:
        del size
        return batch_for(self.device, BYTES * self.width * self.tokens_per_side**2, self.free_memory())

    @contextmanager
    def _recording(self, recorder: _Recorder) -> Iterator[None]:
        """Hook the chosen blocks, and remove the hooks afterwards."""
        handles = []
        wanted = {*recorder.layers.read, *recorder.layers.propagate}
        try:
            for layer, (block, projections) in zip(self.layers, self._blocks, strict=True):
                if layer.name in wanted:
                    handles += recorder.hooks(layer.name, block, projections)
            yield
        finally:
            for handle in handles:
                handle.remove()


def _strongest(tokens: Tensor, most: int) -> Tensor:
    """Return up to ``most`` orthonormal directions [D, m] in which tokens [N, D] lie, without those of rounding."""
    _, strengths, directions = torch.linalg.svd(tokens, full_matrices=False)
    rounding = strengths[0] * max(tokens.shape) * torch.finfo(tokens.dtype).eps  # as matrix_rank has it
    return directions[: min(most, int((strengths > rounding).sum()))].T


def _projected(maps: Tensor, basis: Tensor) -> Tensor:
    """Project features [B, D, h, w] onto directions [D, m]."""
    return torch.einsum("de,be...->bd...", basis, torch.einsum("de,bd...->be...", basis, maps))


class _Projections(NamedTuple):
    """A block's layers that compute queries and keys, and its number of heads."""

    query: nn.Module
    key: nn.Module
    heads: int


class _Recorder:
    """Records output ``tokens`` [B, T, D] of blocks, and the ``attention`` among the image tokens, in one pass."""

    def __init__(self, layers: LayerChoice, grid: tuple[int, int]) -> None:
        self.layers, self.grid = layers, grid
        self.tokens: dict[str, Tensor] = {}
        self.attention: dict[str, Attention] = {}

    @property
    def complete(self) -> bool:
        """Whether every chosen layer was recorded."""
        return len(self.tokens) == len(self.layers.read) and len(self.attention) == len(self.layers.propagate)

    def hooks(self, name: str, block: nn.Module, projections: _Projections) -> list[Any]:
        query, key, heads = projections
        caught: dict[str, Any] = {}

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            caught["rotation"] = kwargs.get("position_embeddings")

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if name in self.layers.read:
                tokens = output[0] if isinstance(output, tuple) else output
                self.tokens[name] = tokens.clone()  # some blocks add to the output of the last one in place
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
    """Apply rotary position embeddings, if any, to queries or keys [B, N, heads * d]."""
    if rotation is None:
        return tokens
    cos, sin = (one[..., None, :].to(tokens) for one in rotation)  # [N, 1, d]
    by_head = tokens.unflatten(-1, (heads, -1))
    first, second = by_head.chunk(2, -1)
    return (by_head * cos + torch.cat([-second, first], -1) * sin).flatten(-2)


def interpolated(positions: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Resize learned positions [1, prefix + n * n, D] to a grid of another size or aspect, as transformers does."""
    side = math.isqrt(positions.shape[1] - prefix)
    if grid == (side, side):
        return positions
    square = positions[:, prefix:].float().transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :prefix], resized.to(positions)], 1)


def _blocks(module: nn.Module) -> list[tuple[nn.Module, _Projections]]:
    """Return the transformer blocks, each with its query and key layers."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child):
            blocks = [(block, _projections(block)) for block in child]
            known = [(block, projections) for block, projections in blocks if projections is not None]
            if len(known) == len(blocks):
                return known
    raise SlimeError(
        f"{type(module).__name__} is not a vision encoder that SLiMe supports. Load DINOv2, DINOv3, CLIP or SigLIP."
    )


def _projections(block: nn.Module) -> _Projections | None:
    for child in block.modules():
        query, key = (getattr(child, a, getattr(child, b, None)) for a, b in (("query", "q_proj"), ("key", "k_proj")))
        counts = [getattr(child, n, None) for n in ("num_attention_heads", "num_heads", "heads")]
        heads = next((n for n in counts if isinstance(n, int)), None)
        if isinstance(query, nn.Module) and isinstance(key, nn.Module) and heads is not None:
            return _Projections(query, key, heads)
    return None


def _last_norm(module: nn.Module) -> nn.Module:
    known = ("layernorm", "norm", "post_layernorm")
    for name, child in module.named_modules():
        if name.rpartition(".")[2] in known and not any(word.isdigit() for word in name.split(".")):
            return child
    return nn.Identity()


def _patch_and_width(module: nn.Module) -> tuple[int, int]:
    """Return the pixels per side of a token, and its width."""
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if "patch_embedding" in name and isinstance(weight, Tensor) and weight.ndim in (2, 4):
            if weight.ndim == 4:
                return int(weight.shape[-1]), int(weight.shape[0])
            return math.isqrt(weight.shape[1] // 3), int(weight.shape[0])  # a linear layer of flat patches
    raise SlimeError(
        f"{type(module).__name__} has no patch embedding that SLiMe supports. Load DINOv2, DINOv3, CLIP or SigLIP."
    )
