"""Adapt ComfyUI's flow transformers (Flux, Chroma, SD3, Qwen-Image, Lumina, Z-Image), for the instant trainer.

A layer is a transformer block. Its features are the values of the image tokens, which have no rotary position and whose
inputs the block's own norm has scaled; the image part of its joint attention propagates. Hooks tell which block runs;
queries, keys and values come through ``optimized_attention_override``. Both work alike in ComfyUI 0.3.75 and 0.33, for
every model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ..slime.backbones.attention import Attention
from ..slime.backbones.base import BackboneInfo, EndOfPass, ExtractionSpec, Features, halved
from ..slime.backbones.layers import Layer, LayerChoice
from ..slime.batches import batch_for
from ..slime.errors import SlimeError
from ..slime.settings import LAYER
from .comfy_unet import LATENT_CELL, cache_key_of, cell_of
from .loading import FLOW_MODELS, checkpoint_modules, checkpoint_patcher, load_on_device

LEVELS = 1000  # a timestep of 260 is a sigma of .26
MIDDLE = (0.3, 0.7)  # range of depth of the blocks that the probe reads
GROUP = "values"  # name of the features of all blocks together
MODULES = {
    "double_blocks": "double",
    "single_blocks": "single",
    "joint_blocks": "joint",
    "transformer_blocks": "transformer",
    "layers": "layer",
}


@dataclass(frozen=True)
class FlowFamily:
    """A kind of flow transformer.

    Attributes:
        name: prefix of the backbone's id.
        base: names of its classes in ``comfy.model_base``.
        noise: noise level of the features.
        read, propagate: blocks known to work; none for the probe.
        side: pixels of the square whose area it works on.
        cell: pixels per side of a latent pixel, unless the connected VAE says otherwise.
        views: of the examples for the instant trainer, by default.
    """

    name: str
    base: tuple[str, ...]
    noise: int = 260
    read: tuple[str, ...] = ()
    propagate: tuple[str, ...] = ()
    side: int = 1024
    cell: int = LATENT_CELL
    views: int = 16  # one of Flux takes 50 MB


# Flux: DiTF (NeurIPS 2025) reads single block 9 at sigma .26; Seg4Diff (NeurIPS 2025) uses double blocks 12 and 17.
# SD3: block 9 at sigma .5 (Seg4Diff). For the others nothing is published.
FAMILIES = (
    FlowFamily("flux2", ("Flux2",), cell=16),
    FlowFamily("chroma", ("Chroma",), 260, ("single.9",), ("double.12", "double.17")),
    FlowFamily("flux", ("Flux",), 260, ("single.9",), ("double.12", "double.17")),
    FlowFamily("sd3", ("SD3",), 500, ("joint.9",), ("joint.9",)),
    FlowFamily("qwen-image", ("QwenImage",)),
    FlowFamily("lumina", ("Lumina2",)),
)
PIXEL_MODELS = ("ChromaRadiance", "ZImagePixelSpace")  # subclasses that work on pixels; not supported
_WRONG_TEXT = "The text does not fit the model: connect the CLIP that belongs to it, or train again with it."


def family_of(base: Any) -> FlowFamily | None:
    """Return the family of a loaded model, or None if it is not a supported flow transformer.

    A model-config class may describe its models in an attribute ``slime_flow`` with the arguments of
    :class:`FlowFamily`.
    """
    own = getattr(type(base.model_config), "slime_flow", None) if hasattr(base, "model_config") else None
    if own is not None:
        return FlowFamily(**own)

    def is_one_of(names: tuple[str, ...]) -> bool:
        classes = [getattr(comfy.model_base, name, None) for name in names]
        return isinstance(base, tuple(kind for kind in classes if kind is not None))

    if is_one_of(PIXEL_MODELS):
        return None
    return next((family for family in FAMILIES if is_one_of(family.base)), None)


class ComfyFlow:
    """A ComfyUI model patcher of a flow transformer; keeps nothing of its own on the GPU.

    Raises:
        SlimeError: another kind of model, or one for filling or control, which takes more than the noised image.
    """

    def __init__(self, model: Any, vae: Any = None, clip: Any = None) -> None:
        self.model, self.vae, self.clip = checkpoint_patcher(model), vae, clip
        with checkpoint_modules(self.model):
            self._read_model()

    @classmethod
    def accepts(cls, model: Any) -> bool:
        """Return whether this adapter is for the model."""
        return family_of(model.model) is not None

    def _read_model(self) -> None:
        base = self.model.model
        family = family_of(base)
        if family is None or not isinstance(base.model_sampling, comfy.model_sampling.CONST):
            raise SlimeError(
                f"{type(base).__name__} is not supported. The supported flow models are {FLOW_MODELS}. Load one of "
                "these."
            )
        self._transformer: nn.Module = base.diffusion_model
        self._blocks = dict(_blocks(self._transformer))
        if not self._blocks or not hasattr(self._transformer, "patch_size"):
            raise SlimeError(
                f"{type(self._transformer).__name__} is not ComfyUI's own implementation of this model, so SLiMe "
                "cannot read its blocks. Load the model with ComfyUI's loaders."
            )
        self._patch = _patch_size(self._transformer)
        self._width = _width(self._blocks)
        self._channels = int(base.latent_format.latent_channels)
        self._of_video = getattr(base.latent_format, "latent_dimensions", 2) == 3  # an image is one frame
        taken = _channels_in(self._transformer, self._patch)
        if taken is not None and taken != self._channels:
            raise SlimeError(
                f"This transformer takes {taken} channels, as filling and control checkpoints do. SLiMe needs a plain "
                f"text-to-image checkpoint with {self._channels}: train and segment with one, inpaint with this one."
            )
        known = {*family.read, *family.propagate} <= self._blocks.keys()
        self._known = LayerChoice(family.read, family.propagate) if known else LayerChoice((), ())
        readable = list(self._blocks) if family.read else _middle(list(self._blocks))
        self.layers = tuple(Layer(name, self._patch) for name in readable)
        cell = cell_of(self.vae, family.cell)
        self.info = BackboneInfo(
            f"{family.name}-{_build(self._blocks)}",
            family.side,
            cell,
            cell * self._patch,
            self._channels,
            family.noise,
            family.views,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.load_device
        return device

    def default_layers(self) -> LayerChoice:
        return self._known

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """Return the output of the text encoder, in half precision: "text" [T, D], "pooled_output" [P] and so on."""
        if self.clip is None:
            raise SlimeError(
                "No CLIP is connected, but a prompt has to be encoded. Connect the CLIP that belongs to the model to "
                "clip: SLiMe Train always needs it for this model, other nodes only for embeddings that were loaded "
                "from a text."
            )
        encoded = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True, return_dict=True)
        tensors = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
        return {"text" if name == "cond" else name: halved(tensor[0]) for name, tensor in tensors.items()}

    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise SlimeError("Connect the VAE of the checkpoint.")
        images = images[..., :3]
        if (getattr(self.vae, "latent_dim", 2) == 3) != self._of_video:
            raise SlimeError("This VAE belongs to another kind of model: connect the VAE that belongs to this one.")
        if self._of_video:  # a VAE for video would take a batch for frames
            latents = torch.cat([self.vae.encode(image[None]) for image in images])[:, :, 0]
        else:
            latents = self.vae.encode(images)
        if latents.shape[1] != self._channels:
            raise SlimeError(
                f"This VAE gives latents of {latents.shape[1]} channels, the model needs {self._channels}: connect the "
                "VAE that belongs to the model."
            )
        return self.process_latents(latents)

    def process_latents(self, latents: Tensor) -> Tensor:
        """Return LATENT samples [B, C, h, w] in the model's own scale, on its device."""
        latents = latents.to(self.device, torch.float32)
        processed: Tensor = self.model.model.process_latent_in(latents.unsqueeze(2) if self._of_video else latents)
        return processed.squeeze(2) if self._of_video else processed

    @torch.no_grad()
    def extract(self, encoded: Tensor, spec: ExtractionSpec, noise: Tensor) -> Features:
        if not 0 < spec.timestep < LEVELS:
            raise SlimeError(f"The timestep is {spec.timestep}; it must be between 1 and {LEVELS - 1}.")
        grid = (encoded.shape[2] // self._patch, encoded.shape[3] // self._patch)
        recorder = _Recorder(spec.layers, grid, getattr(self._transformer, "pad_tokens_multiple", None) or 1)
        sigma = spec.timestep / LEVELS
        noisy = sigma * noise.to(encoded) + (1 - sigma) * encoded
        memory = self.model.memory_required([*noisy.shape]) + len(noisy) * self._recorded_bytes(grid, spec.layers)
        load_on_device(self.model, memory)
        with checkpoint_modules(self.model), self._recording(recorder):
            try:
                self.run(noisy.to(self.device), sigma, spec.condition, recorder.attend)
            except EndOfPass:
                pass
            except RuntimeError as error:
                if "shapes cannot be multiplied" in str(error):
                    raise SlimeError(f"{_WRONG_TEXT} ({error})") from error
                raise
        if not recorder.complete:
            raise SlimeError(
                "Another node has patched or compiled the attention of this model, so it cannot be read. Connect the "
                "model as it is before that node."
            )
        groups = {name: recorder.values[name].float() for name in spec.layers.read}
        if spec.grouping != LAYER and groups:
            groups = {GROUP: torch.stack(list(groups.values())).mean(0)}
        return Features(groups, tuple(recorder.attention[name] for name in spec.layers.propagate), grid)

    def _recorded_bytes(self, grid: tuple[int, int], layers: LayerChoice) -> int:
        """Return the bytes of one image's recorded values, queries and keys."""
        return 4 * (2 * len(layers.read) + len(layers.propagate)) * self._width * grid[0] * grid[1]

    def fitting_batch(self, size: tuple[int, int]) -> int:
        grid = (size[0] // self._patch, size[1] // self._patch)
        one = self.model.memory_required([1, self._channels, *size]) + self._recorded_bytes(grid, self._known)
        return batch_for(self.device, one, comfy.model_management.get_free_memory(self.device))

    def cache_key(self) -> tuple[object, Hashable] | None:
        return cache_key_of(self.model, self.vae)

    def run(self, noisy: Tensor, sigma: float, condition: Mapping[str, Tensor], attend: Callable[..., Tensor]) -> None:
        """Run one pass over latents [B, C, h, w] of noise level ``sigma``, with ``attend`` in place of attention."""
        base = self.model.model
        inputs: dict[str, Any] = {"pooled_output": None}
        inputs |= {name: tensor[None].to(self.device, torch.float32) for name, tensor in condition.items()}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"].long()
        height, width = (side * self.info.cell for side in noisy.shape[2:])
        noisy = noisy.unsqueeze(2) if self._of_video else noisy
        conds = base.extra_conds(
            cross_attn=inputs.pop("text"), noise=noisy, device=self.device, width=width, height=height, **inputs
        )
        batch = len(noisy)
        arguments = {
            name: cond.process_cond(batch_size=batch, device=self.device, area=None).cond
            for name, cond in conds.items()
        }
        sigmas = torch.full((batch,), sigma, device=self.device)
        # New options: patches of other packs stay out.
        options = {"optimized_attention_override": attend, "sigmas": sigmas[:1]}
        base.apply_model(noisy, sigmas, transformer_options=options, **arguments)

    @contextmanager
    def _recording(self, recorder: _Recorder) -> Iterator[None]:
        """Hook the chosen blocks, and remove the hooks afterwards."""
        handles: list[Any] = []
        try:
            for name in {*recorder.layers.read, *recorder.layers.propagate}:
                block = self._blocks[name]
                handles.append(block.register_forward_pre_hook(recorder.entering(name)))
                handles.append(block.register_forward_hook(recorder.left))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Recorder:
    """Records the first attention of chosen blocks in one pass: ``values`` [B, D, h, w] and ``attention`` of the image
    tokens, which come last, padded to a ``multiple``."""

    def __init__(self, layers: LayerChoice, grid: tuple[int, int], multiple: int) -> None:
        self.layers, self.grid = layers, grid
        self.values: dict[str, Tensor] = {}
        self.attention: dict[str, Attention] = {}
        count = grid[0] * grid[1]
        self._count, self._padded = count, -(-count // multiple) * multiple
        self._within: str | None = None

    def entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._within = name

        return hook

    def left(self, *_: Any) -> None:
        self._within = None
        if self.complete:
            raise EndOfPass

    @property
    def complete(self) -> bool:
        """Whether every chosen block was recorded."""
        return self.values.keys() >= {*self.layers.read} and self.attention.keys() >= {*self.layers.propagate}

    def attend(
        self,
        function: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """Record queries, keys and values, then call ComfyUI's attention as it would have been called."""
        name, self._within = self._within, None  # SD3.5 attends twice; the second time without text
        if name is not None:
            by_head = named.get("skip_reshape", False)
            if name in self.layers.read:
                tokens = self._image_tokens(value, heads, by_head)
                self.values[name] = tokens.transpose(1, 2).unflatten(2, self.grid)
            if name in self.layers.propagate:
                queries, keys = (self._image_tokens(tokens, heads, by_head) for tokens in (query, key))
                self.attention[name] = Attention(queries, keys, heads, *self.grid)
        return function(query, key, value, heads, *more, **named)

    def _image_tokens(self, tokens: Tensor, heads: int, by_head: bool) -> Tensor:
        """Copy the image tokens out of [B, L, heads * d], [B, L, heads, d] or, by head, [B, heads, L, d].

        Returns [B, N, heads * d]; heads that several queries share are repeated.
        """
        if by_head:
            if tokens.shape[1] != heads:
                tokens = tokens.repeat_interleave(heads // tokens.shape[1], 1)
            tokens = tokens.transpose(1, 2)
        tokens = tokens.flatten(2)
        start = tokens.shape[1] - self._padded
        return tokens[:, start : start + self._count].clone()


def _blocks(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks that process text and image, in the order they run."""
    for attribute, name in MODULES.items():
        for number, block in enumerate(getattr(transformer, attribute, ())):
            yield f"{name}.{number}", block


def _middle(names: list[str]) -> list[str]:
    first, last = (round(share * len(names)) for share in MIDDLE)
    return names[first : max(last, first + 1)]


def _patch_size(transformer: Any) -> int:
    size = transformer.patch_size
    return int(size if isinstance(size, int) else size[-1])


def _channels_in(transformer: Any, patch: int) -> int | None:
    """Return the latent channels that the first layer takes; None where that is unknown."""
    first = getattr(transformer, "img_in", None)
    weight = getattr(first, "weight", None)
    if weight is None:
        weight = getattr(getattr(getattr(transformer, "x_embedder", None), "proj", None), "weight", None)
        return None if weight is None else int(weight.shape[1])
    return int(weight.shape[1]) // patch**2 if weight.ndim == 2 else None


def _width(blocks: dict[str, nn.Module]) -> int:
    """Return the width of a token."""
    first = next(iter(blocks.values()))
    return next(int(weight.shape[1]) for weight in first.parameters() if weight.ndim == 2)


def _build(blocks: dict[str, nn.Module]) -> str:
    """Return width and depth, which identify a model of a family, and "plain" where queries and keys have no norm (SD3,
    unlike SD3.5)."""
    first = next(iter(blocks.values()))
    plain = any(isinstance(getattr(module, "ln_q", None), nn.Identity) for module in first.modules())
    return f"{_width(blocks)}x{len(blocks)}" + ("-plain" if plain else "")
