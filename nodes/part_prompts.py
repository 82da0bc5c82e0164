"""SLiMe Part Prompt, Part Guider and Guider Masks: prompts that apply to learned parts while a picture is sampled."""

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
from .common import (
    SAMPLING,
    Embeddings,
    named_errors,
    schema,
    split_names,
    to_core,
)
from .watching import Watcher, step_of, watching_inputs

PartPrompts = io.Custom("SLIME_PART_PROMPTS")
# What a conditioning says of the whole picture beside its prompt: it holds in the parts too.
OF_THE_PICTURE = ("control", "reference_latents", "concat_latent_image", "concat_mask", "guidance")
LITTLE = 1e-4  # of a conditioning where another has all: counts where that one does not apply


@dataclass(frozen=True)
class PartPrompt:
    """A conditioning for parts: what it replaces there by ``strength``, 0 to 1, in a mask that ``shape`` makes."""

    embeddings: PartEmbeddings
    names: tuple[str, ...]
    conditioning: Any
    strength: float
    shape: MaskShape

    def mask(self, maps: PartMaps) -> Tensor:
        """[B, H, W] of its parts; empty where none of them was learned."""
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
            description="A prompt for learned parts alone, applied while the picture is made. For SLiMe Part Guider.",
            search_aliases=["regional prompt", "part prompt", "attention mask prompt", "prompt for a part"],
            inputs=[
                Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings."),
                io.Conditioning.Input("conditioning", tooltip="What the parts should look like."),
                io.String.Input(
                    "names", default="", tooltip="Parts it applies to, separated by commas. Empty takes every part."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the picture's own prompt it replaces there; 0 changes nothing.",
                ),
                io.Int.Input(
                    "grow", default=8, min=-512, max=512, tooltip="Widen the parts by pixels; negative shrinks them."
                ),
                io.Int.Input(
                    "feather", default=8, min=0, max=512, tooltip="Soften the border over about so many pixels."
                ),
                PartPrompts.Input("previous", optional=True, tooltip="Further part prompts, which apply as well."),
            ],
            outputs=[PartPrompts.Output(display_name="part_prompts", tooltip="For SLiMe Part Guider.")],
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
            logging.warning(
                "SLiMe Part Prompt: there is no part %s; these were learned: %s.",
                ", ".join(unknown),
                ", ".join(embeddings.names),
            )
        shape = MaskShape(grow=grow, feather=feather)
        return io.NodeOutput((*(previous or ()), PartPrompt(embeddings, wanted, conditioning, strength, shape)))


class PartGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guidance with part prompts: from a share of the steps on, parts are found on the last denoised picture,
    and inside them the part's conditioning stands in for the positive one.

    They are ordinary masked conditionings, so that ControlNets and hooks work as ever; what is said of the whole
    picture (``OF_THE_PICTURE``) holds in its parts too. Where no part is found the very call is made that plain
    guidance makes. ``used`` has the masks [B, H, W] of the last sampling, one a prompt.
    """

    def __init__(self, watcher: Watcher, prompts: Sequence[PartPrompt], span: tuple[float, float], every: int) -> None:
        super().__init__(watcher.ready())
        self._watcher, self._span, self._every = watcher, span, every
        self.count = len(prompts)
        self._prompts = {index: prompt for index, prompt in enumerate(prompts) if prompt.strength > 0}
        self.used: list[Tensor] = []
        self._denoised: Tensor | None = None
        self._masks: dict[int, Tensor] = {}  # in cells, by strength; of the prompts whose parts were found
        self._size: torch.Size | None = None  # that the masks were made for
        self._looked: int | None = None
        self._active = False

    def set_prompts(self, positive: Any, negative: Any) -> None:
        """The conditionings of the whole picture; those of the parts are prepared with them."""
        whole: dict[str, Any] = next((more for _, more in positive if "area" not in more and "mask" not in more), {})
        given = {name: whole[name] for name in OF_THE_PICTURE if name in whole}
        parts = {_key(index): _of_part(prompt.conditioning, given) for index, prompt in self._prompts.items()}
        self.inner_set_conds({"positive": positive, "negative": negative} | parts)

    def sample(self, *args: Any, **named: Any) -> Any:
        self._forget()
        self.used = []
        try:
            return super().sample(*args, **named)
        finally:
            self._forget()

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        options = model_options or {}
        if self._prompts:
            self._watch(x, timestep, options)
        masks = self._masks if self._active else {}
        parts = [(self.conds[_key(index)], mask) for index, mask in masks.items()]
        positive = self.conds.get("positive")
        positive = _masked(positive, parts, x) if parts else positive
        negative = self.conds.get("negative")
        with _computed(parts, options):
            denoised: Tensor = comfy.samplers.sampling_function(
                self.inner_model, x, timestep, negative, positive, self.cfg, model_options=options, seed=seed
            )
        self._denoised = denoised if self._prompts else None
        return denoised

    def _forget(self) -> None:
        self._denoised, self._masks, self._size, self._looked, self._active = None, {}, None, None, False

    def _watch(self, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        """Look where it is time to: the first time there is a picture, and every so many steps."""
        step, steps = step_of(sigma, options)
        self._active = self._span[0] <= step / steps < self._span[1] and self._denoised is not None
        due = self._looked is None or (self._every > 0 and step >= self._looked + self._every)
        if self._active and due:
            self._looked = step
            assert self._denoised is not None
            with named_errors("SLiMe Part Guider"):
                found = self._watcher.look(self._denoised, self.model_patcher)
            masks = [prompt.mask(maps) for prompt, maps in zip(self._prompts.values(), found, strict=True)]
            by_prompt = dict(zip(self._prompts, masks, strict=True))
            self.used = [by_prompt.get(index, torch.zeros_like(masks[0])) for index in range(self.count)]
            self._size = None
        if self._active and self._size != x.shape[-2:]:  # a sampler may go on at another size
            self._size = x.shape[-2:]
            cells = {index: prompt.strength * in_cells(self.used[index], x) for index, prompt in self._prompts.items()}
            self._masks = {index: mask for index, mask in cells.items() if bool(mask.any())}


def used_masks(guider: Any, sampled: Tensor) -> list[Tensor]:
    """One mask [B, H, W] a part prompt; empty ones where parts were never looked for.

    Raises:
        SlimeError: another kind of guider.
    """
    if not isinstance(guider, PartGuider):
        raise SlimeError(f"A {type(guider).__name__} finds no parts: connect SLiMe Part Guider.")
    cell = getattr(guider.model_patcher.model.latent_format, "spacial_downscale_ratio", 8)  # older cores do not say
    height, width = (cell * cells for cells in sampled.shape[-2:])
    return guider.used or [torch.zeros(len(sampled), height, width)] * max(1, guider.count)


@contextmanager
def _computed(parts: Sequence[tuple[Any, Tensor]], options: dict[str, Any]) -> Iterator[None]:
    """ComfyUI's EasyCache keeps what every conditioning gave at the last computed step; older cores take it for granted
    that there is something. So with the conditioning of a new part the step is computed."""
    cache = options.get("transformer_options", {}).get("easycache")
    known = getattr(cache, "uuid_cache_diffs", None)
    if known is None or all(one["uuid"] in known for conds, _ in parts for one in conds):
        yield
        return
    kept, cache.reuse_threshold = cache.reuse_threshold, 0.0
    try:
        yield
    finally:
        cache.reuse_threshold = kept


def _key(index: int) -> str:
    return f"part prompt {index}"


def _of_part(conditioning: Any, given: dict[str, Any]) -> list[list[Any]]:
    """A part's conditioning, with what is given of the picture's where it brings nothing of its own; an area, or bounds
    of a mask, would crop what the part's mask has to cover."""
    return [
        [rows, given | {name: value for name, value in more.items() if name not in ("area", "set_area_to_bounds")}]
        for rows, more in conditioning
    ]


