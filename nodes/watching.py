"""Find parts in a picture while it is sampled: an own pass over what the sampler has come to.

The pass is of our text and our noise level, with fresh options: prompts, guidance, ControlNets and what other packs
patch into sampling stay out of it, and it leaves nothing behind.
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
from ..slime.backbones.joined import Joined
from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.images import resize_image, working_size
from ..slime.parts.maps import PartMaps
from ..slime.segment import segment
from ..slime.settings import SegmentSettings
from .comfy_flow import ComfyFlow
from .comfy_unet import ComfyUNet
from .common import clip_input, confidence_input, expert
from .connected import clip_vision_input, connected
from .loading import as_they_lie, checkpoint_patcher

KEY = "slime"  # of the models that are loaded together with the sampled one


class Watcher:
    """Embeddings with what looks for each of them: the sampled model, a vision encoder, or both together.

    Args:
        model, vae, clip, clip_vision: as they come; the VAE where a vision encoder looks and ComfyUI has no preview
            decoder (TAESD) for the model's latents, the CLIP for compact files.
        embeddings: one or several.
        min_confidence: pictures where the parts are less sure count as without them.

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
        # Masks of a latent are coarser than the edges that would be refined.
        self.settings = SegmentSettings(refine="off", min_confidence=min_confidence)
        self._eyes = _eyes_for(embeddings, model, vae, clip, clip_vision)
        self._eyes_of = partial(_eyes_for, embeddings, vae=vae, clip=clip, clip_vision=clip_vision)
        self.embeddings = [item.completed(eye) for item, eye in zip(embeddings, self._eyes, strict=True)]
        self._of_pixels = any(not isinstance(eye, ComfyUNet | ComfyFlow) for eye in self._eyes)
        self._preview = preview_decoder(model) if self._of_pixels else None
        if self._of_pixels and self._preview is None and vae is None:
            name = model.model.latent_format.taesd_decoder_name
            raise SlimeError(
                "A vision encoder looks at pixels: connect the VAE of the checkpoint"
                + (f", or put {name}.safetensors into ComfyUI's models/vae_approx." if name else ".")
            )
        self._beside = [clip_vision.patcher] if self._of_pixels else []
        self._beside += [vae.patcher] if self._of_pixels and self._preview is None else []

    def ready(self) -> Any:
        """The model, cloned, with what must lie on the device beside it."""
        clone = self.model.clone()
        if self._beside:
            clone.set_additional_models(KEY, [*clone.get_additional_models_with_key(KEY), *self._beside])
        return clone

    @torch.inference_mode()
    def look(self, denoised: Tensor, sampled: Any) -> list[PartMaps]:
        """Parts of every embeddings, as large as the decoded picture.

        Args:
            denoised: [B, C, h, w] or, of one frame, [B, C, 1, h, w], in the model's own scale.
            sampled: the model that is on the device: mostly the watched one, but guiders may take a copy of it.

        Raises:
            SlimeError: a video.
        """
        latents = denoised[:, :, 0] if denoised.ndim == 5 and denoised.shape[2] == 1 else denoised
        if latents.ndim != 4:
            raise SlimeError("Parts are found in pictures; this latent is a video or of another kind.")
        sampled.apply_hooks(None)  # the call before may have left the LoRAs of its hooks on the weights
        eyes = self._eyes if sampled.model is self.model.model else self._eyes_of(sampled)
        with as_they_lie():
            pixels = self._decoded(denoised) if self._of_pixels else None
            found: dict[int, PartMaps] = {}
            for eye in dict.fromkeys(eyes):
                mine = [index for index, one in enumerate(eyes) if one is eye]
                images, taken = _shown(eye, latents, pixels)
                items = [self.embeddings[index] for index in mine]
                maps = segment(eye, images, items, self.settings, on_batch=_interruptible, latents=taken)
                found |= dict(zip(mine, maps, strict=True))
        return [found[index] for index in range(len(eyes))]

    def _decoded(self, denoised: Tensor) -> Tensor:
        """Pixels [B, H, W, 3] on the CPU, image by image, by the preview decoder or the VAE's module: its own decode
        would load models."""
        if self._preview is not None:
            cells = (denoised[:, :, 0] if denoised.ndim == 5 else denoised).float().split(1)
            pixels = torch.cat([self._preview.decode(one).cpu() for one in cells])
            return ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)
        vae, found = self.vae, []
        for one in self.model.model.process_latent_out(denoised).split(1):
            one = one[:, :, 0] if one.ndim == 5 and vae.latent_dim == 2 else one
            decoded = vae.first_stage_model.decode(one.to(vae.device, vae.vae_dtype))
            decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded
            found.append(vae.process_output(decoded.float()).cpu().movedim(1, -1))
        return torch.cat(found)[..., :3]


