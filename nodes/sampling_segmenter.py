"""Segment an image while it is sampled, by a separate pass over the denoised latent of the current step.

The pass uses SLiMe's own prompt and noise level and new model options: the user's prompts, guidance, ControlNets and
patches of other packs have no effect on it, and it changes no state of the sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.taesd.taesd import TAESD
from comfy_api.latest import io
from latent_preview import VIDEO_TAES
from torch import Tensor

from ..slime.backbones.base import Backbone
from ..slime.backbones.fused import FusedBackbone
from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.images import resize_image, working_size
from ..slime.parts.maps import PartMaps
from ..slime.segment import segment
from ..slime.settings import SegmentSettings
from .backbones import build_backbone, clip_vision_input, takes_latents
from .common import advanced, clip_input, confidence_input
from .loading import checkpoint_patcher, without_loading

KEY = "slime"  # of the models that are loaded together with the sampled one


class SamplingSegmenter:
    """Embeddings, each with a backbone: the sampled model, a vision encoder, or both fused.

    Args:
        model, vae, clip, clip_vision: of the sockets. The VAE is needed for a vision encoder if ComfyUI has no preview
            decoder (TAESD) for the model's latents, the CLIP for embeddings in the compact form.
        embeddings: one or several.
        min_confidence: see :class:`slime.settings.SegmentSettings`.

    Raises:
        SlimeError: nothing connected fits the embeddings, another node replaced the model, or a VAE is needed.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        clip: Any,
        clip_vision: Any,
        embeddings: Sequence[PartEmbeddings],
        min_confidence: float = 0.0,
    ) -> None:
        replaced = model.object_patches.get("diffusion_model")
        if replaced is not None and not _wraps(replaced, checkpoint_patcher(model).get_model_object("diffusion_model")):
            raise SlimeError(
                "Another node replaced this model as a whole (TensorRT and the like), so that its own weights are not "
                "loaded while it samples. Connect the model as it is before that node."
            )
        self.model, self.vae = model, vae
        # Masks at latent size are coarser than the edges that refinement would follow.
        self.settings = SegmentSettings(refine="off", min_confidence=min_confidence)
        self._backbones = _backbones_for(embeddings, model, vae, clip, clip_vision)
        self._backbones_of = partial(_backbones_for, embeddings, vae=vae, clip=clip, clip_vision=clip_vision)
        pairs = zip(embeddings, self._backbones, strict=True)
        self.embeddings = [item.completed(backbone) for item, backbone in pairs]
        self._needs_pixels = not all(takes_latents(backbone) for backbone in self._backbones)
        self._preview = preview_decoder(model) if self._needs_pixels else None
        if self._needs_pixels and self._preview is None and vae is None:
            name = model.model.latent_format.taesd_decoder_name
            raise SlimeError(
                "A vision encoder needs pixels: connect the VAE of the checkpoint"
                + (f", or put {name}.safetensors into ComfyUI's models/vae_approx." if name else ".")
            )
        self._beside = [getattr(clip_vision, "patcher", clip_vision)] if self._needs_pixels else []
        self._beside += [vae.patcher] if self._needs_pixels and self._preview is None else []

    def model_to_sample(self) -> Any:
        """Return a clone of the model with the further models that must be loaded with it."""
        clone = self.model.clone()
        if self._beside:
            clone.set_additional_models(KEY, [*clone.get_additional_models_with_key(KEY), *self._beside])
        return clone

    @torch.inference_mode()
    def segment(self, denoised: Tensor, sampled: Any) -> list[PartMaps]:
        """Segment a denoised latent for each of the embeddings, at the size of the decoded image.

        Args:
            denoised: [B, C, h, w] or, of one frame, [B, C, 1, h, w], in the model's own scale.
            sampled: the loaded model: usually that of the socket, but guiders may use a copy.

        Raises:
            SlimeError: a video.
        """
        latents = denoised[:, :, 0] if denoised.ndim == 5 and denoised.shape[2] == 1 else denoised
        if latents.ndim != 4:
            raise SlimeError(
                "This latent is a video, or not one of images. SLiMe segments images while they are sampled."
            )
        sampled.apply_hooks(None)  # the call before may have left LoRAs of hooks on the weights
        backbones = self._backbones if sampled.model is self.model.model else self._backbones_of(sampled)
        with without_loading():
            pixels = self._decoded(denoised) if self._needs_pixels else None
            results: dict[int, PartMaps] = {}
            for backbone in dict.fromkeys(backbones):
                indices = [index for index, one in enumerate(backbones) if one is backbone]
                images, encoded = _inputs_of(backbone, latents, pixels)
                items = [self.embeddings[index] for index in indices]
                maps = segment(backbone, images, items, self.settings, on_batch=_check_interrupt, latents=encoded)
                results |= dict(zip(indices, maps, strict=True))
        return [results[index] for index in range(len(backbones))]

    def _decoded(self, denoised: Tensor) -> Tensor:
        """Decode pixels [B, H, W, 3] to the CPU, image by image, with the preview decoder or the VAE's module.

        The VAE's own decode would load models.
        """
        if self._preview is not None:
            latents = (denoised[:, :, 0] if denoised.ndim == 5 else denoised).float().split(1)
            pixels = torch.cat([self._preview.decode(latent).cpu() for latent in latents])
            return ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)
        vae, images = self.vae, []
        for latent in self.model.model.process_latent_out(denoised).split(1):
            latent = latent[:, :, 0] if latent.ndim == 5 and vae.latent_dim == 2 else latent
            decoded = vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype))
            decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded
            images.append(vae.process_output(decoded.float()).cpu().movedim(1, -1))
        return torch.cat(images)[..., :3]


