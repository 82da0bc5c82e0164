"""SLiMe Part Latent Mask: from some step on, sampling goes on in a learned part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..slime.embeddings import PartEmbeddings
from ..slime.parts.masks import MaskShape
from .common import SAMPLING, Embeddings, named_errors, schema, split_names
from .part_prompts import PartPrompt, in_cells
from .watching import KEY, Watcher, step_of, watching_inputs


class SLiMePartLatentMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMePartLatentMask",
            category=SAMPLING,
            display_name="SLiMe Part Latent Mask",
            description="A model for KSampler that finds parts while it samples, and from then on changes nothing "
            "else: inpainting in the same run, without a mask.",
            search_aliases=["auto inpaint", "latent noise mask", "inpaint part", "denoise mask"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples, and by default finds the parts."),
                Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings."),
                io.String.Input("names", default="", tooltip="Parts to change, separated by commas; empty takes all."),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that change the whole picture; 1 are all. Then parts are found: in the "
                    "picture that sampling began with, which stays outside of them, or with an empty latent in what it "
                    "has come to.",
                ),
                io.Int.Input("grow", default=8, min=-512, max=512, tooltip="Widen the parts by pixels."),
                io.Int.Input("feather", default=8, min=0, max=512, tooltip="Soften the border over about so many px."),
                *watching_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For KSampler and every other sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        embeddings: PartEmbeddings,
        names: str = "",
        start_percent: float = 0.2,
        grow: int = 8,
        feather: int = 8,
        vae: Any = None,
        clip_vision: Any = None,
        clip: Any = None,
        min_confidence: float = 0.0,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Part Latent Mask"):
            watcher = Watcher(model, vae, clip, clip_vision, [embeddings], min_confidence)
        wanted = PartPrompt(embeddings, tuple(split_names(names)), None, 1.0, MaskShape(grow=grow, feather=feather))
        patched = watcher.ready()

        def wrapper(executor: Any, *given: Any, **named: Any) -> Any:
            return _Restricted(watcher, wanted, start_percent).sample(executor, *given, **named)

        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, wrapper)
        return io.NodeOutput(patched)


class _Restricted:
    """One sampling that is restricted to parts; made for it and gone with it.

    What stays outside of them is ``_kept``, under ``_noise``: tensors that the sampler holds, and that are filled when
    parts are found. Sampling that began with an image keeps it. One that began empty, or amidst the steps of another,
    keeps the picture that it has come to.
    """

    _kept: Tensor
    _noise: Tensor
    _amidst: bool
    _has_image: bool

    def __init__(self, watcher: Watcher, wanted: PartPrompt, start: float) -> None:
        self._watcher, self._wanted, self._start = watcher, wanted, start
        self._denoised: Tensor | None = None
        self._left: Tensor | None = None  # noise in the last input
        self._mask: Tensor | None = None  # [B, 1, h, w], once it was looked for
        self._earlier: Callable[..., Tensor] | None = None

    def sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Any:
        """ComfyUI's sampler with a mask of the latent that follows the parts; its own mask counts as well."""
        options = dict(extra_args["model_options"])
        self._earlier = options.get("denoise_mask_function")
        before = getattr(self._earlier, "__self__", None)
        if isinstance(before, _Restricted):  # another such node, whose tensors the sampler will hold
            self._kept, self._noise, self._amidst = before._kept, before._noise, before._amidst
            self._has_image = before._has_image
        else:
            self._kept = torch.zeros_like(noise) if latent_image is None else latent_image.clone()
            self._noise, self._amidst = noise.clone(), not bool(noise.any())
            self._has_image = bool(self._kept.any()) and not self._amidst
        options["denoise_mask_function"] = self._mask_of
        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), self._remember]
        self._options, self._patcher = options, guider.model_patcher
        mask = torch.ones_like(noise) if denoise_mask is None else denoise_mask
        extra = extra_args | {"model_options": options}
        try:
            return executor(guider, sigmas, extra, callback, self._noise, self._kept, mask, disable_pbar)
        finally:
            self.__dict__.clear()  # also out of the options, which hold it

    def _remember(self, args: dict[str, Any]) -> Tensor:
        self._denoised = denoised = args["denoised"]
        if self._amidst and self._mask is None:
            self._left = noise_in(args["input"], denoised, args["sigma"], args["model"].model_sampling)
        return denoised

    def _mask_of(self, sigma: Tensor, denoise_mask: Tensor, extra_options: dict[str, Any]) -> Tensor:
        if self._earlier is not None:
            denoise_mask = self._earlier(sigma, denoise_mask, extra_options=extra_options)
        step, steps = step_of(sigma, self._options)
        seen = self._kept if self._has_image else self._denoised
        if self._mask is None and self._start * steps <= step and seen is not None:
            self._look(seen, denoise_mask)
        return denoise_mask if self._mask is None else denoise_mask * self._mask

    def _look(self, seen: Tensor, changing: Tensor) -> None:
        with named_errors("SLiMe Part Latent Mask"):
            (maps,) = self._watcher.look(seen, self._patcher)
        mask = self._wanted.mask(maps)
        found = mask.flatten(1).any(1)
        mask[~found] = 1  # where there is no such part the picture is sampled as ever
        self._mask = in_cells(mask, seen).unsqueeze(1)
        if not self._has_image and bool(found.any()):  # what an earlier mask keeps is kept already
            self._kept.lerp_(seen, changing)
            if self._left is not None:
                self._noise.lerp_(self._left, changing)


def noise_in(x: Tensor, denoised: Tensor, sigma: Tensor, sampling: Any) -> Tensor:
    """The noise that makes ``x`` of the denoised picture, by the model's own rule, which is linear in it."""
    level = sigma.reshape(-1, *[1] * (x.ndim - 1))
    nothing = torch.zeros_like(x)
    rest: Tensor = x - sampling.noise_scaling(level, nothing, denoised)
    return rest / sampling.noise_scaling(level, torch.ones_like(x), nothing)
