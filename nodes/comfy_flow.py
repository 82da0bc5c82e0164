"""ComfyUI's flow transformers (Flux, Chroma, SD3, Qwen-Image, Lumina, Z-Image) as a backbone, for the instant trainer.

A layer is a transformer block. Its features are the image tokens' values, which carry no rotation by their place and
whose inputs the block's own norm has scaled; its joint attention's image part propagates. The blocks are told apart by
hooks on them, their queries, keys and values come by ``optimized_attention_override``: both are the same in ComfyUI
0.3.75 and 0.33, whatever a model calls its patches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ..slime.backbones.attention import Attention
from ..slime.backbones.base import BackboneInfo, EndOfPass, Observation, Plan, halved
from ..slime.backbones.layers import Layer, LayerChoice
from ..slime.batches import CPU_BATCH, batch_for
from ..slime.errors import SlimeError
from ..slime.settings import InstantSettings
from .comfy_unet import LATENT_CELL, cell_of, identity_of
from .loading import checkpoint_modules, checkpoint_patcher, load_model

LEVELS = 1000  # a noise level of 260 is a sigma of .26
MIDDLE = (0.3, 0.7)  # of the depth: of a model that nobody probed, blocks that may be read
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
        name: begins the backbone's id.
        base: names of its classes in ``comfy.model_base``.
        noise: level of the features.
        read, propagate: blocks known to serve; none for the probe.
        side: pixels of the square whose area it works on.
        cell: pixels that a latent's cell spans a side, where no VAE is connected that says.
        instant: what the instant trainer does on it.
    """

    name: str
    base: tuple[str, ...]
    noise: int = 260
    read: tuple[str, ...] = ()
    propagate: tuple[str, ...] = ()
    side: int = 1024
    cell: int = LATENT_CELL
    instant: InstantSettings = field(default_factory=lambda: InstantSettings(views=16))  # a Flux view takes 50 MB


# Flux: DiTF (NeurIPS 2025) reads single block 9 at sigma .26, double blocks 12 and 17 serve Seg4Diff (NeurIPS 2025).
# SD3: block 9 at sigma .5 (Seg4Diff). Of the others nothing is published.
FAMILIES = (
    FlowFamily("flux2", ("Flux2",), cell=16),
    FlowFamily("chroma", ("Chroma",), 260, ("single.9",), ("double.12", "double.17")),
    FlowFamily("flux", ("Flux",), 260, ("single.9",), ("double.12", "double.17")),
    FlowFamily("sd3", ("SD3",), 500, ("joint.9",), ("joint.9",)),
    FlowFamily("qwen-image", ("QwenImage",)),
    FlowFamily("lumina", ("Lumina2",)),
)
OTHERS = ("ChromaRadiance", "ZImagePixelSpace")  # of these classes, which work on pixels
_WRONG_TEXT = "The text does not fit the model: connect the CLIP that belongs to it, or train again with it."


def family_of(base: Any) -> FlowFamily | None:
    """Of a loaded model, or None where it is no flow transformer that is known.

    A model-config class may bring along its own, an attribute ``slime_flow`` with the values of :class:`FlowFamily`.
    """
    own = getattr(type(base.model_config), "slime_flow", None) if hasattr(base, "model_config") else None
    if own is not None:
        return FlowFamily(**{**own, "instant": InstantSettings(**own.get("instant", {}))})

    def is_one_of(names: tuple[str, ...]) -> bool:
        known = [getattr(comfy.model_base, name, None) for name in names]
        return isinstance(base, tuple(one for one in known if one is not None))

    if is_one_of(OTHERS):
        return None
    return next((family for family in FAMILIES if is_one_of(family.base)), None)


