"""Stable Diffusion UNets loaded by diffusers; needs the extra ``diffusers``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batches import batch_for
from ..errors import SlimeError
from .attention import Attention, attend
from .base import EndOfPass
from .layers import Layer
from .sd_unet import Family, SDUNet, family_for
from .text import Capture, Context

LATENT_CHANNELS, LATENT_CELL = 4, 8


class DiffusersUNet(SDUNet):
    """A Stable Diffusion 1.x, 2.x or XL pipeline of diffusers.

    Args:
        unet: UNet2DConditionModel with 4 input channels.
        vae: AutoencoderKL or AutoencoderTiny, or None where no images are encoded.
        tokenizers, text_encoders: one each, or two each for SDXL.
        scheduler: any scheduler of the checkpoint; gives the noise schedule and the prediction type.
        family: for a UNet of an unknown family.

    Raises:
        SlimeError: an inpainting UNet or an unknown prediction type.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        scheduler: Any,
        family: Family | None = None,
    ) -> None:
        if unet.config.in_channels != LATENT_CHANNELS:
            raise SlimeError(
                f"This UNet takes {unet.config.in_channels} input channels; SLiMe needs {LATENT_CHANNELS} "
                "(no inpainting UNets)."
            )
        predictions = {"epsilon": "eps", "v_prediction": "v"}
        prediction = scheduler.config.prediction_type
        if prediction not in predictions:
            raise SlimeError(f'Unknown prediction type "{prediction}"; SLiMe knows {", ".join(predictions)}.')
        self.unet, self.vae = unet, vae
        self.tokenizers, self.text_encoders = list(tokenizers), list(text_encoders)
        self._blocks = dict(transformer_blocks(unet))
        super().__init__(
            family or family_for(int(unet.config.cross_attention_dim), predictions[prediction]),
            predictions[prediction],
            [layer for layer, _ in self._blocks.values()],
            scheduler.alphas_cumprod,
            next(unet.parameters()).device,
            LATENT_CHANNELS,
            2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else LATENT_CELL,
        )

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> DiffusersUNet:
        """Make a backbone from a StableDiffusionPipeline or StableDiffusionXLPipeline."""
        second = getattr(pipeline, "text_encoder_2", None)
        tokenizers = [pipeline.tokenizer] + ([pipeline.tokenizer_2] if second is not None else [])
        encoders = [pipeline.text_encoder] + ([second] if second is not None else [])
        return cls(pipeline.unet, pipeline.vae, tokenizers, encoders, pipeline.scheduler)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        parameter = next(self.vae.parameters())
        pixels = images.movedim(-1, 1).to(parameter.device, parameter.dtype) * 2 - 1
        encoded = self.vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents.float() * self.vae.config.scaling_factor).to(self.device)

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Context:
        tokens, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            if len(self.text_encoders) == 1:
                tokens.append(output.last_hidden_state)
            else:
                tokens.append(output.hidden_states[-2])
                pooled = output.text_embeds[0].float().cpu() if hasattr(output, "text_embeds") else pooled
        return Context(torch.cat(tokens, -1)[0].float().cpu(), pooled)

    def predict_noise(self, noisy: Tensor, timestep: int, context: Context, capture: Capture | None) -> Tensor | None:
        batch, dtype = noisy.shape[0], next(self.unet.parameters()).dtype
        tokens = context.for_batch(batch).to(self.device, dtype)
        added = None
        if context.pooled is not None:
            height, width = (side * self.info.cell for side in noisy.shape[2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=dtype)
            pooled = context.pooled.to(self.device, dtype)[None]
            added = {"text_embeds": pooled.expand(batch, -1), "time_ids": sizes.expand(batch, -1)}
        with self._recording(capture, (noisy.shape[2], noisy.shape[3]), len(context)):
            try:
                output = self.unet(
                    noisy.to(self.device, dtype), timestep, encoder_hidden_states=tokens, added_cond_kwargs=added
                ).sample.float()
            except EndOfPass:
                return None
        if self.prediction == "eps":
            result: Tensor = output
            return result
        abar = self.alphas_cumprod[timestep].float().to(self.device)
        return abar.sqrt() * output + (1 - abar).sqrt() * noisy.to(self.device)

    def fitting_batch(self, size: tuple[int, int]) -> int:
        # An upper estimate of a UNet's activations: 1 KB per latent pixel and base channel.
        return batch_for(self.device, size[0] * size[1] * self.unet.config.block_out_channels[0] * 1024)

    @contextmanager
    def differentiable(self, checkpointing: bool) -> Iterator[None]:
        trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        before = self.unet.is_gradient_checkpointing
        try:
            if checkpointing:
                self.unet.enable_gradient_checkpointing()
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            if checkpointing and not before:
                self.unet.disable_gradient_checkpointing()
            for parameter in trained:
                parameter.requires_grad_(True)

    @contextmanager
    def _recording(self, capture: Capture | None, latent_size: tuple[int, int], tokens: int) -> Iterator[None]:
        """Set recording processors on the chosen self-attention modules and on every cross-attention module, which sees
        only the first ``tokens`` of the context; restore the old ones afterwards."""
        if capture is None:
            yield
            return
        undo = []
        wanted = [("cross", name) for name in self._blocks] + [("self", name) for name in capture.choice.propagate]
        try:
            for attention_type, name in wanted:
                layer, block = self._blocks[name]
                module = block.attn2 if attention_type == "cross" else block.attn1
                undo.append((module, module.processor))
                size = (-(-latent_size[0] // layer.stride), -(-latent_size[1] // layer.stride))
                module.processor = _RecordingProcessor(capture, attention_type, name, size, tokens)
            yield
        finally:
            for module, processor in reversed(undo):
                module.processor = processor


class _RecordingProcessor:
    """diffusers' AttnProcessor2_0 for the layers of Stable Diffusion that records queries and keys."""

    def __init__(self, capture: Capture, attention_type: str, name: str, size: tuple[int, int], tokens: int) -> None:
        self.capture, self.attention_type, self.name, self.size = capture, attention_type, name, size
        self.tokens = tokens if attention_type == "cross" else None
        self.wanted = name in (capture.choice.read if attention_type == "cross" else capture.choice.propagate)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if self.wanted:
            self.capture.record(self.attention_type, self.name, Attention(query, key, attn.heads, *self.size))
        out = attend(query, key[:, : self.tokens], value[:, : self.tokens], attn.heads)
        result: Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def transformer_blocks(unet: Any) -> Iterator[tuple[str, tuple[Layer, Any]]]:
    """Yield every transformer block by ComfyUI's name for it, in the order it runs, with its stride."""
    per_level = unet.config.layers_per_block
    blocks = (per_level if isinstance(per_level, int) else per_level[0]) + 1  # and a resampling one
    last = len(unet.down_blocks) - 1
    places = [
        *(("input", 1 + level * blocks, 2**level, block) for level, block in enumerate(unet.down_blocks)),
        ("middle", 0, 2**last, unet.mid_block),
        *(("output", level * blocks, 2 ** (last - level), block) for level, block in enumerate(unet.up_blocks)),
    ]
    for place, first, stride, block in places:
        for number, transformer in enumerate(getattr(block, "attentions", ()), start=first):
            for depth, module in enumerate(transformer.transformer_blocks):
                name = f"{place}.{number}.{depth}"
                yield name, (Layer(name, stride), module)
