"""Sampling with parts on the demo model, for tests: what is taught, guiders, and latents that come of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime import preset, train
from testing import splits
from testing.inprocess import load_backbone
from testing.server import MODEL

STEPS, SIDE = 6, 32


@torch.inference_mode()
def taught() -> Any:
    """The demo model with a car's parts learned from one example, some prompts, and another car."""
    backbone = load_backbone(MODEL)
    example = splits.example("car", splits.TEACH)
    embeddings = train(backbone, [example], preset("instant", backbone.info, views=12))
    texts = ("a blue car on sand", "a blue car with yellow wheels on sand", "")
    conds = [backbone.clip.encode_from_tokens_scheduled(backbone.clip.tokenize(text)) for text in texts]
    car = splits.example("car", splits.TEST).image[None]
    return SimpleNamespace(
        backbone=backbone,
        embeddings=embeddings,
        whole=conds[0],
        part=conds[1],
        nothing=conds[2],
        example=example,
        car=car,
        encoded=backbone.vae.encode(car),
    )


def without_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """Previews need a server."""
    from comfy_api.latest import ui

    for kind in ("PreviewImage", "PreviewMask"):
        monkeypatch.setattr(ui, kind, lambda *a, **k: SimpleNamespace(as_dict=lambda: {"images": []}))


def part_guider(
    tiny, model: Any = None, cfg: float = 3.0, positive: Any = None, negative: Any = None, **options: Any
) -> Any:
    from slime_extension.nodes.part_prompts import SLiMePartGuider, SLiMePartPrompt

    prompt = {name: options.pop(name) for name in ("names", "strength", "grow") if name in options}
    embeddings, part = options.pop("embeddings", tiny.embeddings), options.pop("part", tiny.part)
    given = {"names": "wheel", "previous": options.pop("more", ())} | prompt
    prompts = SLiMePartPrompt.execute(embeddings, part, **given).args[0]
    whole, nothing = positive or tiny.whole, negative or tiny.nothing
    return SLiMePartGuider.execute(model or tiny.backbone.model, whole, nothing, prompts, cfg, **options).args[0]


def plain_guider(tiny, model: Any = None, cfg: float = 3.0, positive: Any = None) -> Any:
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model or tiny.backbone.model)
    guider.set_conds(positive or tiny.whole, tiny.nothing)
    guider.set_cfg(cfg)
    return guider


def sampled(
    guider: Any, count: int = 1, sampler: Any = "euler", callback: Any = None, shape: Any = None, steps: int = STEPS
) -> torch.Tensor:
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(shape or (count, 4, SIDE, SIDE))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = comfy.sample.prepare_noise(latent, 3)
    made = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(noise, latent, made, sigmas, callback=callback, disable_pbar=True, seed=3)


def masked_model(tiny, model: Any = None, **options: Any) -> Any:
    from slime_extension.nodes.part_latent_mask import SLiMePartLatentMask

    return SLiMePartLatentMask.execute(
        model or tiny.backbone.model, tiny.embeddings, **({"names": "wheel"} | options)
    ).args[0]


def redrawn(tiny, model: Any, latent: torch.Tensor, mask: Any = None) -> torch.Tensor:
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent, 3)
    return comfy.sample.sample(
        model, noise, STEPS, 3.0, "euler", "normal", tiny.part, tiny.nothing, latent,
        denoise=0.8, noise_mask=mask, disable_pbar=True, seed=3,
    )  # fmt: skip