def in_cells(mask: Tensor, x: Tensor) -> Tensor:
    """[B, H, W] -> [B, h, w] or, where latents have frames, [B, 1, h, w], on the latent's device: means over cells."""
    small = torch.nn.functional.interpolate(mask[:, None], x.shape[-2:], mode="area")
    return (small if x.ndim == 5 else small[:, 0]).to(x.device)


def _masked(positive: Any, parts: Sequence[tuple[Any, Tensor]], x: Tensor) -> list[dict[str, Any]]:
    """The positive conditionings outside of the parts, and the parts' own inside. Of the first ones there is a little
    everywhere: they alone count where the part's does not apply, by a mask or a range of steps of its own."""
    rest = (1 - torch.stack([mask for _, mask in parts]).sum(0)).clamp(min=LITTLE)
    return [_within(one, rest, x) for one in positive] + [
        _within(one, mask, x) for conds, mask in parts for one in conds
    ]


def _within(cond: dict[str, Any], mask: Tensor, x: Tensor) -> dict[str, Any]:
    own = cond.get("mask")
    if own is None:
        return cond | {"mask": mask * _soft_area(cond["area"], x) if "area" in cond else mask}
    own = own[: len(mask)].to(mask)  # as ComfyUI fits a batch of masks to a batch of latents
    return cond | {"mask": mask * own.repeat(len(mask) // len(own), *[1] * (own.ndim - 1))}


def _soft_area(area: Sequence[int], x: Tensor) -> Tensor:
    """An area [h, w, y, x] as a mask with ComfyUI's soft border, which it leaves out where there is a mask."""
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
            description="Guidance for SamplerCustomAdvanced that finds learned parts while the picture is made, and "
            "gives each of them a prompt of its own.",
            search_aliases=["guider", "regional prompt", "part prompt", "CFGGuider"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples, and by default finds the parts."),
                io.Conditioning.Input("positive", tooltip="The prompt of the whole picture."),
                io.Conditioning.Input("negative", tooltip="What the picture should not be."),
                PartPrompts.Input("part_prompts", tooltip="From SLiMe Part Prompt."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="Strength of the guidance."),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that run plain before parts are found; the first step always does.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps after which the picture's own prompt applies everywhere again.",
                ),
                io.Int.Input(
                    "look_every",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="Find the parts again every so many steps; 0 finds them once.",
                ),
                *watching_inputs(),
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
        look_every: int = 4,
        vae: Any = None,
        clip_vision: Any = None,
        clip: Any = None,
        min_confidence: float = 0.0,
    ) -> io.NodeOutput:
        wanted = [one.embeddings for one in part_prompts if one.strength > 0]
        with named_errors("SLiMe Part Guider"):
            watcher = Watcher(model, vae, clip, clip_vision, wanted, min_confidence)
        guider = PartGuider(watcher, part_prompts, (start_percent, end_percent), look_every)
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
            description="The masks that SLiMe Part Guider used last, for seeing what it found or inpainting there.",
            search_aliases=["guider masks", "masks while sampling"],
            inputs=[
                io.Guider.Input("guider", tooltip="From SLiMe Part Guider."),
                io.Latent.Input("latent", tooltip="What was sampled with it: this node waits for it."),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="All part prompts together."),
                io.Mask.Output(
                    display_name="masks", is_output_list=True, tooltip="One for each part prompt, in their order."
                ),
            ],
        )

    @classmethod
    def execute(cls, guider: Any, latent: dict[str, Tensor]) -> io.NodeOutput:
        with named_errors("SLiMe Guider Masks"):
            masks = used_masks(guider, latent["samples"])
        together = torch.stack(masks).amax(0)
        return io.NodeOutput(to_core(together), [to_core(mask) for mask in masks], ui=ui.PreviewMask(together, cls=cls))
