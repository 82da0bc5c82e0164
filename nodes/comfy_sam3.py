"""Adapt ComfyUI's SAM3 MODEL: its image encoder as a backbone, its detector for learning concepts.

Read in ComfyUI 0.33.0 (comfy/ldm/sam3). ComfyUI squashes images to a square of 1008 pixels and does not normalise
them; so does this.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.ldm.flux.math import apply_rope
from torch import Tensor, nn

from ..slime.backbones.attention import Attention
from ..slime.backbones.base import BackboneInfo, EndOfPass, ExtractionSpec, Features
from ..slime.backbones.layers import Layer, LayerChoice
from ..slime.backbones.vit import GROUP, PixelEncoder
from ..slime.batches import batch_for
from ..slime.concepts.detection import Detections
from ..slime.errors import SlimeError
from ..slime.settings import LAYER
from .comfy_autograd import trainable
from .loading import checkpoint_modules, checkpoint_patcher, load_on_device

BYTES = 64  # of activations per token and channel, as for other vision transformers
MASK_BYTES = 2**31  # the detector's masks and their gradients, for one image and one concept
CLASS = "SAM3Model"


def is_sam3(model: Any) -> bool:
    """Return whether a MODEL is ComfyUI's SAM3."""
    return type(getattr(getattr(model, "model", None), "diffusion_model", None)).__name__ == CLASS


