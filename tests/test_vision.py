"""Vision encoders: ComfyUI's classes and transformers' on the same random weights, and both kinds of eyes together."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.random_models import randomise
from slime import SegmentSettings, SlimeError, load_embeddings, preset, save_embeddings, segment, train
from slime.backbones import vision
from slime.backbones.base import Plan, seeded_noise
from slime.backbones.joined import Joined
from slime.backbones.layers import LayerChoice
from slime.backbones.transformers import TransformersVision
from slime.images import resize_image
from slime.segment import look, read_look
from slime.training import probe
from testing.inprocess import NAME, import_comfyui, load_backbone, load_extension
from testing.server import MODEL
from testing.toy_unet import ToyUNet

from .test_learning import picture, score

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PATCH = 14


def transformers_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    classes = {
        "dinov2": ("Dinov2Config", "Dinov2Model", {"image_size": 98, "patch_size": PATCH, "mlp_ratio": 4}),
        "dinov2-registers": (
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersModel",
            {"image_size": 98, "patch_size": PATCH, "mlp_ratio": 4},
        ),
        "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"intermediate_size": 256, "num_register_tokens": 4}),
        "clip": ("CLIPVisionConfig", "CLIPVisionModel", {"image_size": 98, "patch_size": PATCH}),
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {"image_size": 96, "patch_size": 16}),
    }
    config, model, more = classes[kind]
    if kind in ("clip", "siglip"):
        more["intermediate_size"] = 256
    torch.manual_seed(1)
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **more))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "layer_scale" in name:  # else a block says next to nothing
                parameter.fill_(1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.08)
    return made.eval()


def comfy_vision(kind: str) -> Any:
    """A CLIP_VISION as Load CLIP Vision gives it, and transformers' model with the same weights."""
    import_comfyui()
    load_extension()
    import comfy.clip_vision
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    source = transformers_model(kind)
    config = source.config.to_dict() | {"layer_norm_eps": source.config.layer_norm_eps}
    config["model_type"] = {"dinov3": "dinov3", "dinov2": "dinov2"}.get(kind, f"{kind}_vision_model")
    model_class = comfy.clip_vision.IMAGE_ENCODERS.get(config["model_type"])
    if model_class is None:
        pytest.skip(f"this ComfyUI has no {kind}")
    if kind == "dinov2":
        config["image_size"] = 518  # all that older ComfyUIs know
    model = model_class(config, torch.float32, torch.device("cpu"), comfy.ops.manual_cast)
    state = source.state_dict()
    if kind == "dinov2":
        state["embeddings.position_embeddings"] = 0.3 * torch.randn(1, 37**2 + 1, SIZES["hidden_size"])
        source = resized_dinov2(source, state)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [key for key in missing if "projection" not in key or "patch" in key], missing
    standard = TransformersVision(source)
    loaded = SimpleNamespace(
        model=model.eval(),
        patcher=comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")),
        load_device=torch.device("cpu"),
        image_mean=standard._mean.flatten().tolist(),
        image_std=standard._std.flatten().tolist(),
        image_size=config.get("image_size", 224),
    )
    return loaded, source


def resized_dinov2(source: Any, state: dict[str, torch.Tensor]) -> Any:
    """The same model with positions for 518 pixels."""
    import transformers

    made = transformers.Dinov2Model(transformers.Dinov2Config(**{**source.config.to_dict(), "image_size": 518}))
    made.load_state_dict(state)
    return made.eval()


@pytest.fixture
def nodes(extension, monkeypatch):
    from comfy_api.latest import ui
    from slime_extension.nodes import look as look_nodes
    from slime_extension.nodes import segment as segment_nodes
    from slime_extension.nodes import train as train_nodes

    monkeypatch.setattr(ui, "PreviewImage", lambda *a, **k: SimpleNamespace(as_dict=lambda: {"images": []}))
    monkeypatch.setattr(train_nodes.SLiMeTrain, "hidden", SimpleNamespace(unique_id="1"), raising=False)
    return SimpleNamespace(
        Train=train_nodes.SLiMeTrain,
        Segment=segment_nodes.SLiMeSegment,
        Look=look_nodes.SLiMeLook,
        ReadParts=look_nodes.SLiMeReadParts,
    )


