"""SLiMe Part Prompt, Part Guider and Guider Masks: prompts for trained parts, applied during sampling."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.parts.maps import PartMaps
from ..slime.parts.masks import MaskShape, part_masks
from .common import SAMPLING, EmbeddingsSocket, named_errors, schema, split_names, to_core
from .sampling_segmenter import SamplingSegmenter, current_step, segmenter_inputs

logger = logging.getLogger(__name__)

PartPromptsSocket = io.Custom("SLIME_PART_PROMPTS")
# Entries of a conditioning that concern the whole image: they apply in the parts too.
WHOLE_IMAGE = ("control", "reference_latents", "concat_latent_image", "concat_mask", "guidance")
RESIDUAL = 1e-4  # least weight of the image's conditioning, so that it applies where a part's own does not


@dataclass(frozen=True)
class PartPrompt:
    """A conditioning for parts; it replaces the image's by ``strength`` (0..1) inside their mask, made with
    ``shape``."""

    embeddings: PartEmbeddings
    names: tuple[str, ...]
    conditioning: Any
    strength: float
    shape: MaskShape

    def mask(self, maps: PartMaps) -> Tensor:
        """Return the mask [B, H, W] of its parts; empty if none of them was learned."""
        known = [name for name in self.names if name in maps.names]
        if self.names and not known:
            return torch.zeros(len(maps), *maps.size)
        return part_masks(maps, known, shape=self.shape)


class SLiMePartPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartPrompt",
            category=SAMPLING,
            display_name="SLiMe Part Prompt",
            description="A prompt for trained parts only, applied during sampling. For SLiMe Part Guider.",
            search_aliases="regional prompt, part prompt, attention mask prompt, prompt for a part",
            inputs=[
                EmbeddingsSocket.Input("embeddings", tooltip="From SLiMe Train or Load SLiMe Embeddings."),
                io.Conditioning.Input("conditioning", tooltip="Prompt for the parts."),
                io.String.Input(
                    "names",
                    default="",
                    tooltip="Names of the parts it applies to, separated by commas. Empty = all parts.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much it replaces the image's own prompt inside the parts; 0 = off.",
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=-512,
                    max=512,
                    tooltip="Widen the parts by this many pixels; negative values shrink them.",
                ),
                io.Int.Input(
                    "feather", default=8, min=0, max=512, tooltip="Blur the border over about this many pixels."
                ),
                PartPromptsSocket.Input(
                    "previous", optional=True, tooltip="Further part prompts, which apply as well."
                ),
            ],
            outputs=[PartPromptsSocket.Output(display_name="part_prompts", tooltip="For SLiMe Part Guider.")],
        )

    @classmethod
    def execute(
        cls,
        embeddings: PartEmbeddings,
        conditioning: Any,
        names: str = "",
        strength: float = 1.0,
        grow: int = 8,
        feather: int = 8,
        previous: tuple[PartPrompt, ...] = (),
    ) -> io.NodeOutput:
        wanted = tuple(split_names(names))
        unknown = [name for name in wanted if name not in embeddings.names]
        if unknown:
            logger.warning(
                "SLiMe Part Prompt: there is no part %s. The trained parts are: %s.",
                ", ".join(unknown),
                ", ".join(embeddings.names),
            )
        shape = MaskShape(grow=grow, feather=feather)
        return io.NodeOutput((*(previous or ()), PartPrompt(embeddings, wanted, conditioning, strength, shape)))


class PartGuider(comfy.samplers.CFGGuider):
    """ComfyUI's CFG guidance with part prompts.

    From a share of the steps on, the last denoised image is segmented, and inside a part its conditioning replaces the
    positive one. These are ordinary masked conditionings, so ControlNets and hooks work as usual; entries for the whole
    image (``WHOLE_IMAGE``) apply in the parts too. Where no part is found, sampling is exactly that of plain guidance.

    Attributes:
        count: number of part prompts.
        used: masks [B, H, W] of the last sampling, one per prompt.
    """

    def __init__(
        self, segmenter: SamplingSegmenter, prompts: Sequence[PartPrompt], span: tuple[float, float], every: int
    ) -> None:
        super().__init__(segmenter.model_to_sample())
        self._segmenter, self._span, self._every = segmenter, span, every
        self.count = len(prompts)
        self._prompts = {index: prompt for index, prompt in enumerate(prompts) if prompt.strength > 0}
        self.used: list[Tensor] = []
        self._denoised: Tensor | None = None
        self._masks: dict[int, Tensor] = {}  # at latent size, times strength; of the prompts whose parts were found
        self._size: torch.Size | None = None  # of the masks
        self._segmented_at: int | None = None
        self._active = False

    def set_prompts(self, positive: Any, negative: Any) -> None:
        """Set the conditionings of the whole image, and prepare those of the parts with them."""
        whole: dict[str, Any] = next((more for _, more in positive if "area" not in more and "mask" not in more), {})
        shared = {name: whole[name] for name in WHOLE_IMAGE if name in whole}
        parts = {
            _key(index): _part_conditioning(prompt.conditioning, shared) for index, prompt in self._prompts.items()
        }
        self.inner_set_conds({"positive": positive, "negative": negative} | parts)

    def sample(self, *args: Any, **named: Any) -> Any:
        self._reset()
        self.used = []
        try:
            return super().sample(*args, **named)
        finally:
            self._reset()

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        options = model_options or {}
        if self._prompts:
            self._update_masks(x, timestep, options)
        masks = self._masks if self._active else {}
        parts = [(self.conds[_key(index)], mask) for index, mask in masks.items()]
        positive = self.conds.get("positive")
        positive = _masked(positive, parts, x) if parts else positive
        negative = self.conds.get("negative")
        with _without_easycache(parts, options):
            denoised: Tensor = comfy.samplers.sampling_function(
                self.inner_model, x, timestep, negative, positive, self.cfg, model_options=options, seed=seed
            )
        self._denoised = denoised if self._prompts else None
        return denoised

    def _reset(self) -> None:
        self._denoised, self._masks, self._size, self._segmented_at, self._active = None, {}, None, None, False

    def _update_masks(self, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        """Segment the last denoised image if it is due: at the first step of the range, then every few steps."""
        step, steps = current_step(sigma, options)
        self._active = self._span[0] <= step / steps < self._span[1] and self._denoised is not None
        due = self._segmented_at is None or (self._every > 0 and step >= self._segmented_at + self._every)
        if self._active and due:
            self._segmented_at = step
            assert self._denoised is not None
            with named_errors("SLiMe Part Guider"):
                several = self._segmenter.segment(self._denoised, self.model_patcher)
            masks = [prompt.mask(maps) for prompt, maps in zip(self._prompts.values(), several, strict=True)]
            by_prompt = dict(zip(self._prompts, masks, strict=True))
            self.used = [by_prompt.get(index, torch.zeros_like(masks[0])) for index in range(self.count)]
            self._size = None
        if self._active and self._size != x.shape[-2:]:  # a sampler may continue at another size
            self._size = x.shape[-2:]
            small = {
                index: prompt.strength * at_latent_size(self.used[index], x) for index, prompt in self._prompts.items()
            }
            self._masks = {index: mask for index, mask in small.items() if bool(mask.any())}


def used_masks(guider: Any, sampled: Tensor) -> list[Tensor]:
    """Return one mask [B, H, W] per part prompt; empty ones if the parts were never looked for.

    Raises:
        SlimeError: another kind of guider.
    """
    if not isinstance(guider, PartGuider):
        raise SlimeError(f"The guider is a {type(guider).__name__}, which has no masks. Connect SLiMe Part Guider.")
    cell = getattr(guider.model_patcher.model.latent_format, "spacial_downscale_ratio", 8)  # missing in older cores
    height, width = (cell * side for side in sampled.shape[-2:])
    return guider.used or [torch.zeros(len(sampled), height, width)] * max(1, guider.count)


@contextmanager
def _without_easycache(parts: Sequence[tuple[Any, Tensor]], options: dict[str, Any]) -> Iterator[None]:
    """Disable ComfyUI's EasyCache for a step with the conditioning of a new part.

    It reuses the last output of every conditioning, and older cores fail if there is none.
    """
    cache = options.get("transformer_options", {}).get("easycache")
    known = getattr(cache, "uuid_cache_diffs", None)
    if known is None or all(cond["uuid"] in known for conds, _ in parts for cond in conds):
        yield
        return
    kept, cache.reuse_threshold = cache.reuse_threshold, 0.0
    try:
        yield
    finally:
        cache.reuse_threshold = kept


def _key(index: int) -> str:
    return f"part prompt {index}"


def _part_conditioning(conditioning: Any, shared: dict[str, Any]) -> list[list[Any]]:
    """Add shared entries of the image's conditioning to a part's, where it lacks them.

    An area, or bounds of a mask, would crop what the part's mask has to cover; they are dropped.
    """
    return [
        [tokens, shared | {name: value for name, value in more.items() if name not in ("area", "set_area_to_bounds")}]
        for tokens, more in conditioning
    ]


def at_latent_size(mask: Tensor, x: Tensor) -> Tensor:
    """Average a mask [B, H, W] down to [B, h, w], or [B, 1, h, w] for latents with frames, on the latent's device."""
    small = torch.nn.functional.interpolate(mask[:, None], x.shape[-2:], mode="area")
    return (small if x.ndim == 5 else small[:, 0]).to(x.device)