def _wraps(module: Any, own: torch.nn.Module) -> bool:
    """Whether a module that stands for the checkpoint's own holds it, as compiled ones do."""
    return isinstance(module, torch.nn.Module) and any(inner is own for inner in module.modules())


def preview_decoder(model: Any) -> Any:
    """The small decoder (TAESD) of models/vae_approx that ComfyUI's previews take for this model's latents, on its
    device, a few MB; None where there is none, or one for videos."""
    kind = model.model.latent_format
    name = kind.taesd_decoder_name
    files = folder_paths.get_filename_list("vae_approx") if name and name not in VIDEO_TAES else []
    file = next((file for file in files if file.startswith(name)), None)
    if file is None:
        return None
    path = folder_paths.get_full_path("vae_approx", file)
    return TAESD(None, path, latent_channels=kind.latent_channels).to(model.load_device)


def watching_inputs() -> list[Any]:
    """What may look beside the sampled model, and when it counts."""
    return [
        io.Vae.Input(
            "vae", optional=True, tooltip="Needed where a vision encoder looks and there is no preview decoder (TAESD)."
        ),
        clip_vision_input(),
        clip_input(),
        expert(confidence_input()),
    ]


def step_of(sigma: Tensor, options: Mapping[str, Any]) -> tuple[int, int]:
    """Which step of sampling has this noise level, counted from 0, and how many there are."""
    sigmas = options["transformer_options"]["sample_sigmas"]
    now, steps = sigma.max().to(sigmas), len(sigmas) - 1
    rising = sigmas[0] < sigmas[-1]  # from a picture to its noise
    past = torch.where(rising, sigmas < now * (1 - 1e-4), sigmas > now * (1 + 1e-4))
    return min(int(past.sum()), steps - 1), steps  # the host waits once


def _eyes_for(items: Sequence[PartEmbeddings], model: Any, vae: Any, clip: Any, clip_vision: Any) -> list[Backbone]:
    made: dict[str, Backbone] = {}
    return [_eye_for(item, model, vae, clip, clip_vision, made) for item in items]


def _eye_for(
    item: PartEmbeddings, model: Any, vae: Any, clip: Any, clip_vision: Any, made: dict[str, Backbone]
) -> Backbone:
    """The model alone where the embeddings are of it, else the vision encoder, else both; made once each."""
    ways = {"model": (model, None), "encoder": (None, clip_vision), "both": (model, clip_vision)}
    first: SlimeError | None = None
    for name, (looks, encodes) in ways.items():
        if looks is None and encodes is None or name == "both" and encodes is None:
            continue
        if name not in made:
            made[name] = connected(looks, vae, clip, encodes)
        try:
            item.check_model(made[name])
            return made[name]
        except SlimeError as error:
            first = first or error
    assert first is not None
    raise first


def _shown(eye: Backbone, latents: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images [B, H, W, 3] and latents as this eye takes them."""
    if pixels is None or isinstance(eye, ComfyUNet | ComfyFlow):
        height, width = (cells * eye.info.cell for cells in latents.shape[2:])
        return torch.zeros(1, 1, 1, 1).expand(len(latents), height, width, 3), latents
    if isinstance(eye, Joined):
        size = working_size(pixels.shape[1], pixels.shape[2], eye.info.side, eye.info.multiple)
        return pixels, eye.encode_beside(latents, resize_image(pixels, size))
    return pixels, None


def _interruptible(_done: int, _total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
