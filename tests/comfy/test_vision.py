"""Vision encoders: ComfyUI's classes and transformers' with the same random weights, alone and fused."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime import SegmentSettings, SlimeError, decode, extract, load_embeddings, preset, save_embeddings, segment, train
from slime.backbones import vit
from slime.backbones.base import ExtractionSpec, seeded_noise
from slime.backbones.fused import FusedBackbone
from slime.backbones.hf_vit import TransformersVision
from slime.backbones.layers import LayerChoice
from slime.images import resize_image
from slime.training import probe
from testing.inprocess import NAME, load_backbone
from testing.models import SIZES, comfy_vision, small_encoder, transformers_model
from testing.nodes import train_settings
from testing.random_models import randomise
from testing.server import MODEL
from testing.toy import ToyUNet, toy_example, toy_score

pytestmark = pytest.mark.long


@pytest.fixture
def nodes(extension, monkeypatch):
    from comfy_api.latest import ui
    from slime_extension.nodes import segment as segment_nodes
    from slime_extension.nodes import train as train_nodes

    monkeypatch.setattr(ui, "PreviewImage", lambda *a, **k: SimpleNamespace(as_dict=lambda: {"images": []}))
    monkeypatch.setattr(train_nodes.SLiMeTrain, "hidden", SimpleNamespace(unique_id="1"), raising=False)
    return SimpleNamespace(Train=train_nodes.SLiMeTrain, Segment=segment_nodes.SLiMeSegment)


def features_of(backbone: Any, size: tuple[int, int], layers: LayerChoice) -> Any:
    images = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(5))
    encoded = backbone.encode_images(images)
    return images, backbone.extract(
        encoded, ExtractionSpec(layers, {}, 0), seeded_noise(encoded.shape, 0, backbone.device)
    )


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-registers", "dinov3", "clip", "siglip"])
def test_features_are_the_models_own_tokens_at_any_aspect(kind: str) -> None:
    model = transformers_model(kind)
    backbone = TransformersVision(model)
    backbone.tokens_per_side = 10  # its square has 100 cells
    patch, last = backbone.patch, backbone.layers[-1].name
    images, seen = features_of(backbone, (8 * patch, 12 * patch), LayerChoice((last,), ("block.0",)))
    pixels = (images.movedim(-1, 1) - backbone._mean) / backbone._std
    with torch.no_grad():
        own = model(pixels, **backbone._options).last_hidden_state
        if kind == "clip":
            own = model.vision_model.post_layernorm(own)
        blank = model(torch.zeros(1, *pixels.shape[1:]), **backbone._options).last_hidden_state[0, -96:]
    (maps,) = seen.groups.values()
    assert maps.shape == (2, 64, 8, 12) and seen.grid == (8, 12)
    tokens, own = maps.flatten(2).transpose(1, 2), own[:, -96:]
    if kind == "dinov3":  # without what an image of zeros has most of
        positional = torch.linalg.svd(blank, full_matrices=False).Vh[: int(torch.linalg.matrix_rank(blank))]
        assert 1 <= len(positional) <= 31
        assert (tokens @ positional.T).abs().max() < 1e-4
        own = own - own @ positional.T @ positional
    assert torch.allclose(tokens, own, atol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "clip", "siglip"])
def test_comfyui_and_transformers_agree(kind: str) -> None:
    loaded, source = comfy_vision(kind)
    comfy = importlib.import_module(f"{NAME}.nodes.comfy_vision").ComfyVision(loaded)
    theirs = TransformersVision(source)
    assert comfy.info == theirs.info
    size = {"dinov2": (28, 42), "dinov3": (32, 48), "clip": (12, 18), "siglip": (10, 14)}[kind]
    for backbone in (comfy, theirs):
        backbone.tokens_per_side = round((size[0] * size[1]) ** 0.5)
    size = (size[0] * comfy.patch, size[1] * comfy.patch)
    layers = LayerChoice(tuple(layer.name for layer in comfy.layers), ("block.1", "block.2"))
    with torch.inference_mode():
        ours, others = (features_of(backbone, size, layers)[1] for backbone in (comfy, theirs))
    for name, wanted in others.groups.items():
        assert torch.allclose(ours.groups[name], wanted, atol=2e-4 * float(wanted.abs().max()))
    for one, other in zip(ours.attention, others.attention, strict=True):
        assert torch.allclose(one.query, other.query, atol=1e-3) and torch.allclose(one.key, other.key, atol=1e-3)
    assert not any(module._forward_hooks for module in (*comfy.module.modules(), *source.modules()))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_attention_is_the_models_own(kind: str) -> None:
    """The recorded queries and keys give the probabilities that the model itself reports, rotation included."""
    model = transformers_model(kind)
    model.set_attn_implementation("eager")
    backbone = TransformersVision(model)
    backbone.tokens_per_side = 6
    patch = backbone.patch
    images, seen = features_of(backbone, (6 * patch, 6 * patch), LayerChoice((), ("block.1",)))
    pixels = (images.movedim(-1, 1) - backbone._mean) / backbone._std
    with torch.no_grad():
        theirs = model(pixels, output_attentions=True).attentions[1][:, :, -36:, -36:]
    query, key = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in seen.attention[0][:2])
    ours = (query @ key.transpose(2, 3) / 4).softmax(-1)
    assert torch.allclose(ours, theirs / theirs.sum(-1, keepdim=True), atol=1e-5)


def test_a_pass_ends_after_the_last_layer_that_is_read() -> None:
    backbone = TransformersVision(transformers_model("dinov2"))
    backbone.tokens_per_side = 6
    ran: list[int] = []
    for number, block in enumerate(backbone.module.encoder.layer):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    features_of(backbone, (84, 84), LayerChoice(("block.0",), ("block.1",)))
    assert 2 not in ran


def test_an_encoder_alone_learns_parts(tmp_path) -> None:
    backbone = small_encoder()
    learned = train(backbone, [toy_example(0)], preset("instant", backbone.info, views=6))
    assert learned.backbone == "dinov2-64" and learned.layers.read == ("block.2",) and learned.layers.propagate
    assert toy_score(learned, backbone) > 0.6
    saved = load_embeddings(save_embeddings(learned, tmp_path / "eye.safetensors"))
    images = toy_example(1).image[None]
    maps = segment(backbone, images, saved)[0].label_map
    assert torch.equal(maps, segment(backbone, images, learned)[0].label_map)
    assert torch.equal(maps, decode(extract(backbone, images, saved), saved).label_map)
    segment(backbone, images, saved, SegmentSettings(closeups=1))
    with pytest.raises(SlimeError, match="text of a Stable Diffusion"):
        train(backbone, [toy_example(0)], preset("paper", steps=1))


def test_two_are_fused(monkeypatch) -> None:
    toy = ToyUNet()
    both = FusedBackbone(toy, small_encoder(toy.info.cell))
    learned = train(both, [toy_example(0)], preset("instant", both.info, views=6))
    assert learned.backbone == "toy+dinov2-64" and "dinov2-64:block.2" in learned.layers.read
    assert learned.layers.propagate == tuple(f"toy:{name}" for name in toy.default_layers().propagate)
    assert list(learned.vectors) == ["toy:stride4", "toy:stride2", "dinov2-64:tokens"]
    assert [vector.shape[1] for vector in learned.vectors.values()] == [12, 12, 64], "no padding"
    assert toy_score(learned, both) > 0.8
    probed = train(both, [toy_example(0)], preset("instant", views=4, read_layers="auto", propagate_layers="auto"))
    assert toy_score(probed, both) > 0.8
    every = tuple(layer.name for layer in both.layers)
    spec = ExtractionSpec(LayerChoice(every, ()), both.condition(""), 100, "layer")
    views = probe._extract_views(both, [toy_example(0)], preset("instant", views=4), spec, lambda _: None)
    sizes = {name: maps[0].shape[-1] for name, maps in views.features.items()}
    assert sizes == dict(zip(every, (4, 8, 16, 12, 12, 12), strict=True))
    monkeypatch.setattr(toy, "cache_key", lambda: (toy, 0), raising=False)
    assert both.cache_key() is None, "the encoder allows no caching"
    with pytest.raises(SlimeError, match="Connect dinov2-64 as well"):
        segment(toy, toy_example(1).image[None], learned)
    alone = train(toy, [toy_example(0)], preset("instant", toy.info, views=4))
    with pytest.raises(SlimeError, match="Disconnect dinov2-64"):
        segment(both, toy_example(1).image[None], alone)
    with pytest.raises(SlimeError, match="family"):
        segment(small_encoder(), toy_example(1).image[None], alone)
    with pytest.raises(SlimeError, match="cannot be combined"):
        FusedBackbone(toy, small_encoder())
    with pytest.raises(SlimeError, match="checkpoint alone"):
        train(both, [toy_example(0)], preset("paper", steps=1))


def test_latents_spare_the_encoding() -> None:
    toy = ToyUNet()
    learned = train(toy, [toy_example(0)], preset("instant", toy.info, views=4))
    images = torch.stack([toy_example(1).image, toy_example(2).image])
    latents = toy.encode_images(images)
    before = toy.encoded
    maps = segment(toy, images, learned, latents=latents)[0].label_map
    assert toy.encoded == before
    assert torch.equal(maps, decode(extract(toy, images, learned, latents=latents), learned).label_map)
    assert (maps == segment(toy, images, learned)[0].label_map).float().mean() > 0.97
    twice = torch.nn.functional.interpolate(latents, scale_factor=2.0, mode="nearest")
    assert (maps == segment(toy, images, learned, latents=twice)[0].label_map).float().mean() > 0.97
    sizes = {one.chunks[0][0][1].grid for one in (extract(toy, images, learned, latents=x) for x in (latents, twice))}
    assert len(sizes) == 1, "latents come to the model's own size"
    mirrored = SegmentSettings(average_flip=True, noise_samples=2)
    both = [segment(toy, images, learned, mirrored, latents=given)[0].label_map for given in (latents, None)]
    assert (both[0] == both[1]).float().mean() > 0.97
    segment(toy, images, learned, SegmentSettings(closeups=1), latents=latents)
    for wrong in (latents[:1], latents[:, :2], latents[..., :4], latents[0]):
        with pytest.raises(SlimeError, match="latent|Latents"):
            segment(toy, images, learned, latents=wrong)


def test_siglip2_takes_any_aspect(extension) -> None:
    import comfy.clip_vision
    import comfy.model_patcher
    import comfy.ops

    kind = "siglip2_vision_model"
    made = comfy.clip_vision.IMAGE_ENCODERS.get(kind)
    if made is None:
        pytest.skip("this ComfyUI has no SigLIP 2")
    config = {"model_type": kind, "num_channels": 3, "patch_size": 16, "image_size": -1, "num_patches": 64}
    config |= {"intermediate_size": 128, "hidden_act": "gelu_pytorch_tanh"} | SIZES
    model = made(config, torch.float32, torch.device("cpu"), comfy.ops.manual_cast)
    randomise(model)
    loaded = SimpleNamespace(
        model=model,
        patcher=comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")),
        load_device=torch.device("cpu"),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_size=-1,
    )
    backbone = importlib.import_module(f"{NAME}.nodes.comfy_vision").ComfyVision(loaded)
    assert (
        backbone.info.id == "siglip2-64-128" and backbone.tokens_per_side == 16 and backbone.default_layers().read == ()
    )
    with torch.inference_mode():
        images, seen = features_of(backbone, (12 * 16, 21 * 16), LayerChoice(("block.2",), ("block.1",)))
        own = model.vision_model((images.movedim(-1, 1) - 0.5) / 0.5)[0]
    assert seen.grid == (12, 21)
    assert torch.allclose(seen.groups["tokens"].flatten(2).transpose(1, 2), own, atol=1e-4)


def test_nodes_with_an_encoder_alone(nodes, monkeypatch) -> None:
    clip_vision, _ = comfy_vision("clip")
    examples, image = (toy_example(0),), toy_example(1).image[None]
    chosen = {"preset": "instant", "settings": train_settings("instant", views=4)}
    with torch.inference_mode():
        learned = nodes.Train.execute(examples, clip_vision=clip_vision, **chosen).args[0]
        assert learned.backbone == "clip-64-98" and learned.layers.read and learned.layers.propagate
        mask = nodes.Segment.execute(learned, image, clip_vision=clip_vision).args[1]
        assert mask.shape == image.shape[:3]
        with pytest.raises(SlimeError, match="SLiMe Train: No model is connected"):
            nodes.Train.execute(examples, **chosen)
        with pytest.raises(SlimeError, match="SLiMe Segment: Connect an image or a latent"):
            nodes.Segment.execute(learned, clip_vision=clip_vision)
        with pytest.raises(SlimeError, match="needs pixels"):
            nodes.Segment.execute(learned, latent={"samples": torch.zeros(1, 4, 8, 8)}, clip_vision=clip_vision)
        with pytest.raises(SlimeError, match="cannot read"):
            nodes.Segment.execute(learned, image, clip_vision=object())
        with pytest.raises(SlimeError, match="not a vision encoder that SLiMe supports"):
            nodes.Segment.execute(
                learned, image, clip_vision=SimpleNamespace(**{**vars(clip_vision), "model": torch.nn.Identity()})
            )


def test_nodes_with_both_and_with_latents(nodes, monkeypatch) -> None:
    monkeypatch.setattr(vit, "TOKENS", 12)
    clip_vision, _ = comfy_vision("dinov2")
    backbone = load_backbone(MODEL)
    loaded = {"model": backbone.model, "vae": backbone.vae, "clip": backbone.clip}
    examples, image = (toy_example(0),), toy_example(1).image[None]
    chosen = {"preset": "instant", "settings": train_settings("instant", views=4)}
    with torch.inference_mode():
        both = nodes.Train.execute(examples, **loaded, clip_vision=clip_vision, **chosen).args[0]
        assert both.backbone.endswith("+dinov2-64")
        assert both.layers.propagate == tuple(f"tiny:{name}" for name in backbone.default_layers().propagate)
        nodes.Segment.execute(both, image, **loaded, clip_vision=clip_vision)
        with pytest.raises(SlimeError, match="Connect dinov2-64 as well"):
            nodes.Segment.execute(both, image, **loaded)

        alone = nodes.Train.execute(examples, **loaded, **chosen).args[0]
        latent = {"samples": backbone.vae.encode(resize_image(image, (256, 256)))}
        loaded.pop("vae")  # which nobody needs any more
        parts, mask = nodes.Segment.execute(alone, image, latent=latent, **loaded).args
        assert mask.shape == image.shape[:3] and mask.any()
        guessed, small = nodes.Segment.execute(alone, latent=latent, **loaded).args
        assert small.shape == (1, 256, 256) == guessed.images.shape[:3] and small.any()
        with pytest.raises(SlimeError, match="closeups and tiles need pixels"):
            nodes.Segment.execute(alone, latent=latent, closeups=1, **loaded)
        with pytest.raises(SlimeError, match="does not belong to this model"):
            nodes.Segment.execute(alone, latent={"samples": torch.zeros(1, 16, 8, 8)}, **loaded)


def test_an_encoder_that_hooks_do_not_reach_says_so(monkeypatch) -> None:
    backbone = small_encoder()
    monkeypatch.setattr(backbone, "run", lambda pixels: None)  # as a compiled one that was called before
    with pytest.raises(SlimeError, match="compiled or patched"):
        features_of(backbone, (84, 84), LayerChoice(("block.2",), ()))
