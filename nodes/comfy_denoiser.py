"""ComfyUI's loaded MODEL, VAE and CLIP as a :class:`slime.denoiser.Denoiser`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from torch import Tensor

from ..slime.attention import attend_and_propagate
from ..slime.denoiser import Attention, Capture, CaptureComplete, Context, batch_for
from ..slime.errors import SlimeError
from ..slime.layers import AttentionLayer, Family, LayerKey, family_for
from .autograd import trainable

TIMESTEPS = 1000
CPU_BATCH = 4
TRAINING_MEMORY = 4  # a training step holds several times what ComfyUI estimates for sampling


class ComfyDenoiser:
    """Adapter of one ComfyUI model patcher; keeps nothing of its own on the GPU.

    Raises:
        SlimeError: not a Stable Diffusion UNet, an inpainting UNet, or an unusual noise schedule.
    """

    def __init__(self, model: Any, vae: Any = None, clip: Any = None) -> None:
        self.model, self.vae, self.clip = model, vae, clip
        base = model.model
        unet = getattr(base, "diffusion_model", None)
        if not isinstance(unet, UNetModel):
            raise SlimeError(
                f"SLiMe reads the cross-attention of Stable Diffusion UNets (SD1.x, SD2.x, SDXL); "
                f"{type(base).__name__} is another kind of model. Load an SD checkpoint."
            )
        channels = int(unet.input_blocks[0][0].weight.shape[1])
        if channels != 4:
            raise SlimeError(
                f"This UNet takes {channels} input channels, as inpainting and editing checkpoints do. SLiMe needs a "
                "plain text-to-image checkpoint with 4: learn and segment with one, inpaint with this one."
            )
        self.sampling = model.get_model_object("model_sampling")
        sigmas = getattr(self.sampling, "sigmas", None)
        if sigmas is None or len(sigmas) != TIMESTEPS:
            raise SlimeError(f"SLiMe needs the usual noise schedule of {TIMESTEPS} steps; remove the sampling patch.")
        velocity = isinstance(self.sampling, comfy.model_sampling.V_PREDICTION)
        self.prediction = "v" if velocity else "eps"
        self.layers = attention_layers(unet)
        self.family: Family = family_for(_context_dim(unet), self.prediction)
        self.device: torch.device = model.load_device
        self.alphas_cumprod: Tensor = 1 / (1 + sigmas.detach().double().cpu() ** 2)
        self._lent = False

    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise SlimeError("Connect the VAE of the checkpoint.")
        latents = self.vae.encode(images[..., :3])
        if latents.ndim != 4 or latents.shape[1] != 4:
            raise SlimeError(
                f"This VAE gives latents of shape {list(latents.shape)}, the model needs 4 channels: connect the "
                "VAE of the same checkpoint."
            )
        return self.model.model.process_latent_in(latents.to(self.device, torch.float32))

    def encode_prompt(self, prompt: str) -> Context:
        if self.clip is None:
            raise SlimeError("Connect a CLIP: these embeddings come without their text context.")
        rows, pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)
        if rows.shape[-1] != self.family.context_dim:
            raise SlimeError(
                f"This CLIP gives text rows {rows.shape[-1]} wide, the model needs {self.family.context_dim}: connect "
                "the CLIP of the same checkpoint as the model."
            )
        needs_pooled = self.model.model.adm_channels > 0
        return Context(rows[0].float().cpu(), pooled[0].float().cpu() if needs_pooled else None)

    def predict_noise(
        self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None, image_size: tuple[int, int]
    ) -> Tensor | None:
        if not self._lent:
            memory = self.model.memory_required([noisy.shape[0], *noisy.shape[1:]])
            comfy.model_management.load_models_gpu([self.model], memory_required=memory)
        batch = noisy.shape[0]
        abar = float(self.alphas_cumprod[timestep])
        sigma = ((1 - abar) / abar) ** 0.5
        # ComfyUI's x is z + sigma * eps (variance exploding).
        x = noisy.to(self.device) / abar**0.5
        rows = context.for_batch(batch).to(self.device)
        arguments = self._extra_arguments(context, x, image_size)
        try:
            denoised = self.model.model.apply_model(
                x,
                torch.full((batch,), sigma, device=self.device),
                c_crossattn=rows,
                transformer_options=self._options(capture, context.tokens),
                **arguments,
            )
        except CaptureComplete:
            return None
        return (x - denoised) / sigma

    def fitting_batch(self, latent_size: tuple[int, int]) -> int:
        if self.device.type == "cpu":
            return CPU_BATCH
        free = comfy.model_management.get_free_memory(self.device)
        return batch_for(float(free), float(self.model.memory_required([1, 4, *latent_size])))

    def differentiable(self, checkpointing: bool) -> AbstractContextManager[None]:
        return self._lend(checkpointing)

    @contextmanager
    def _lend(self, checkpointing: bool) -> Iterator[None]:
        side = self.family.working_side // 8
        memory = TRAINING_MEMORY * self.model.memory_required([1, 4, side, side])
        comfy.model_management.load_models_gpu([self.model], memory_required=memory, force_full_load=True)
        self._lent = True
        try:
            with trainable(self.model, checkpointing):
                yield
        finally:
            self._lent = False

    def _extra_arguments(self, context: Context, latents: Tensor, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """SDXL's size and pooled text conditioning, made by the model itself; nothing for SD1.x and SD2.x."""
        if context.pooled is None:
            return {}
        height, width = image_size
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
        return {name: value.clone() for name, value in made.items()} if self._lent else made

    def _options(self, capture: Capture | None, tokens: int) -> dict[str, Any]:
        """Fresh transformer options: captures, and in training an attention function that autograd knows.

        Every cross-attention layer is replaced where some must see only the first ``tokens`` of the context.
        """
        options: dict[str, Any] = {}
        if self._lent:
            options["optimized_attention_override"] = _differentiable_attention
        if capture is not None:
            cross = {tuple(layer.key): _recorder(capture, "cross", layer.key, tokens) for layer in self.layers}
            self_ = {tuple(key): _recorder(capture, "self", key) for key in capture.choice.self_}
            options["patches_replace"] = {"attn2": cross, "attn1": self_}
        return options


