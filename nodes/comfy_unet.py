"""Adapt ComfyUI's Stable Diffusion MODEL, VAE and CLIP to :class:`slime.backbones.sd_unet.SDUNet`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from torch import Tensor

from ..slime.backbones.attention import Attention, attend, attend_and_propagate
from ..slime.backbones.base import EndOfPass
from ..slime.backbones.layers import Layer
from ..slime.backbones.sd_unet import Family, SDUNet, family_for
from ..slime.backbones.text import Capture, Context
from ..slime.batches import batch_for
from ..slime.errors import SlimeError
from .comfy_autograd import trainable
from .loading import SUPPORTED, checkpoint_modules, checkpoint_patcher, load_on_device

TRAINING_MEMORY = 4  # a training step holds several times what ComfyUI estimates for sampling
LATENT_CELL = 8  # pixels per side of a latent pixel, unless the connected VAE says otherwise


class ComfyUNet(SDUNet):
    """A ComfyUI model patcher of a UNet; keeps nothing of its own on the GPU.

    A model-config class may describe its models in an attribute ``slime_family`` with the arguments of
    :class:`slime.backbones.sd_unet.Family`.

    Raises:
        SlimeError: not a Stable Diffusion UNet, an inpainting UNet, or an unusual noise schedule.
    """

    def __init__(self, model: Any, vae: Any = None, clip: Any = None) -> None:
        self.model, self.vae, self.clip = checkpoint_patcher(model), vae, clip
        with checkpoint_modules(self.model):
            self._read_model()
        self._in_training = False

    @classmethod
    def accepts(cls, model: Any) -> bool:
        """Return whether this adapter is for the model; a missing UNet is reported by the constructor."""
        return isinstance(getattr(model.model, "diffusion_model", None), UNetModel)

    def _read_model(self) -> None:
        base = self.model.model
        unet = getattr(base, "diffusion_model", None)
        if not isinstance(unet, UNetModel):
            raise SlimeError(
                f"SLiMe supports {SUPPORTED}; {type(base).__name__} is another kind of model. Load one of these."
            )
        taken, channels = int(unet.input_blocks[0][0].weight.shape[1]), int(base.latent_format.latent_channels)
        if taken != channels:
            raise SlimeError(
                f"This UNet takes {taken} input channels, as inpainting and editing checkpoints do. SLiMe needs a "
                f"plain text-to-image checkpoint with {channels}: train and segment with one, inpaint with this one."
            )
        sampling = base.model_sampling
        sigmas = getattr(sampling, "sigmas", None)
        if sigmas is None or len(sigmas) != getattr(sampling, "num_timesteps", None):
            raise SlimeError(
                f"{type(base).__name__} has a noise schedule that SLiMe does not know. Load an SD1.x, SD2.x or SDXL "
                "checkpoint."
            )
        prediction = "v" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "eps"
        own = getattr(type(base.model_config), "slime_family", None)
        super().__init__(
            Family(**own) if own else family_for(_context_dim(unet), prediction),
            prediction,
            unet_layers(unet),
            1 / (1 + sigmas.detach().cpu().double() ** 2),
            self.model.load_device,
            channels,
            cell_of(self.vae),
        )

    def cache_key(self) -> tuple[object, Hashable] | None:
        return cache_key_of(self.model, self.vae)

    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise SlimeError("Connect the VAE of the checkpoint.")
        latents = self.vae.encode(images[..., :3])
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise SlimeError(
                f"This VAE gives latents of {latents.shape[1]} channels, but the model needs {self.channels}: "
                "connect the VAE of the same checkpoint."
            )
        return self.process_latents(latents)

    def process_latents(self, latents: Tensor) -> Tensor:
        """Return LATENT samples [B, C, h, w] in the model's own scale, on its device."""
        processed: Tensor = self.model.model.process_latent_in(latents.to(self.device, torch.float32))
        return processed

    def encode_prompt(self, prompt: str) -> Context:
        if self.clip is None:
            raise SlimeError(
                "No CLIP is connected, but a prompt has to be encoded. Connect the CLIP of the checkpoint to clip: "
                "SLiMe Train always needs it for this model, other nodes only for embeddings that were loaded from a "
                "text."
            )
        tokens, pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)
        needs_pooled = self.model.model.adm_channels > 0
        return Context(tokens[0].float().cpu(), pooled[0].float().cpu() if needs_pooled else None)

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        if not self._in_training:
            memory = self.model.memory_required([noisy.shape[0], *noisy.shape[1:]])
            load_on_device(self.model, memory)
        batch = noisy.shape[0]
        abar = float(self.alphas_cumprod[timestep])
        sigma = ((1 - abar) / abar) ** 0.5
        # ComfyUI's x is z + sigma * eps (variance exploding).
        x = noisy.to(self.device) / abar**0.5
        tokens = context.for_batch(batch).to(self.device)
        arguments = self._extra_arguments(context, x)
        try:
            with checkpoint_modules(self.model):
                denoised = self.model.model.apply_model(
                    x,
                    torch.full((batch,), sigma, device=self.device),
                    c_crossattn=tokens,
                    transformer_options=self._options(capture, len(context)),
                    **arguments,
                )
        except EndOfPass:
            return None
        return (x - denoised) / sigma

    def fitting_batch(self, size: tuple[int, int]) -> int:
        one = self.model.memory_required([1, self.channels, *size])
        return batch_for(self.device, one, comfy.model_management.get_free_memory(self.device))

    @contextmanager
    def differentiable(self, checkpointing: bool) -> Iterator[None]:
        side = self.info.side // self.info.cell
        memory = TRAINING_MEMORY * self.model.memory_required([1, self.channels, side, side])
        load_on_device(self.model, memory, whole=True)
        self._in_training = True
        try:
            with trainable(self.model, checkpointing):
                yield
        finally:
            self._in_training = False

    def _extra_arguments(self, context: Context, latents: Tensor) -> dict[str, Tensor]:
        """Return SDXL's size and pooled text conditioning, made by the model itself; nothing for SD1.x and SD2.x."""
        if context.pooled is None:
            return {}
        height, width = (side * self.info.cell for side in latents.shape[2:])
        conds = self.model.model.extra_conds(
            cross_attn=context.for_batch(1).detach(),
            pooled_output=context.pooled[None].to(self.device),
            width=width,
            height=height,
            crop_w=0,
            crop_h=0,
            target_width=width,
            target_height=height,
            device=self.device,
            noise=latents,
        )
        batch = latents.shape[0]
        made = {
            name: cond.process_cond(batch_size=batch, device=self.device, area=None).cond
            for name, cond in conds.items()
            if name != "c_crossattn"
        }
        return {name: value.clone() for name, value in made.items()} if self._in_training else made

    def _options(self, capture: Capture | None, tokens: int) -> dict[str, Any]:
        """Return new transformer options: captures, and in training an attention function that autograd supports.

        Every cross-attention layer is replaced: it must see only the first ``tokens`` of the context.
        """
        options: dict[str, Any] = {}
        if self._in_training:
            options["optimized_attention_override"] = _differentiable_attention
        if capture is not None:
            cross = {_place(layer.name): _recorder(capture, "cross", layer.name, tokens) for layer in self.layers}
            self_ = {_place(name): _recorder(capture, "self", name) for name in capture.choice.propagate}
            options["patches_replace"] = {"attn2": cross, "attn1": self_}
        return options