def _masked(positive: Any, parts: Sequence[tuple[Any, Tensor]], x: Tensor) -> list[dict[str, Any]]:
    """Return the positive conditionings masked to outside the parts, and the parts' own masked to inside.

    The former keep a residual weight everywhere, so that they apply where a part's own mask or range of steps excludes
    its conditioning.
    """
    rest = (1 - torch.stack([mask for _, mask in parts]).sum(0)).clamp(min=RESIDUAL)
    return [_restrict(cond, rest, x) for cond in positive] + [
        _restrict(cond, mask, x) for conds, mask in parts for cond in conds
    ]


def _restrict(cond: dict[str, Any], mask: Tensor, x: Tensor) -> dict[str, Any]:
    own = cond.get("mask")
    if own is None:
        return cond | {"mask": mask * _soft_area(cond["area"], x) if "area" in cond else mask}
    own = own[: len(mask)].to(mask)  # ComfyUI repeats a batch of masks for a batch of latents likewise
    return cond | {"mask": mask * own.repeat(len(mask) // len(own), *[1] * (own.ndim - 1))}


def _soft_area(area: Sequence[int], x: Tensor) -> Tensor:
    """Return an area [h, w, y, x] as a mask with ComfyUI's soft border, which it leaves out where there is a mask."""
    bare: dict[str, Any] = {"area": area, "model_conds": {}, "uuid": None}
    inside = comfy.samplers.get_area_and_mult(bare, x, x.new_zeros(1))
    sides = len(inside.area) // 2
    window = tuple(slice(at, at + length) for length, at in zip(inside.area[:sides], inside.area[sides:], strict=True))
    mask = torch.zeros_like(x[:, 0])
    mask[(slice(None), *window)] = inside.mult[:, 0]
    return mask


class SLiMePartGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartGuider",
            category=SAMPLING,
            display_name="SLiMe Part Guider",
            description="Guidance for SamplerCustomAdvanced that finds trained parts during sampling, and applies a "
            "prompt of its own to each of them.",
            search_aliases="guider, regional prompt, part prompt, CFGGuider, part latent mask",
            inputs=[
                io.Model.Input("model", tooltip="The model that samples, and by default finds the parts."),
                io.Conditioning.Input("positive", tooltip="Prompt of the whole image."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                PartPromptsSocket.Input("part_prompts", tooltip="From SLiMe Part Prompt."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance scale."
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps, 0 to 1, after which the parts are found and their prompts apply; "
                    "never in the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps, 0 to 1, after which the image's own prompt applies everywhere again.",
                ),
                io.Int.Input(
                    "update_every",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="Find the parts again after this many steps; 0 = only once.",
                ),
                *segmenter_inputs(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        part_prompts: tuple[PartPrompt, ...],
        cfg: float = 8.0,
        start_percent: float = 0.2,
        end_percent: float = 1.0,
        update_every: int = 4,
        vae: Any = None,
        clip_vision: Any = None,
        clip: Any = None,
        min_confidence: float = 0.0,
    ) -> io.NodeOutput:
        wanted = [prompt.embeddings for prompt in part_prompts if prompt.strength > 0]
        with named_errors("SLiMe Part Guider"):
            segmenter = SamplingSegmenter(model, vae, clip, clip_vision, wanted, min_confidence)
        guider = PartGuider(segmenter, part_prompts, (start_percent, end_percent), update_every)
        guider.set_prompts(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class SLiMeGuiderMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeGuiderMasks",
            category=SAMPLING,
            is_output_node=True,
            display_name="SLiMe Guider Masks",
            description="Gives the masks that SLiMe Part Guider used last, for a preview or for inpainting.",
            search_aliases="guider masks, masks while sampling",
            inputs=[
                io.Guider.Input("guider", tooltip="From SLiMe Part Guider."),
                io.Latent.Input("latent", tooltip="The sampled latent: this node waits for it."),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="All part prompts together."),
                io.Mask.Output(
                    display_name="masks", is_output_list=True, tooltip="One per part prompt, in their order."
                ),
            ],
        )

    @classmethod
    def execute(cls, guider: Any, latent: dict[str, Tensor]) -> io.NodeOutput:
        with named_errors("SLiMe Guider Masks"):
            masks = used_masks(guider, latent["samples"])
        together = torch.stack(masks).amax(0)
        return io.NodeOutput(to_core(together), [to_core(mask) for mask in masks], ui=ui.PreviewMask(together, cls=cls))