def _differentiable_attention(_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def _recorder(capture: Capture, kind: str, key: LayerKey, tokens: int | None = None) -> Callable[..., Tensor]:
    wanted = key in (capture.choice.cross if kind == "cross" else capture.choice.self_)

    def replacement(query: Tensor, keys: Tensor, values: Tensor, extra: dict[str, Any]) -> Tensor:
        if wanted:
            height, width = extra["activations_shape"][2:4]
            attention = Attention(query, keys, extra["n_heads"], int(height), int(width))
            maps = capture.to_propagate(key) if kind == "self" else None
            if maps is not None:
                output, capture.propagated[key] = attend_and_propagate(attention, values, maps)
            capture.record(kind, key, attention)  # may end the pass
            if maps is not None:
                return output
        return attention_pytorch(query, keys[:, :tokens], values[:, :tokens], extra["n_heads"])

    return replacement


def _context_dim(unet: UNetModel) -> int:
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            return int(module.transformer_blocks[0].attn2.to_k.weight.shape[1])
    raise SlimeError("This UNet has no cross-attention layers; load an SD1.x, SD2.x or SDXL checkpoint.")


def attention_layers(unet: UNetModel) -> tuple[AttentionLayer, ...]:
    """Every transformer block of the UNet in the order it runs, with its resolution."""
    layers: list[AttentionLayer] = []
    scale = 1

    def visit(place: str, number: int, block: Any) -> None:
        nonlocal scale
        for module in block:
            if isinstance(module, Downsample):
                scale *= 2
            elif isinstance(module, Upsample):
                scale //= 2
            elif isinstance(module, SpatialTransformer):
                layers.extend(
                    AttentionLayer(LayerKey(place, number, depth), scale)
                    for depth in range(len(module.transformer_blocks))
                )

    for number, block in enumerate(unet.input_blocks):
        visit("input", number, block)
    visit("middle", 0, unet.middle_block)
    for number, block in enumerate(unet.output_blocks):
        visit("output", number, block)
    return tuple(layers)