def cell_of(vae: Any, usual: int = LATENT_CELL) -> int:
    """Return the pixels per side of a latent pixel; a VAE may not tell, or only for video."""
    ratio = getattr(vae, "downscale_ratio", usual)
    return ratio if isinstance(ratio, int) else usual


def cache_key_of(model: Any, vae: Any) -> tuple[object, Hashable] | None:
    """Return the model and a key of its state (LoRAs, VAE), or None with patches that cannot be compared."""
    options = {name: value for name, value in model.model_options.items() if value}
    others = [getattr(model, name, None) for name in ("object_patches", "injections", "hook_patches", "forced_hooks")]
    patcher = getattr(vae, "patcher", None)  # other packs' VAEs may have none
    if options or any(others) or patcher is None:
        return None
    return model.model, (str(model.patches_uuid), weakref.ref(patcher.model), str(patcher.patches_uuid))


def _place(name: str) -> tuple[str, int, int]:
    """Return the key of a layer such as "output.3.0" in ComfyUI's patches."""
    place, block, depth = name.split(".")
    return place, int(block), int(depth)


def _differentiable_attention(
    _function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, heads: int, **_others: Any
) -> Tensor:
    """Compute attention with PyTorch, whatever ComfyUI was started with; a Stable Diffusion UNet has no masks."""
    return attend(query, key, value, heads)


def _recorder(capture: Capture, attention_type: str, name: str, tokens: int | None = None) -> Callable[..., Tensor]:
    wanted = name in (capture.choice.read if attention_type == "cross" else capture.choice.propagate)

    def replacement(query: Tensor, keys: Tensor, values: Tensor, extra: dict[str, Any]) -> Tensor:
        if wanted:
            height, width = extra["activations_shape"][2:4]
            attention = Attention(query, keys, extra["n_heads"], int(height), int(width))
            maps = capture.maps_to_propagate(name) if attention_type == "self" else None
            if maps is not None:
                output, capture.propagated[name] = attend_and_propagate(attention, values, maps)
            capture.record(attention_type, name, attention)  # may end the pass
            if maps is not None:
                return output
        return attend(query, keys[:, :tokens], values[:, :tokens], extra["n_heads"])

    return replacement


def _context_dim(unet: UNetModel) -> int:
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            return int(module.transformer_blocks[0].attn2.to_k.weight.shape[1])
    raise SlimeError("This UNet has no cross-attention layers; load an SD1.x, SD2.x or SDXL checkpoint.")


def unet_layers(unet: UNetModel) -> tuple[Layer, ...]:
    """Return every transformer block of the UNet in the order it runs, with its stride."""
    layers: list[Layer] = []
    stride = 1
    places = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for place, number, block in ((place, *item) for place, blocks in places for item in enumerate(blocks)):
        for module in block:
            if isinstance(module, Downsample):
                stride *= 2
            elif isinstance(module, Upsample):
                stride //= 2
            elif isinstance(module, SpatialTransformer):
                depths = range(len(module.transformer_blocks))
                layers += (Layer(f"{place}.{number}.{depth}", stride) for depth in depths)
    return tuple(layers)