def _wraps(module: Any, own: torch.nn.Module) -> bool:
    """Return whether a module in place of the checkpoint's own contains it, as compiled ones do."""
    return isinstance(module, torch.nn.Module) and any(inner is own for inner in module.modules())


def preview_decoder(model: Any) -> Any:
    """Load the small decoder (TAESD, a few MB) of models/vae_approx that ComfyUI's previews use for this model.

    None if there is none, or only one for videos.
    """
    latent_format = model.model.latent_format
    name = latent_format.taesd_decoder_name
    files = folder_paths.get_filename_list("vae_approx") if name and name not in VIDEO_TAES else []
    file = next((file for file in files if file.startswith(name)), None)
    if file is None:
        return None
    path = folder_paths.get_full_path("vae_approx", file)
    return TAESD(None, path, latent_channels=latent_format.latent_channels).to(model.load_device)


def segmenter_inputs() -> list[Any]:
    """Return the sockets of the models that may segment besides the sampled one, and min_confidence."""
    return [
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Needed with clip_vision, unless a TAESD preview decoder for this model is in models/vae_approx.",
        ),
        clip_vision_input(
            "The vision encoder or SAM3 MODEL that the embeddings were trained with, if any. Whether it is used alone "
            "or with the model follows from the embeddings."
        ),
        clip_input(),
        advanced(confidence_input()),
    ]


def current_step(sigma: Tensor, options: Mapping[str, Any]) -> tuple[int, int]:
    """Return the index of the step with this noise level, and the number of steps."""
    sigmas = options["transformer_options"]["sample_sigmas"]
    now, steps = sigma.max().to(sigmas), len(sigmas) - 1
    rising = sigmas[0] < sigmas[-1]  # unsampling
    past = torch.where(rising, sigmas < now * (1 - 1e-4), sigmas > now * (1 + 1e-4))
    return min(int(past.sum()), steps - 1), steps  # one host sync


def _backbones_for(
    items: Sequence[PartEmbeddings], model: Any, vae: Any, clip: Any, clip_vision: Any
) -> list[Backbone]:
    made: dict[str, Backbone] = {}
    return [_backbone_for(item, model, vae, clip, clip_vision, made) for item in items]


def _backbone_for(
    item: PartEmbeddings, model: Any, vae: Any, clip: Any, clip_vision: Any, made: dict[str, Backbone]
) -> Backbone:
    """Return the model alone if the embeddings fit it, else the vision encoder, else both fused; each built once."""
    ways = {"model": (model, None), "encoder": (None, clip_vision), "both": (model, clip_vision)}
    first: SlimeError | None = None
    for name, (diffusion, encoder) in ways.items():
        if diffusion is None and encoder is None or name == "both" and encoder is None:
            continue
        if name not in made:
            made[name] = build_backbone(diffusion, vae, clip, encoder)
        try:
            item.check_model(made[name])
            return made[name]
        except SlimeError as error:
            first = first or error
    assert first is not None
    raise first


def _inputs_of(backbone: Backbone, latents: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return images [B, H, W, 3] and encoded images as this backbone takes them."""
    if pixels is None or takes_latents(backbone):
        height, width = (side * backbone.info.cell for side in latents.shape[2:])
        return torch.zeros(1, 1, 1, 1).expand(len(latents), height, width, 3), latents
    if isinstance(backbone, FusedBackbone):
        size = working_size(pixels.shape[1], pixels.shape[2], backbone.info.side, backbone.info.multiple)
        return pixels, backbone.encode_beside(latents, resize_image(pixels, size))
    return pixels, None


def _check_interrupt(_done: int, _total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
