"""The tiny model as nodes use it: repeated training, sampling beside training, LoRA and half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slime import preset, segment, train
from slime.embeddings import PartEmbeddings
from slime.training.cache import clear_caches
from testing.inprocess import load_backbone
from testing.sampling import plain_guider, sampled
from testing.server import MODEL
from testing.toy import all_vectors

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("in_inference_mode")]


def trained(tiny: Any, backbone: Any, kind: str = "instant", **settings: Any) -> PartEmbeddings:
    steps = {"steps": 3} if kind == "paper" else {}
    chosen = preset(kind, backbone.info, **steps | {"views": 2} | settings)
    return train(backbone, [tiny.example], chosen)


def test_same_seed_gives_the_same_masks(tiny) -> None:
    """After everything was forgotten, training gives identical vectors, and they identical masks."""
    before = trained(tiny, tiny.backbone)
    wanted = segment(tiny.backbone, tiny.car, before)[0].label_map
    clear_caches()
    fresh = load_backbone(MODEL)
    again = trained(tiny, fresh)
    assert torch.equal(all_vectors(again), all_vectors(before))
    assert torch.equal(segment(fresh, tiny.car, again)[0].label_map, wanted)


def test_sampling_is_untouched_by_training_and_segmenting(tiny) -> None:
    """Sampled latents are bit-identical before and after, for the trainers with and without gradients."""
    before = sampled(plain_guider(tiny))
    for kind, more in (("instant", {}), ("paper", {}), ("paper", {"checkpointing": True})):
        segment(tiny.backbone, tiny.car, trained(tiny, tiny.backbone, kind, **more))
        assert torch.equal(sampled(plain_guider(tiny)), before), (kind, more)


def test_lora_is_respected(tiny) -> None:
    """A LoRA on the model changes what is learned, in both trainers."""
    import comfy.sd
    from slime_extension.nodes.backbones import build_backbone

    own, lora, generator = tiny.backbone, {}, torch.Generator().manual_seed(0)
    for name, weight in own.model.model.state_dict().items():
        if name.endswith((".attn2.to_k.weight", ".attn2.to_q.weight")):
            stem = name.removesuffix(".weight")
            lora[f"{stem}.lora_A.weight"] = 0.2 * torch.randn(4, weight.shape[1], generator=generator)
            lora[f"{stem}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 4, generator=generator)
    patched, _ = comfy.sd.load_lora_for_models(own.model, None, lora, 1.0, 0.0)
    assert len(patched.patches) == len(lora) // 2 > 0
    for kind in ("instant", "paper"):
        plain, changed = (
            all_vectors(trained(tiny, build_backbone(model, own.vae, own.clip, None), kind))
            for model in (own.model, patched)
        )
        assert not torch.allclose(plain, changed, rtol=1e-2), kind


def test_half_precision_unet(tiny, monkeypatch) -> None:
    """As with --fp16-unet: manual cast, both trainers and segmentation; sampling stays as it was."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp16_unet", True)
    backbone = load_backbone(MODEL)
    assert backbone.model.model.diffusion_model.dtype == torch.float16
    before = sampled(plain_guider(tiny, backbone.model))
    for kind in ("instant", "paper"):
        embeddings = trained(tiny, backbone, kind, views=4)
        labels = segment(backbone, tiny.car, embeddings)[0].label_map
        assert all(loss == loss and abs(loss) < 1e6 for loss in embeddings.losses)
        assert kind == "paper" or (labels > 0).any()
    assert torch.equal(sampled(plain_guider(tiny, backbone.model)), before)
