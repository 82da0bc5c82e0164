"""Sampling with part prompts on the tiny model, for tests: trained parts, guiders, and sampled latents."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime import preset, train
from testing import splits
from testing.inprocess import NAME, load_backbone
from testing.server import MODEL

STEPS, SIDE = 6, 16


@torch.inference_mode()
def trained_demo() -> Any:
    """Return the tiny model with a car's parts trained on one example, some prompts, and another car."""
    backbone = load_backbone(MODEL)
    example = splits.example("car", splits.EXAMPLES)
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
    """Replace previews, which need a server."""
    from comfy_api.latest import ui

    for kind in ("PreviewImage", "PreviewMask"):
        monkeypatch.setattr(ui, kind, lambda *a, **k: SimpleNamespace(as_dict=lambda: {"images": []}))


def part_guider(
    tiny: Any, model: Any = None, cfg: float = 3.0, positive: Any = None, negative: Any = None, **options: Any
) -> Any:
    module = import_module(f"{NAME}.nodes.part_prompts")

    prompt = {name: options.pop(name) for name in ("names", "strength", "grow") if name in options}
    embeddings, part = options.pop("embeddings", tiny.embeddings), options.pop("part", tiny.part)
    given = {"names": "wheel", "previous": options.pop("more", ())} | prompt
    prompts = module.SLiMePartPrompt.execute(embeddings, part, **given).args[0]
    whole, nothing = positive or tiny.whole, negative or tiny.nothing
    return module.SLiMePartGuider.execute(model or tiny.backbone.model, whole, nothing, prompts, cfg, **options).args[0]


def plain_guider(tiny: Any, model: Any = None, cfg: float = 3.0, positive: Any = None) -> Any:
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


def with_entries(conditioning: Any, **more: Any) -> Any:
    """Return a conditioning with further entries."""
    return [[tokens, own | more] for tokens, own in conditioning]
