"""Clones of one checkpoint share its live modules: what one has patched must not reach SLiMe's pass on another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slime import preset, segment, train
from testing.inprocess import load_flow
from testing.models import comfy_vision
from testing.sampling import part_guider, plain_guider, sampled
from testing.server import FLOW
from testing.toy import all_vectors

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("in_inference_mode")]


class Wrapped(torch.nn.Module):
    """What packs put in place of a model: compiled ones look like it."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("own"), name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.own(*args, **kwargs)


def wrapped(model: Any, compile_it: bool = False) -> Any:
    clone = model.clone()
    own = model.get_model_object("diffusion_model")
    clone.add_object_patch("diffusion_model", torch.compile(own, backend="eager") if compile_it else Wrapped(own))
    return clone


def inner_block_wrapped(model: Any) -> Any:
    clone = model.clone()
    name = "diffusion_model.output_blocks.3.1.transformer_blocks.0"
    clone.add_object_patch(name, Wrapped(model.get_model_object(name)))
    return clone


def scheduled(model: Any, kind: str) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete

    if kind == "edm":
        return ModelSamplingContinuousEDM().patch(model, "edm", 120.0, 0.002)[0]
    return ModelSamplingDiscrete().patch(model, kind, False)[0]


CLONES = {
    "wrapped": wrapped,
    "compiled": lambda model: wrapped(model, compile_it=True),
    "block": inner_block_wrapped,
    "lcm": lambda model: scheduled(model, "lcm"),
    "v_prediction": lambda model: scheduled(model, "v_prediction"),
    "edm": lambda model: scheduled(model, "edm"),
}


KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind == "compiled" else kind for kind in CLONES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_clone_and_the_plain_model_segment_alike_in_any_order(tiny, plain_sample, kind: str) -> None:
    from slime_extension.nodes.backbones import build_backbone

    own = tiny.backbone
    plain, patched = own.model, CLONES[kind](own.model)

    def labels(model: Any) -> torch.Tensor:
        backbone = build_backbone(model, own.vae, own.clip, None)
        assert backbone.info.id == own.info.id
        return segment(backbone, tiny.car, [tiny.embeddings])[0].label_map

    def trained(model: Any) -> torch.Tensor:
        backbone = build_backbone(model, own.vae, own.clip, None)
        return all_vectors(train(backbone, [tiny.example], preset("instant", backbone.info, views=2)))

    wanted, vectors = labels(plain), trained(plain)
    for model in (patched, plain, patched):
        sampled(plain_guider(tiny, model))
        for other in (plain, patched):
            assert torch.equal(labels(other), wanted)
    for model in (patched, plain):
        assert torch.equal(trained(model), vectors)
    assert torch.equal(sampled(plain_guider(tiny)), plain_sample)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_parts_are_found_while_a_patched_clone_samples(tiny, kind: str) -> None:
    wanted = sampled(part_guider(tiny))
    sampled(plain_guider(tiny, CLONES[kind](tiny.backbone.model)))
    assert torch.equal(sampled(part_guider(tiny)), wanted)
    patched = CLONES[kind](tiny.backbone.model)
    assert torch.equal(sampled(part_guider(tiny, patched)), wanted)
    assert patched.object_patches and torch.equal(sampled(part_guider(tiny)), wanted)


def test_a_flow_transformer_whose_clone_is_wrapped(tiny) -> None:
    from slime_extension.nodes.backbones import build_backbone

    own = load_flow(FLOW)
    clone = own.model.clone()
    block = own.model.get_model_object("diffusion_model").joint_blocks[0]
    clone.add_object_patch("diffusion_model.joint_blocks.0", Wrapped(block))
    embeddings = train(own, [tiny.example], preset("instant", own.info, views=2))
    wanted = segment(own, tiny.car, [embeddings])[0].label_map
    for patched in (wrapped(own.model), clone):
        for model in (patched, own.model, patched):
            import comfy.model_management

            comfy.model_management.load_models_gpu([model])
            for other in (own.model, patched):
                backbone = build_backbone(other, own.vae, own.clip, None)
                assert torch.equal(segment(backbone, tiny.car, [embeddings])[0].label_map, wanted)


def test_a_vision_encoder_whose_clone_is_wrapped(tiny) -> None:
    import comfy.model_management
    from slime_extension.nodes.comfy_vision import ComfyVision

    vision, _ = comfy_vision("dinov2")
    own = ComfyVision(vision)
    embeddings = train(
        own, [tiny.example], preset("instant", own.info, views=2, read_layers="block.1", propagate_layers="block.1")
    )
    wanted = segment(own, tiny.car, [embeddings])[0].label_map
    clone = vision.patcher.clone()
    layer = vision.model.encoder.layer[1]
    clone.add_object_patch("encoder.layer.1", Wrapped(layer))
    comfy.model_management.load_models_gpu([clone])
    assert torch.equal(segment(ComfyVision(vision), tiny.car, [embeddings])[0].label_map, wanted)