def shown(backbone: Any, size: tuple[int, int], layers: LayerChoice) -> Any:
    images = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(5))
    encoded = backbone.encode_images(images)
    return images, backbone.observe(encoded, Plan(layers, {}, 0), seeded_noise(encoded.shape, 0, backbone.device))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-registers", "dinov3", "clip", "siglip"])
def test_features_are_the_models_own_tokens_at_any_aspect(kind: str) -> None:
    model = transformers_model(kind)
    backbone = TransformersVision(model)
    backbone.cells = 10  # its square has 100 cells
    patch, last = backbone.patch, backbone.layers[-1].name
    images, seen = shown(backbone, (8 * patch, 12 * patch), LayerChoice((last,), ("block.0",)))
    pixels = (images.movedim(-1, 1) - backbone._mean) / backbone._std
    with torch.no_grad():
        own = model(pixels, **backbone._more).last_hidden_state
        if kind == "clip":
            own = model.vision_model.post_layernorm(own)
    (maps,) = seen.features
    assert maps.shape == (2, 64, 8, 12) and seen.grid == (8, 12)
    assert torch.allclose(maps.flatten(2).transpose(1, 2), own[:, -96:], atol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "clip", "siglip"])
def test_comfyui_and_transformers_agree(kind: str) -> None:
    loaded, source = comfy_vision(kind)
    comfy = importlib.import_module(f"{NAME}.nodes.comfy_vision").ComfyVision(loaded)
    theirs = TransformersVision(source)
    assert comfy.info == theirs.info
    size = {"dinov2": (28, 42), "dinov3": (32, 48), "clip": (12, 18), "siglip": (10, 14)}[kind]
    for backbone in (comfy, theirs):
        backbone.cells = round((size[0] * size[1]) ** 0.5)
    size = (size[0] * comfy.patch, size[1] * comfy.patch)
    layers = LayerChoice(tuple(layer.name for layer in comfy.layers), ("block.1", "block.2"))
    with torch.inference_mode():
        ours, others = (shown(backbone, size, layers)[1] for backbone in (comfy, theirs))
    scale = others.features[0].abs().max()
    assert torch.allclose(ours.features[0], others.features[0], atol=2e-4 * float(scale))
    for one, other in zip(ours.attention, others.attention, strict=True):
        assert torch.allclose(one.query, other.query, atol=1e-3) and torch.allclose(one.key, other.key, atol=1e-3)
    assert not any(module._forward_hooks for module in (*comfy.module.modules(), *source.modules()))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_attention_is_the_models_own(kind: str) -> None:
    """The recorded queries and keys give the probabilities that the model itself reports, rotation included."""
    model = transformers_model(kind)
    model.set_attn_implementation("eager")
    backbone = TransformersVision(model)
    backbone.cells = 6
    patch = backbone.patch
    images, seen = shown(backbone, (6 * patch, 6 * patch), LayerChoice((), ("block.1",)))
    pixels = (images.movedim(-1, 1) - backbone._mean) / backbone._std
    with torch.no_grad():
        theirs = model(pixels, output_attentions=True).attentions[1][:, :, -36:, -36:]
    query, key = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in seen.attention[0][:2])
    ours = (query @ key.transpose(2, 3) / 4).softmax(-1)
    assert torch.allclose(ours, theirs / theirs.sum(-1, keepdim=True), atol=1e-5)


def test_a_pass_ends_after_the_last_layer_that_is_read() -> None:
    backbone = TransformersVision(transformers_model("dinov2"))
    backbone.cells = 6
    ran: list[int] = []
    for number, block in enumerate(backbone.module.encoder.layer):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    shown(backbone, (84, 84), LayerChoice(("block.0",), ("block.1",)))
    assert 2 not in ran


def small_encoder(cell: int = 0) -> TransformersVision:
    backbone = TransformersVision(transformers_model("dinov2"), cell)
    backbone.cells = 12
    if not cell:
        object.__setattr__(backbone.info, "side", 12 * PATCH)
    return backbone