class ComfyFlow:
    """One ComfyUI model patcher of a flow transformer; keeps nothing of its own on the GPU.

    Raises:
        SlimeError: another kind of model, or one for filling or control, which takes more than the noised image.
    """

    def __init__(self, model: Any, vae: Any = None, clip: Any = None) -> None:
        self.model, self.vae, self.clip = checkpoint_patcher(model), vae, clip
        with checkpoint_modules(self.model):
            self._read_model()

    def _read_model(self) -> None:
        base = self.model.model
        family = family_of(base)
        if family is None or not isinstance(base.model_sampling, comfy.model_sampling.CONST):
            raise SlimeError(f"{type(base).__name__} is no flow transformer that SLiMe knows.")
        self._transformer: nn.Module = base.diffusion_model
        self._blocks = dict(_blocks(self._transformer))
        if not self._blocks or not hasattr(self._transformer, "patch_size"):
            raise SlimeError(
                f"{type(self._transformer).__name__} runs this model by other means than ComfyUI's own, so that SLiMe "
                "cannot look into it. Load the model with ComfyUI's loaders."
            )
        self._patch = _patch_size(self._transformer)
        self._width = _width(self._blocks)
        self._channels = int(base.latent_format.latent_channels)
        self._of_video = getattr(base.latent_format, "latent_dimensions", 2) == 3  # an image is one frame
        taken = _channels_in(self._transformer, self._patch)
        if taken is not None and taken != self._channels:
            raise SlimeError(
                f"This transformer takes {taken} channels, as filling and control checkpoints do. SLiMe needs a plain "
                f"text-to-image checkpoint with {self._channels}: learn and segment with one, inpaint with this one."
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
            family.instant,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.load_device
        return device

    def default_layers(self) -> LayerChoice:
        return self._known

    def condition(self, prompt: str) -> dict[str, Tensor]:
        """What the text encoder gives, in half precision: "text" [T, D], "pooled_output" [P] and so on."""
        if self.clip is None:
            raise SlimeError("Connect the CLIP of the checkpoint: the text that the model looks with is not there yet.")
        given = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True, return_dict=True)
        found = {"text" if name == "cond" else name: one for name, one in given.items() if isinstance(one, Tensor)}
        return {name: halved(one[0]) for name, one in found.items()}

    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise SlimeError("Connect the VAE of the checkpoint.")
        images = images[..., :3]
        if (getattr(self.vae, "latent_dim", 2) == 3) != self._of_video:
            raise SlimeError("This VAE is of another kind of model: connect the VAE that belongs to the model.")
        if self._of_video:  # of a VAE for video, which would take a batch for frames
            latents = torch.cat([self.vae.encode(image[None]) for image in images])[:, :, 0]
        else:
            latents = self.vae.encode(images)
        if latents.shape[1] != self._channels:
            raise SlimeError(
                f"This VAE gives latents of {latents.shape[1]} channels, the model needs {self._channels}: connect the "
                "VAE that belongs to the model."
            )
        return self.take(latents)

    def take(self, latents: Tensor) -> Tensor:
        """LATENT samples [B, C, h, w] in the model's own scale, on its device."""
        latents = latents.to(self.device, torch.float32)
        taken: Tensor = self.model.model.process_latent_in(latents.unsqueeze(2) if self._of_video else latents)
        return taken.squeeze(2) if self._of_video else taken

    @torch.no_grad()
    def observe(self, encoded: Tensor, plan: Plan, noise: Tensor) -> Observation:
        if not 0 < plan.timestep < LEVELS:
            raise SlimeError(f"A noise level of {plan.timestep} is not between 0 and {LEVELS}.")
        grid = (encoded.shape[2] // self._patch, encoded.shape[3] // self._patch)
        seen = _Seen(plan.layers, grid, getattr(self._transformer, "pad_tokens_multiple", None) or 1)
        sigma = plan.timestep / LEVELS
        noisy = sigma * noise.to(encoded) + (1 - sigma) * encoded
        memory = self.model.memory_required([*noisy.shape]) + len(noisy) * self._kept(grid, plan)
        load_model(self.model, memory)
        with checkpoint_modules(self.model), self._watched(seen):
            try:
                self.run(noisy.to(self.device), sigma, plan.condition, seen.attend)
            except EndOfPass:
                pass
            except RuntimeError as error:
                if "shapes cannot be multiplied" in str(error):
                    raise SlimeError(f"{_WRONG_TEXT} ({error})") from error
                raise
        if not seen.complete:
            raise SlimeError(
                "The attention of this model is patched or compiled, so that SLiMe cannot look at it. Connect the "
                "model as it is before that node."
            )
        maps = [seen.values[name].float() for name in plan.layers.read]
        if plan.grouping == "resolution" and maps:
            maps = [torch.stack(maps).mean(0)]
        return Observation(tuple(maps), tuple(seen.attention[name] for name in plan.layers.propagate), grid)

    def _kept(self, grid: tuple[int, int], plan: Plan) -> int:
        """Bytes that one image's values, and queries and keys, take beside the pass."""
        layers = 2 * len(plan.layers.read) + len(plan.layers.propagate)
        return 4 * layers * self._width * grid[0] * grid[1]

    def fitting_batch(self, size: tuple[int, int]) -> int:
        if self.device.type == "cpu":
            return CPU_BATCH
        free = comfy.model_management.get_free_memory(self.device)
        grid = (size[0] // self._patch, size[1] // self._patch)
        one = self.model.memory_required([1, self._channels, *size]) + self._kept(grid, Plan(self._known, {}, 0))
        return batch_for(float(free), float(one))

    def identity(self) -> tuple[object, Hashable] | None:
        return identity_of(self.model, self.vae)

    def run(self, noisy: Tensor, sigma: float, condition: Mapping[str, Tensor], attend: Callable[..., Tensor]) -> None:
        """One pass over latents [B, C, h, w] of noise level ``sigma``, with ``attend`` in place of the attention."""
        base = self.model.model
        given: dict[str, Any] = {"pooled_output": None}
        given |= {name: one[None].to(self.device, torch.float32) for name, one in condition.items()}
        if "attention_mask" in given:
            given["attention_mask"] = given["attention_mask"].long()
        height, width = (side * self.info.cell for side in noisy.shape[2:])
        noisy = noisy.unsqueeze(2) if self._of_video else noisy
        conds = base.extra_conds(
            cross_attn=given.pop("text"), noise=noisy, device=self.device, width=width, height=height, **given
        )
        batch = len(noisy)
        made = {
            name: cond.process_cond(batch_size=batch, device=self.device, area=None).cond
            for name, cond in conds.items()
        }
        sigmas = torch.full((batch,), sigma, device=self.device)
        # Fresh options: what other packs patch into sampling stays out.
        options = {"optimized_attention_override": attend, "sigmas": sigmas[:1]}
        base.apply_model(noisy, sigmas, transformer_options=options, **made)

    @contextmanager
    def _watched(self, seen: _Seen) -> Iterator[None]:
        """Hooks on the blocks that the plan names, gone afterwards."""
        handles: list[Any] = []
        try:
            for name in {*seen.layers.read, *seen.layers.propagate}:
                block = self._blocks[name]
                handles.append(block.register_forward_pre_hook(seen.entering(name)))
                handles.append(block.register_forward_hook(seen.left))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Seen:
    """What the chosen blocks' first attention shows during one pass: ``values`` [B, D, h, w] and ``attention`` of the
    image's tokens, which stand last, padded to a ``multiple``."""

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
        """Whether all that is wanted has come."""
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
        """In place of ComfyUI's attention, which is called as it would have been."""
        name, self._within = self._within, None  # SD3.5 attends twice; the second time without the text
        if name is not None:
            by_head = named.get("skip_reshape", False)
            if name in self.layers.read:
                tokens = self._of_image(value, heads, by_head)
                self.values[name] = tokens.transpose(1, 2).unflatten(2, self.grid)
            if name in self.layers.propagate:
                queries, keys = (self._of_image(one, heads, by_head) for one in (query, key))
                self.attention[name] = Attention(queries, keys, heads, *self.grid)
        return function(query, key, value, heads, *more, **named)

    def _of_image(self, tokens: Tensor, heads: int, by_head: bool) -> Tensor:
        """[B, L, heads * d], [B, L, heads, d] or, by head, [B, heads, L, d] -> a copy [B, N, heads * d]; where fewer
        heads are shared they are repeated."""
        if by_head:
            if tokens.shape[1] != heads:
                tokens = tokens.repeat_interleave(heads // tokens.shape[1], 1)
            tokens = tokens.transpose(1, 2)
        tokens = tokens.flatten(2)
        start = tokens.shape[1] - self._padded
        return tokens[:, start : start + self._count].clone()


def _blocks(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that see text and image, in the order they run."""
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
    """Channels of the latent that the first layer takes; None where that cannot be told."""
    first = getattr(transformer, "img_in", None)
    weight = getattr(first, "weight", None)
    if weight is None:
        weight = getattr(getattr(getattr(transformer, "x_embedder", None), "proj", None), "weight", None)
        return None if weight is None else int(weight.shape[1])
    return int(weight.shape[1]) // patch**2 if weight.ndim == 2 else None


def _width(blocks: dict[str, nn.Module]) -> int:
    """Of a token."""
    first = next(iter(blocks.values()))
    return next(int(weight.shape[1]) for weight in first.parameters() if weight.ndim == 2)


def _build(blocks: dict[str, nn.Module]) -> str:
    """Width and depth, by which models of one family are told apart, and whether queries and keys are normalised, as
    SD3.5's are and SD3's not."""
    first = next(iter(blocks.values()))
    plain = any(isinstance(getattr(part, "ln_q", None), nn.Identity) for part in first.modules())
    return f"{_width(blocks)}x{len(blocks)}" + ("-plain" if plain else "")
