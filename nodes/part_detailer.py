"""SLiMe Part Detailer: redraw small parts at the model's full resolution, region by region."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import numpy as np
import torch
from comfy_api.latest import io, ui
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from torch import Tensor

from ..slime.examples import check_known
from ..slime.parts.masks import MaskShape, shape_mask
from ..slime.parts.regions import Region, part_regions
from .common import SAMPLING, Parts, PartsSocket, advanced, named_errors, schema, split_names, to_core
from .part_outputs import crop_region


class SLiMePartDetailer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartDetailer",
            category=SAMPLING,
            is_output_node=True,
            display_name="SLiMe Part Detailer",
            description="Crops every region of the parts, redraws it at full resolution and pastes it back. Pixels "
            "outside the regions, as widened by grow and feather, do not change.",
            search_aliases="detailer, face detailer, fix hands, inpaint crop and stitch, upscale part",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment; its images are redrawn."),
                io.Model.Input("model", tooltip="The model that redraws; an inpainting model works too."),
                io.Vae.Input("vae", tooltip="The VAE of that model."),
                io.Conditioning.Input("positive", tooltip="Prompt for the parts."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.String.Input(
                    "names", default="", tooltip="Names of the parts to redraw, separated by commas. Empty = all parts."
                ),
                *_sampling_inputs(),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Longer side of the crop in pixels while it is redrawn: 512 for SD1.5, 1024 for SDXL. A "
                    "larger crop keeps its size and needs more memory.",
                ),
                io.Float.Input(
                    "crop_factor",
                    default=2.0,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Size of the crop relative to the region. Its surroundings help the model.",
                ),
                io.Int.Input(
                    "grow",
                    default=4,
                    min=-512,
                    max=512,
                    tooltip="Widen the regions by this many pixels; negative values shrink them.",
                ),
                io.Int.Input(
                    "feather", default=8, min=0, max=512, tooltip="Blur the border over about this many pixels."
                ),
                io.Boolean.Input(
                    "separate",
                    default=True,
                    tooltip="On: redraw every connected region separately. Off: all regions of a part at once.",
                ),
                advanced(
                    io.Int.Input(
                        "minimum_area",
                        default=16,
                        min=1,
                        max=1_000_000,
                        tooltip="Ignore connected regions with fewer pixels.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The images with their parts redrawn."),
                io.Mask.Output(display_name="mask", tooltip="The redrawn pixels, soft at the border."),
            ],
        )

    @classmethod
    def execute(
        cls,
        parts: Parts,
        model: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        names: str = "",
        seed: int = 0,
        steps: int = 20,
        cfg: float = 8.0,
        sampler_name: str = "euler",
        scheduler: str = "normal",
        denoise: float = 0.5,
        size: int = 512,
        crop_factor: float = 2.0,
        grow: int = 4,
        feather: int = 8,
        separate: bool = True,
        minimum_area: int = 16,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Part Detailer"):
            wanted = _wanted(parts, split_names(names))
        images = parts.images[..., :3].expand(*parts.images.shape[:3], 3).clone()  # three channels of grey ones
        redrawn_mask = torch.zeros(images.shape[:3])
        shape = MaskShape(grow=grow, feather=feather)
        sampling = _Sampling(model, vae, positive, negative, steps, cfg, sampler_name, scheduler, denoise)
        regions = list(_regions(parts, wanted, separate, minimum_area)) if denoise > 0 else []
        for number, (index, region) in enumerate(regions):
            comfy.model_management.throw_exception_if_processing_interrupted()
            mask = _region_mask(region, (images.shape[1], images.shape[2]), shape)
            if not mask.any():  # nothing left after shrinking
                continue
            top, left, bottom, right = _crop(mask, crop_factor)
            pixels, soft = images[index, top:bottom, left:right], mask[top:bottom, left:right]
            working = _working_size(pixels.shape[0], pixels.shape[1], size, max(8, vae.spacial_compression_encode()))
            redrawn = sampling.redraw(pixels, soft, working, (seed + number) % 2**64)
            weights = soft[..., None]
            pixels.copy_(torch.where(weights > 0, weights * redrawn + (1 - weights) * pixels, pixels))
            redrawn_mask[index] = torch.maximum(redrawn_mask[index], mask)
        return io.NodeOutput(to_core(images), to_core(redrawn_mask), ui=ui.PreviewImage(images, cls=cls))


@dataclass(frozen=True)
class _Sampling:
    """ComfyUI's sampling of a region, with its prompts."""

    model: Any
    vae: Any
    positive: Any
    negative: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def redraw(self, pixels: Tensor, mask: Tensor, size: tuple[int, int], seed: int) -> Tensor:
        """Redraw pixels [h, w, 3] inside the mask [h, w] at ``size``; return them at their own size."""
        shown, inside = _resized(pixels, size)[None], _resized(mask[..., None], size)[None, ..., 0]
        latent = self.vae.encode(shown)
        sampled = comfy.sample.sample(
            DifferentialDiffusion.execute(self.model).args[0],
            comfy.sample.prepare_noise(latent, seed),
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            *self._for_inpainting(shown, inside),
            latent,
            denoise=self.denoise,
            noise_mask=inside,
            callback=latent_preview.prepare_callback(self.model, self.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        decoded = self.vae.decode(sampled)
        decoded = decoded.reshape(-1, *decoded.shape[-3:])[0, ..., :3]  # the one frame of a video VAE
        return _resized(decoded.to(pixels), (pixels.shape[0], pixels.shape[1]))

    def _for_inpainting(self, pixels: Tensor, mask: Tensor) -> list[Any]:
        """Return both prompts with the entries that inpainting models need, as InpaintModelConditioning makes them.

        Other models ignore these.
        """
        hidden = (pixels - 0.5) * (1 - mask.round())[..., None] + 0.5
        more = {"concat_latent_image": self.vae.encode(hidden), "concat_mask": mask[:, None]}
        return [node_helpers.conditioning_set_values(cond, more) for cond in (self.positive, self.negative)]


def _wanted(parts: Parts, names: list[str]) -> set[int]:
    """Return the labels of the named parts, or of all if none is named.

    Raises:
        SlimeError: a name that was not learned.
    """
    check_known(names, parts.maps.names)
    return {label for label, name in enumerate(parts.maps.names, start=1) if not names or name in names}


def _regions(parts: Parts, wanted: set[int], separate: bool, minimum_area: int) -> Iterator[tuple[int, Region]]:
    """Yield the index of an image and a region of it, for all images."""
    for index, labels in enumerate(parts.maps.label_map.numpy()):
        for region in part_regions(labels, len(parts.maps.names), separate, minimum_area):
            if region.label in wanted:
                yield index, region


def _region_mask(region: Region, size: tuple[int, int], shape: MaskShape) -> Tensor:
    """Return a region's mask [H, W] on the whole image, exactly 0 where nothing may change."""
    mask = np.zeros(size, np.float32)
    mask[region.top : region.top + region.height, region.left : region.left + region.width] = region.mask
    soft = shape_mask(torch.from_numpy(mask), shape)
    return torch.where(soft < 1 / 255, 0.0, soft)


def _crop(mask: Tensor, factor: float) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the crop: the mask's box, enlarged."""
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    height, width = mask.shape
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = crop_region(box, factor, width, height)
    return top, left, bottom, right


def _working_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """Return height and width at which a crop is redrawn: ``size`` for the longer side, or about its own if larger."""
    scale = max(1.0, size / max(height, width)) / multiple
    return max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [H, W, C], bicubic, clamped to [0, 1]."""
    if tuple(pixels.shape[:2]) == size:
        return pixels
    moved = pixels.movedim(-1, 0)[None]
    return torch.nn.functional.interpolate(moved, size, mode="bicubic", antialias=True)[0].clamp(0, 1).movedim(0, -1)


def _sampling_inputs() -> list[Any]:
    """Return the widgets that KSampler has too."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Seed of the first region; each further region uses the next number.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps per region."),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance scale."),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."),
        io.Float.Input(
            "denoise",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much changes: 0.3 sharpens, 1 replaces everything, 0 = off.",
        ),
    ]