def test_an_encoder_alone_learns_parts(tmp_path) -> None:
    backbone = small_encoder()
    learned = train(backbone, [picture(0)], preset("instant", backbone.info, views=6))
    assert learned.backbone == "dinov2-64" and learned.layers.read == ("block.2",) and learned.layers.propagate
    assert score(learned, backbone) > 0.6
    saved = load_embeddings(save_embeddings(learned, tmp_path / "eye.safetensors"))
    images = picture(1).image[None]
    maps = segment(backbone, images, saved)[0].label_map
    assert torch.equal(maps, segment(backbone, images, learned)[0].label_map)
    assert torch.equal(maps, read_look(look(backbone, images, saved), saved).label_map)
    segment(backbone, images, saved, SegmentSettings(zoom=1))
    with pytest.raises(SlimeError, match="text of a Stable Diffusion"):
        train(backbone, [picture(0)], preset("paper", steps=1))


def test_two_look_together(monkeypatch) -> None:
    toy = ToyUNet()
    both = Joined(toy, small_encoder(toy.info.cell))
    learned = train(both, [picture(0)], preset("instant", both.info, views=6))
    assert learned.backbone == "toy+dinov2-64" and "block.2" in learned.layers.read
    assert set(learned.layers.propagate) == set(toy.default_layers().propagate)
    assert len(learned.rows) == 1 + len({layer.stride for layer in toy.layers if layer.name in learned.layers.read})
    assert score(learned, both) > 0.8
    probed = train(both, [picture(0)], preset("instant", views=4, read_layers="auto", propagate_layers="auto"))
    assert score(probed, both) > 0.8
    every = tuple(layer.name for layer in both.layers)
    plan = Plan(LayerChoice(every, ()), both.condition(""), 100, "layer")
    looked = probe._look(both, [picture(0)], preset("instant", views=4), plan, lambda _: None).features
    sizes = {name: maps[0].shape[-1] for name, maps in looked.items()}
    assert sizes == {"output.3.0": 4, "output.6.0": 8, "output.9.0": 16, "block.0": 12, "block.1": 12, "block.2": 12}
    monkeypatch.setattr(toy, "identity", lambda: (toy, 0), raising=False)
    assert both.identity() is None, "of the encoder nothing is known"
    with pytest.raises(SlimeError, match="Connect dinov2-64 as well"):
        segment(toy, picture(1).image[None], learned)
    alone = train(toy, [picture(0)], preset("instant", toy.info, views=4))
    with pytest.raises(SlimeError, match="Disconnect dinov2-64"):
        segment(both, picture(1).image[None], alone)
    with pytest.raises(SlimeError, match="family"):
        segment(small_encoder(), picture(1).image[None], alone)
    with pytest.raises(SlimeError, match="together"):
        Joined(toy, small_encoder())
    with pytest.raises(SlimeError, match="checkpoint alone"):
        train(both, [picture(0)], preset("paper", steps=1))


def test_latents_spare_the_encoding() -> None:
    toy = ToyUNet()
    learned = train(toy, [picture(0)], preset("instant", toy.info, views=4))
    images = torch.stack([picture(1).image, picture(2).image])
    latents = toy.encode_images(images)
    before = toy.encoded
    maps = segment(toy, images, learned, latents=latents)[0].label_map
    assert toy.encoded == before
    assert torch.equal(maps, read_look(look(toy, images, learned, latents=latents), learned).label_map)
    assert (maps == segment(toy, images, learned)[0].label_map).float().mean() > 0.97
    twice = torch.nn.functional.interpolate(latents, scale_factor=2.0, mode="nearest")
    assert (maps == segment(toy, images, learned, latents=twice)[0].label_map).float().mean() > 0.97
    sizes = {one.batches[0][1][0][1].grid for one in (look(toy, images, learned, latents=x) for x in (latents, twice))}
    assert len(sizes) == 1, "latents come to the model's own size"
    mirrored = SegmentSettings(flip=True, draws=2)
    both = [segment(toy, images, learned, mirrored, latents=given)[0].label_map for given in (latents, None)]
    assert (both[0] == both[1]).float().mean() > 0.97
    segment(toy, images, learned, SegmentSettings(zoom=1), latents=latents)
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
    assert backbone.info.id == "siglip2-64-128" and backbone.cells == 16 and backbone.default_layers().read == ()
    with torch.inference_mode():
        images, seen = shown(backbone, (12 * 16, 21 * 16), LayerChoice(("block.2",), ("block.1",)))
        own = model.vision_model((images.movedim(-1, 1) - 0.5) / 0.5)[0]
    assert seen.grid == (12, 21)
    assert torch.allclose(seen.features[0].flatten(2).transpose(1, 2), own, atol=1e-4)