class ComfySam3(PixelEncoder):
    """A SAM3 MODEL. Layers "block.n" are those blocks of its encoder that attend to the whole image.

    Args:
        model: ComfyUI's model patcher.
        vae, clip: unused; every adapter of a MODEL takes them.
        cell: pixels per side of one position of an encoded image, or what the backbone it is fused with needs.

    Raises:
        SlimeError: not a SAM3 model.
    """

    def __init__(self, model: Any, vae: Any = None, clip: Any = None, cell: int = 0) -> None:
        del vae, clip
        if not is_sam3(model):
            raise SlimeError(
                "This MODEL is not SAM3. Load a SAM3 checkpoint with Load Checkpoint (ComfyUI 0.20 or newer)."
            )
        self.patcher = checkpoint_patcher(model)
        self._trunk = self._detector.backbone["vision_backbone"].trunk
        self.patch, self.side, self._width = (
            int(getattr(self._trunk, name)) for name in ("patch_size", "img_size", "embed_dim")
        )
        whole = sorted(self._trunk.global_att_blocks)
        self.layers = tuple(Layer(f"block.{n}", 1) for n in whole if n < len(self._trunk.blocks))
        cell = cell or self.patch
        self.id = f"sam3-{self._width}"
        self.info = BackboneInfo(self.id, self.side, cell, cell, 3 * cell**2)

    accepts = staticmethod(is_sam3)

    @property
    def _detector(self) -> Any:
        return self.patcher.model.diffusion_model.detector

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device  # type: ignore[no-any-return]

    def default_layers(self) -> LayerChoice:
        """Return the last block, for features and for propagation."""
        last = (self.layers[-1].name,)
        return LayerChoice(last, last)

    @torch.no_grad()
    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        del noise
        pixels = self._squashed(F.pixel_shuffle(encoded.to(self.device), self.info.cell))
        grid = (self.side // self.patch,) * 2
        tokens: dict[str, Tensor] = {}
        attention: dict[str, Attention] = {}
        load_on_device(self.patcher, len(pixels) * self._pass_bytes())
        with checkpoint_modules(self.patcher), self._recording(spec.layers, tokens, attention):
            try:
                self._trunk(pixels)
            except EndOfPass:
                pass
        groups = {name: tokens[name].float().movedim(-1, 1) for name in spec.layers.read}
        if spec.grouping != LAYER and groups:
            groups = {GROUP: torch.stack(list(groups.values())).mean(0)}
        return Features(groups, tuple(attention[name] for name in spec.layers.propagate), grid)

    def fitting_batch(self, size: tuple[int, int]) -> int:
        del size
        return batch_for(self.device, self._pass_bytes(), comfy.model_management.get_free_memory(self.device))

    def cache_key(self) -> tuple[object, Hashable] | None:
        """Return the model and a key of its state."""
        return self.patcher.model, str(self.patcher.patches_uuid)

    def _pass_bytes(self) -> float:
        return float(BYTES * self._width * (self.side // self.patch) ** 2)

    @property
    def _dtype(self) -> torch.dtype:
        return self.patcher.model.get_dtype()  # type: ignore[no-any-return]

    def _squashed(self, pixels: Tensor) -> Tensor:
        """Resize pixels [B, 3, H, W] as ComfyUI's SAM3 nodes do."""
        square = F.interpolate(pixels, (self.side, self.side), mode="bilinear", align_corners=False)
        return square.to(self.device, self._dtype)

    @contextmanager
    def _recording(
        self, layers: LayerChoice, tokens: dict[str, Tensor], attention: dict[str, Attention]
    ) -> Iterator[None]:
        """Record output tokens [B, h, w, D] and the attention of blocks; end the pass after the last of them."""
        wanted = [name for name in (layer.name for layer in self.layers) if name in {*layers.read, *layers.propagate}]
        handles: list[Any] = []

        def record_attention(name: str, module: Any, output: Tensor) -> None:
            batch, count, _ = output.shape
            query, key, _ = output.reshape(batch, count, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key = apply_rope(query, key, self._trunk.freqs_cis.to(query))
            side = math.isqrt(count)
            query, key = (t.transpose(1, 2).flatten(2) for t in (query, key))
            attention[name] = Attention(query, key, module.num_heads, side, side)

        def record_tokens(name: str, output: Tensor) -> None:
            tokens[name] = output
            if name == wanted[-1]:
                raise EndOfPass

        def hook(name: str) -> Iterator[Any]:
            block = self._trunk.blocks[int(name.rpartition(".")[2])]
            if name in layers.propagate:
                attend: nn.Module = block.attn
                yield block.attn.qkv.register_forward_hook(lambda _m, _i, out: record_attention(name, attend, out))
            yield block.register_forward_hook(lambda _m, _i, out: record_tokens(name, out))

        try:
            for name in wanted:
                handles += hook(name)
            yield
        finally:
            for handle in handles:
                handle.remove()

    # The detector, see slime.concepts.train.ConceptDetector

    @property
    def mask_side(self) -> int:
        return 4 * self.side // self.patch

    @property
    def token_width(self) -> int:
        return int(self._detector.backbone["language_backbone"]["resizer"].weight.shape[1])

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Return the trunk's output [1, D, h, w] of an image [1, H, W, 3], on the CPU."""
        load_on_device(self.patcher, self._pass_bytes())
        with checkpoint_modules(self.patcher):
            output: Tensor = self._trunk(self._squashed(image[..., :3].movedim(-1, 1)))
        return output.cpu()

    @torch.no_grad()
    def prepare(self, encoded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the levels [1, D, h, w] of the detector's features, and their positions."""
        vision = self._detector.backbone["vision_backbone"]
        trunk = encoded.to(self.device, self._dtype).clone()  # autograd refuses inference tensors
        features = [convolution(trunk) for convolution in vision.convs]
        return features, [vision.position_encoding(level).to(level).clone() for level in features]

    def detect(self, prepared: tuple[list[Tensor], list[Tensor]], tokens: Tensor) -> Detections:
        """Detect by tokens [T, D] as SAM3 Detect does by those of a text."""
        resized = self._detector.backbone["language_backbone"]["resizer"](tokens[None].to(self._dtype))
        mask = torch.ones(1, resized.shape[1], dtype=torch.bool, device=self.device)
        boxes, scores, masks, decoded = self._detector._detect(*prepared, resized, mask)
        return Detections(boxes, scores, masks, decoded["presence"])

    @torch.no_grad()
    def decode_mask(self, image: Tensor, logits: Tensor, iterations: int) -> Tensor:
        """Refine coarse mask logits [h, w] of an image [h, w, 3], as SAM3 Detect refines its own masks."""
        load_on_device(self.patcher, MASK_BYTES)
        frame = self._squashed(image[None, ..., :3].movedim(-1, 1).float())
        mask = logits[None, None].to(frame)
        with checkpoint_modules(self.patcher):
            for _ in range(iterations):  # at the size of the decoder's prompts, or it is resized once more
                mask = F.interpolate(mask, (self.mask_side,) * 2, mode="bilinear", align_corners=False)
                mask = self.patcher.model.diffusion_model.forward_segment(frame, mask_inputs=mask)
        resized = F.interpolate(mask.float(), logits.shape, mode="bilinear", align_corners=False)
        return resized[0, 0].cpu()

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        load_on_device(self.patcher, MASK_BYTES)
        with checkpoint_modules(self.patcher), trainable(self.patcher):
            yield
