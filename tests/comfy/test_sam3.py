"""SAM3 with ComfyUI's own classes, small and random: skipped where ComfyUI has none."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from slime import Example, SlimeError, load_embeddings, save_embeddings, segment, train
from slime.backbones.base import ExtractionSpec
from slime.concepts.train import concept_tokens
from slime.train import preset
from testing import splits
from testing.tiny import sam3

pytestmark = pytest.mark.long

SIDE = 128
NO_HIDDEN = type("Hidden", (), {"unique_id": None})


@pytest.fixture(scope="session")
def loaded(extension) -> Any:
    """A MODEL of a random SAM3 whose grid is coarse."""
    if importlib.util.find_spec("comfy.ldm.sam3") is None:
        pytest.skip("this ComfyUI has no SAM3")
    with torch.inference_mode():
        return sam3.as_model(sam3.build())


@pytest.fixture
def example() -> Example:
    return splits.example("car", splits.EXAMPLES)


@pytest.fixture
def learn(monkeypatch) -> Any:
    from slime_extension.nodes.sam3_concept import SLiMeLearnSam3Concept

    monkeypatch.setattr(SLiMeLearnSam3Concept, "hidden", NO_HIDDEN, raising=False)
    return SLiMeLearnSam3Concept.execute


def backbone_of(model: Any, *rest: Any) -> Any:
    from slime_extension.nodes.backbones import build_backbone

    return build_backbone(model, *(rest or (None, None, None)))


def test_its_encoder_is_a_backbone(loaded, example, in_inference_mode, tmp_path) -> None:
    backbone = backbone_of(loaded)
    assert backbone.info.id == "sam3-128" and [layer.name for layer in backbone.layers] == ["block.1", "block.3"]
    embeddings = train(backbone, [example], preset("instant", backbone.info, views=2))
    assert embeddings.layers.read == embeddings.layers.propagate == ("block.3",)
    saved = load_embeddings(save_embeddings(embeddings, tmp_path / "x.safetensors"))
    image = example.image[None, : SIDE + 40, :SIDE]
    labels = segment(backbone, image, saved)[0].label_map
    assert labels.shape == image.shape[:3]
    assert torch.equal(labels, segment(backbone_of(None, None, None, loaded), image, saved)[0].label_map)


def test_attention_is_what_the_block_computes(loaded, example, in_inference_mode) -> None:
    backbone = backbone_of(loaded)
    trunk = loaded.model.diffusion_model.detector.backbone["vision_backbone"].trunk
    encoded = backbone.encode_images(torch.rand(1, 1008, 1008, 3))
    caught: dict[str, Any] = {}
    block = trunk.blocks[3]
    handles = [
        block.attn.qkv.register_forward_hook(lambda _m, _i, out: caught.update(qkv=out)),
        block.attn.register_forward_hook(lambda _m, _i, out: caught.update(out=out)),
    ]
    try:
        features = backbone.extract(encoded, ExtractionSpec(backbone.default_layers(), {}, 0), encoded)
    finally:
        for handle in handles:
            handle.remove()
    (attention,) = features.attention
    query, key = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (attention.query, attention.key))
    value = caught["qkv"].unflatten(-1, (3, attention.heads, -1))[:, :, 2].transpose(1, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attn.proj(mixed), caught["out"], rtol=1e-3, atol=1e-4)
    assert features.grid == (16, 16) and next(iter(features.groups.values())).shape == (1, 128, 16, 16)


def test_beside_stable_diffusion(loaded, tiny, in_inference_mode) -> None:
    own = tiny.backbone
    fused = backbone_of(own.model, own.vae, own.clip, loaded)
    assert fused.info.id.endswith("+sam3-128")
    embeddings = train(fused, [tiny.example], preset("instant", fused.info, views=2, read_layers="output.6, block.3"))
    assert segment(fused, tiny.car, embeddings)[0].label_map.any()


def test_concepts_are_taken_by_sam3_detect(loaded, example, learn, in_inference_mode, tmp_path) -> None:
    from comfy_extras.nodes_sam3 import SAM3_Detect
    from slime_extension.nodes.comfy_sam3 import ComfySam3
    from slime_extension.nodes.sam3_concept import SLiMeSam3Prompt

    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    result = learn(loaded, (example,), steps=6, views=2)
    embeddings, conditioning, losses = result.args
    assert len(losses["loss"]) == 6 and losses["loss"][-1] < losses["loss"][0]
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.state_dict().items())
    assert not any(weight.requires_grad and weight.grad is not None for weight in loaded.model.parameters())

    entries = conditioning[0][1]["sam3_multi_cond"]
    assert len(entries) == len(example.names) and entries[-1]["cond"].shape == (1, 8, 128)
    saved = load_embeddings(save_embeddings(embeddings, tmp_path / "x.safetensors"))
    (wheel,) = SLiMeSam3Prompt.execute(saved, "wheel", 3).args
    position = example.names.index("wheel")
    assert torch.equal(wheel[0][0], entries[position]["cond"])
    assert wheel[0][1]["sam3_multi_cond"][0]["max_detections"] == 3
    assert torch.equal(concept_tokens(saved)[position], wheel[0][0][0])

    image = example.image[None]
    masks, boxes = SAM3_Detect.execute(loaded, image, wheel, threshold=0.0, refine_iterations=0).args
    detector = ComfySam3(loaded)
    ours = detector.detect(detector.prepare(detector.encode(image)), wheel[0][0][0])
    assert masks.shape == image.shape[:3] and len(boxes[0]) == 3
    best = ours.scores[0].argsort(descending=True)[:3]
    assert boxes[0][0]["score"] == pytest.approx(float(ours.scores[0, best[0]].sigmoid()), abs=1e-4)

    with pytest.raises(SlimeError, match="are SAM3 concepts"):
        segment(backbone_of(loaded), image, saved)
    with pytest.raises(SlimeError, match="no part wing"):
        SLiMeSam3Prompt.execute(saved, "wing")
    with pytest.raises(SlimeError, match="learned by SLiMe Train"):
        SLiMeSam3Prompt.execute(replace(saved, mode="linear"))


def test_what_cannot_be_is_refused(loaded, tiny, example, learn, in_inference_mode) -> None:
    with pytest.raises(SlimeError, match="not SAM3"):
        learn(tiny.backbone.model, (example,), steps=1)
    with pytest.raises(SlimeError, match="CLIP gives 96 channels, SAM3 takes 128"):
        learn(loaded, (example,), steps=1, clip=tiny.backbone.clip)


def test_parts_are_refined_and_followed(extension, in_inference_mode, monkeypatch) -> None:
    """On a random SAM3.1 with the grid of the real one: shapes, order of the parts, and what the guards leave."""
    if importlib.util.find_spec("comfy.ldm.sam3") is None:
        pytest.skip("this ComfyUI has no SAM3")
    from comfy_extras.nodes_sam3 import SAM3_VideoTrack
    from slime_extension.nodes import sam3_refine, tracks
    from slime_extension.nodes.common import Parts

    from slime.parts.maps import HardMaps, PartMaps
    from slime.parts.palette import default_palette

    model = sam3.as_model(sam3.build_tracker())
    labels = torch.zeros(3, 64, 96, dtype=torch.uint8)
    labels[:, 8:40, 8:40], labels[:, 8:40, 50:90] = 1, 2
    peaks = torch.tensor([[0.5] * 2, [0.9] * 2, [0.4] * 2])
    maps = PartMaps(HardMaps(labels, 3), ("a", "b"), default_palette(2), peaks)
    parts = Parts(maps, torch.rand(3, 64, 96, 3))
    for node in (sam3_refine.SLiMeSam3Refine, tracks.SLiMeTracksToParts):
        monkeypatch.setattr(node, "hidden", NO_HIDDEN, raising=False)
    for module in (sam3_refine, tracks):
        monkeypatch.setattr(module, "parts_result", lambda cls, maps, images: Parts(maps, images))
    refined = sam3_refine.SLiMeSam3Refine.execute(parts, model, iterations=1)
    assert refined.maps.label_map.shape == labels.shape and set(refined.maps.label_map.unique().tolist()) <= {0, 1, 2}

    masks, forwards, backwards, frame, names = tracks.SLiMeTrackSeeds.execute(parts).args
    assert (masks.shape, len(forwards), len(backwards), frame, names) == ((2, 64, 96), 2, 2, 1, "a, b")
    assert torch.equal(backwards[0], forwards[0])
    track = [SAM3_VideoTrack.execute(frames, model, initial_mask=masks).args[0] for frames in (forwards, backwards)]
    found = tracks.SLiMeTracksToParts.execute(parts, *track)
    assert found.maps.label_map.shape == labels.shape and found.maps.names == ("a", "b")
    with pytest.raises(SlimeError, match="2 frames together, the video 3"):
        tracks.SLiMeTracksToParts.execute(parts, track[0])