def test_nodes_look_with_an_encoder_alone(nodes, monkeypatch) -> None:
    clip_vision, _ = comfy_vision("clip")
    examples, image = (picture(0),), picture(1).image[None]
    chosen = {"preset": "instant", "steps": 20, "learning_rate": 0.0, "seed": 0, "views": 4}
    with torch.inference_mode():
        learned = nodes.Train.execute(examples, clip_vision=clip_vision, **chosen).args[0]
        assert learned.backbone == "clip-64-98" and learned.layers.read and learned.layers.propagate
        mask = nodes.Segment.execute(learned, image, clip_vision=clip_vision).args[1]
        seen = nodes.Look.execute(learned, image, clip_vision=clip_vision).args[0]
        assert torch.equal(mask, nodes.ReadParts.execute(seen, learned).args[1])
        with pytest.raises(SlimeError, match="SLiMe Train: Nothing to look with"):
            nodes.Train.execute(examples, **chosen)
        with pytest.raises(SlimeError, match="SLiMe Segment: Nothing to look at"):
            nodes.Segment.execute(learned, clip_vision=clip_vision)
        with pytest.raises(SlimeError, match="looks at pixels"):
            nodes.Look.execute(learned, latent={"samples": torch.zeros(1, 4, 8, 8)}, clip_vision=clip_vision)
        with pytest.raises(SlimeError, match="cannot read"):
            nodes.Segment.execute(learned, image, clip_vision=object())
        with pytest.raises(SlimeError, match="does not know"):
            nodes.Segment.execute(
                learned, image, clip_vision=SimpleNamespace(**{**vars(clip_vision), "model": torch.nn.Identity()})
            )


def test_nodes_look_with_both_and_at_latents(nodes, monkeypatch) -> None:
    monkeypatch.setattr(vision, "CELLS", 12)
    clip_vision, _ = comfy_vision("dinov2")
    backbone = load_backbone(MODEL)
    loaded = {"model": backbone.model, "vae": backbone.vae, "clip": backbone.clip}
    examples, image = (picture(0),), picture(1).image[None]
    chosen = {"preset": "instant", "steps": 20, "learning_rate": 0.0, "seed": 0, "views": 4}
    with torch.inference_mode():
        both = nodes.Train.execute(examples, **loaded, clip_vision=clip_vision, **chosen).args[0]
        assert both.backbone.endswith("+dinov2-64")
        assert both.layers.propagate == backbone.default_layers().propagate
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
        seen = nodes.Look.execute(alone, latent=latent, **loaded).args[0]
        assert torch.equal(small, nodes.ReadParts.execute(seen, alone).args[1])
        encoded = nodes.Train.execute(examples, clip_vision=clip_vision, **chosen).args[0]
        again = nodes.Look.execute(encoded, seen.images, clip_vision=clip_vision, previous=seen).args[0]
        assert torch.equal(small, nodes.ReadParts.execute(again, alone).args[1])
        assert nodes.ReadParts.execute(again, encoded).args[1].any()
        with pytest.raises(SlimeError, match="zoom and crops look at pixels"):
            nodes.Segment.execute(alone, latent=latent, zoom=1, **loaded)
        with pytest.raises(SlimeError, match="not of this model"):
            nodes.Segment.execute(alone, latent={"samples": torch.zeros(1, 16, 8, 8)}, **loaded)


def test_an_encoder_that_hooks_do_not_reach_says_so(monkeypatch) -> None:
    backbone = small_encoder()
    monkeypatch.setattr(backbone, "run", lambda pixels: None)  # as a compiled one that was called before
    with pytest.raises(SlimeError, match="compiled or patched"):
        shown(backbone, (84, 84), LayerChoice(("block.2",), ()))
