"""Flow transformers: small random models of ComfyUI's real classes."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slime import PartEmbeddings, SlimeError, decode, extract, load_embeddings, preset, save_embeddings, segment, train
from slime.backbones.base import ExtractionSpec
from slime.backbones.layers import LayerChoice
from testing.random_models import FLOWS, flow_patcher, flow_text
from testing.toy import toy_example

ROTATED = ("flux", "flux2", "chroma", "qwen-image")  # places enter the queries and keys alone
GRID = (4, 6)


@pytest.fixture(params=list(FLOWS))
def kind(request, extension) -> str:
    import comfy.model_base

    if not hasattr(comfy.model_base, FLOWS[request.param][1]):
        pytest.skip("this ComfyUI has none")
    return str(request.param)


class Pixels:
    """A VAE that averages pixels; latents of as many channels as wanted."""

    def __init__(self, channels: int, frames: bool = False, cell: int = 8) -> None:
        self.channels, self.latent_dim, self.downscale_ratio = channels, 3 if frames else 2, cell
        self.patcher = SimpleNamespace(model=torch.nn.Identity(), patches_uuid="0")

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), self.downscale_ratio) * 2 - 1
        latents = cells.repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]
        return latents[None].movedim(1, 2) if self.latent_dim == 3 else latents


def backbone_of(kind: str, patcher: Any = None) -> Any:
    module = importlib.import_module("slime_extension.nodes.comfy_flow")
    patcher = patcher or flow_patcher(kind)
    given = flow_text(kind)
    clip = SimpleNamespace(
        tokenize=lambda text: text,
        encode_from_tokens=lambda text, return_pooled, return_dict: {
            "cond": given["text"][None],
            "pooled_output": given["pooled_output"][None] if "pooled_output" in given else None,
        },
    )
    channels = patcher.model.latent_format.latent_channels
    frames = getattr(patcher.model.latent_format, "latent_dimensions", 2) == 3
    return module.ComfyFlow(patcher, Pixels(channels, frames, 16 if kind == "flux2" else 8), clip)


def latents_for(backbone: Any, grid: tuple[int, int] = GRID, count: int = 2) -> torch.Tensor:
    size = (side * backbone.layers[0].stride for side in grid)
    return torch.randn(count, backbone.info.channels, *size, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def seen(backbone: Any, kind: str, latents: torch.Tensor, read: tuple[str, ...], propagate: tuple[str, ...]) -> Any:
    plan = ExtractionSpec(LayerChoice(read, propagate), flow_text(kind), 260, "layer")
    return backbone.extract(latents, plan, torch.zeros_like(latents))


def only(features: Any) -> torch.Tensor:
    (maps,) = features.groups.values()
    return maps


def test_tokens_stand_in_the_images_order(kind: str) -> None:
    """A patch that changes shows at its own place, in the values and in queries and keys."""
    backbone = backbone_of(kind)
    first, latents = next(iter(backbone._blocks)), latents_for(backbone)
    stride = backbone.layers[0].stride
    before = seen(backbone, kind, latents, (first,), (first,))
    for y, x in ((0, 0), (1, 4), (3, 2)):
        changed = latents.clone()
        changed[:, :, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride] += 3
        after = seen(backbone, kind, changed, (first,), (first,))
        moved = (only(after) - only(before)).square().sum(1)
        assert (moved.flatten(1).argmax(1) == y * GRID[1] + x).all()
        for one, other in zip(after.attention[0][:2], before.attention[0][:2], strict=True):
            assert ((one - other).square().sum(2).argmax(1) == y * GRID[1] + x).all()


@pytest.mark.parametrize("kind", ROTATED, indirect=True)
def test_features_carry_no_rotation_by_place(kind: str) -> None:
    backbone = backbone_of(kind)
    first, latents = next(iter(backbone._blocks)), latents_for(backbone)
    same = latents[:, :, :1, :1].expand_as(latents)
    found = seen(backbone, kind, same, (first,), (first,))
    maps = only(found)
    assert torch.allclose(maps, maps[:, :, :1, :1].expand_as(maps), atol=1e-5 * float(maps.abs().max()))
    query = found.attention[0].query
    assert not torch.allclose(query, query[:, :1].expand_as(query), atol=1e-2 * float(query.abs().max()))


def test_reading_many_blocks_reads_what_each_alone_reads_and_ends_early(kind: str) -> None:
    backbone, ran = backbone_of(kind), []
    names, latents = list(backbone._blocks), latents_for(backbone)
    handles = [
        block.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, block in backbone._blocks.items()
    ]
    read = (names[0], names[2])
    together = seen(backbone, kind, latents, read, read)
    assert names[3] not in ran
    for handle in handles:
        handle.remove()
    for place, (name, group) in enumerate(zip(read, together.groups, strict=True)):
        alone = seen(backbone, kind, latents, (name,), (name,))
        assert torch.equal(only(alone), together.groups[group])
        assert torch.equal(alone.attention[0].key, together.attention[place].key)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in backbone._blocks.values())


@torch.inference_mode()
def test_the_model_is_as_it_was(kind: str) -> None:
    """Sampling gives the same bits before and after, also after an error in the middle."""
    backbone = backbone_of(kind)
    noisy = latents_for(backbone)
    frames = noisy.unsqueeze(2) if backbone._of_video else noisy

    def sampled() -> torch.Tensor:
        given = {name: one[None] for name, one in flow_text(kind).items()}
        given.setdefault("pooled_output", None)
        base = backbone.model.model
        conds = base.extra_conds(cross_attn=given.pop("text"), noise=frames, device="cpu", width=96, height=64, **given)
        made = {name: one.process_cond(batch_size=2, device="cpu", area=None).cond for name, one in conds.items()}
        return base.apply_model(frames, torch.full((2,), 0.7), transformer_options={}, **made)

    before = sampled()
    last = list(backbone._blocks)[-1]
    seen(backbone, kind, noisy, (last,), (last,))
    assert torch.equal(before, sampled())

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = backbone._blocks[last].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        seen(backbone, kind, noisy, (last,), (last,))
    handle.remove()
    assert torch.equal(before, sampled())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in backbone._blocks.values())


def test_parts_are_learned_saved_and_found(kind: str, tmp_path) -> None:
    backbone = backbone_of(kind)
    side = 12 * backbone.info.multiple
    object.__setattr__(backbone.info, "side", side)
    with torch.inference_mode():
        learned = train(backbone, [toy_example(0)], preset("instant", backbone.info, views=4))
    assert learned.layers.read and learned.layers.propagate and learned.timestep == backbone.info.timestep
    again = load_embeddings(save_embeddings(learned, tmp_path / "flow.safetensors"))
    images = torch.stack([toy_example(1).image, toy_example(2).image])
    backbone.clip = None  # the file holds the text
    with torch.inference_mode():
        maps = segment(backbone, images, again)[0].label_map
        assert torch.equal(maps, decode(extract(backbone, images, again), again).label_map)
        latents = backbone.encode_images(images.repeat_interleave(2, 1).repeat_interleave(2, 2))
        assert segment(backbone, images, again, latents=latents)[0].label_map.shape == maps.shape
        with pytest.raises(SlimeError, match="text of a Stable Diffusion"):
            train(backbone, [toy_example(0)], preset("paper", steps=1))


def test_what_is_published_is_read(extension) -> None:
    flow = importlib.import_module("slime_extension.nodes.comfy_flow")
    by_name = {family.name: family for family in flow.FAMILIES}
    patcher = flow_patcher("sd3")
    own = {"name": "own", "base": (), "read": ("joint.1",), "propagate": ("joint.2",), "side": 64, "views": 3}
    type(patcher.model.model_config).slime_flow = own
    try:
        backbone = flow.ComfyFlow(patcher)
    finally:
        del type(patcher.model.model_config).slime_flow
    assert backbone.default_layers() == LayerChoice(("joint.1",), ("joint.2",))
    assert backbone.info.side == 64 and backbone.info.views == 3 and backbone.info.id == "own-256x4-plain"
    assert by_name["flux"].read == ("single.9",) and by_name["sd3"].noise == 500
    assert flow.ComfyFlow(patcher).default_layers() == LayerChoice((), ())  # it has no block 9


def test_other_models_are_refused(extension) -> None:
    from slime_extension.nodes.backbones import build_backbone
    from slime_extension.nodes.comfy_flow import ComfyFlow

    from testing.models import comfy_patcher

    patcher = flow_patcher("flux")
    assert isinstance(build_backbone(patcher, None, None, None), ComfyFlow)
    with pytest.raises(SlimeError, match="is not supported. The supported flow models"):
        ComfyFlow(comfy_patcher("sd1"))
    with pytest.raises(SlimeError, match="Connect the VAE"):
        ComfyFlow(patcher).encode_images(torch.rand(1, 64, 64, 3))
    with pytest.raises(SlimeError, match="Connect the CLIP"):
        ComfyFlow(patcher).condition("")
    with pytest.raises(SlimeError, match="4 channels, the model needs 16"):
        ComfyFlow(patcher, Pixels(4)).encode_images(torch.rand(1, 64, 64, 3))
    with torch.inference_mode():
        patcher.model.diffusion_model.img_in.weight = torch.nn.Parameter(torch.zeros(96, 384), requires_grad=False)
    with pytest.raises(SlimeError, match="96 channels, as filling"):
        ComfyFlow(patcher)


def test_a_text_of_another_shape_in_a_file_is_refused(tmp_path) -> None:
    layers, text = LayerChoice(("single.9",), ()), {"text": torch.zeros(2, 3, 4)}
    made = PartEmbeddings(("a",), {"g": torch.zeros(1, 8)}, text, "", "flux-1", layers, 260, 64)
    with pytest.raises(SlimeError, match="damaged"):
        load_embeddings(save_embeddings(made, tmp_path / "x.safetensors"))


@pytest.mark.parametrize("kind", ["flux", "sd3.5"], indirect=True)
def test_loras_and_small_weights_are_seen(kind: str) -> None:
    """A LoRA changes what is seen as merging it does; weights of 8 bits, cast as they are used, show about the same."""
    plain = backbone_of(kind)
    first, latents = next(iter(plain._blocks)), latents_for(plain)
    before = only(seen(plain, kind, latents, (first,), (first,)))
    of_image = ("img_attn.qkv.weight", "x_block.attn.qkv.weight")
    key = next(name for name, _ in plain.model.model.named_parameters() if name.endswith(of_image))
    weight = plain.model.model.state_dict()[key]
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    patched = plain.model.clone()
    patched.add_patches({key: ("diff", (change,))})
    after = only(seen(backbone_of(kind, patched), kind, latents, (first,), (first,)))
    assert not torch.allclose(before, after, atol=1e-3)
    merged = flow_patcher(kind)
    with torch.inference_mode():
        merged.model.state_dict()[key].add_(change)
    wanted = only(seen(backbone_of(kind, merged), kind, latents, (first,), (first,)))
    assert torch.allclose(after, wanted, atol=1e-5)
    again = only(seen(plain, kind, latents, (first,), (first,)))
    assert torch.equal(before, again), "the LoRA stayed"

    small = backbone_of(kind, flow_patcher(kind, dtype=torch.float8_e4m3fn))
    found = only(seen(small, kind, latents, (first,), (first,)))
    assert torch.nn.functional.cosine_similarity(found, before, dim=1).min() > 0.97


def test_a_latent_without_its_image_is_shown_as_comfyui_previews_it(kind: str) -> None:
    from slime_extension.nodes.backbones import resolve_inputs

    backbone = backbone_of(kind)
    samples = torch.randn(2, backbone.info.channels, 8, 12, generator=torch.Generator().manual_seed(2))
    frames = samples.unsqueeze(2) if backbone._of_video else samples
    images, taken = resolve_inputs(None, {"samples": frames}, backbone)
    assert images.shape == (2, 8 * backbone.info.cell, 12 * backbone.info.cell, 3) and taken.shape == samples.shape
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.01
    same, _ = resolve_inputs(images, {"samples": frames}, backbone)
    assert torch.equal(same, images)
    assert (
        backbone_of(kind).info.cell
        == importlib.import_module("slime_extension.nodes.comfy_flow").ComfyFlow(backbone.model).info.cell
    ), "without a VAE"


def test_the_guess_has_the_colours_of_comfyuis_preview(extension) -> None:
    Latent2RGBPreviewer = importlib.import_module("latent_preview").Latent2RGBPreviewer
    from slime_extension.nodes.backbones import resolve_inputs

    backbone = backbone_of("flux")
    kind = backbone.model.model.latent_format
    images, taken = resolve_inputs(None, {"samples": torch.randn(1, 16, 8, 12)}, backbone)
    preview = Latent2RGBPreviewer(kind.latent_rgb_factors, kind.latent_rgb_factors_bias)
    theirs = torch.from_numpy(np.array(preview.decode_latent_to_preview(taken))).float() / 255
    assert (images[0, 4::8, 4::8] - theirs).abs().mean() < 0.05


def test_what_cannot_be_looked_into_says_so(extension) -> None:
    from slime_extension.nodes.comfy_flow import ComfyFlow
    from slime_extension.nodes.comfy_unet import cache_key_of

    backbone = backbone_of("flux")
    latents, name = latents_for(backbone), "single.1"
    wrong = {"text": torch.zeros(13, 24), "pooled_output": torch.zeros(24)}
    with torch.inference_mode(), pytest.raises(SlimeError, match="connect the CLIP"):
        backbone.extract(latents, ExtractionSpec(LayerChoice((name,), ()), wrong, 260), torch.zeros_like(latents))
    with pytest.raises(SlimeError, match="The timestep is 0"):
        backbone.extract(latents, ExtractionSpec(LayerChoice((name,), ()), {}, 0), torch.zeros_like(latents))
    backbone.vae = Pixels(16, frames=True)
    with pytest.raises(SlimeError, match="another kind of model"):
        backbone.encode_images(torch.rand(1, 64, 64, 3))

    block = backbone._blocks[name]
    block.forward = lambda x, *args, **kwargs: x  # as compiled or patched ones do not come by
    with pytest.raises(SlimeError, match="patched or compiled"):
        seen(backbone, "flux", latents, (name,), ())
    del block.forward

    assert cache_key_of(backbone.model, Pixels(16)) is not None
    changed = backbone.model.clone()
    changed.injections = {"bypass_lora": [object()]}
    assert cache_key_of(changed, Pixels(16)) is None
    patcher = flow_patcher("flux")
    patcher.model.diffusion_model = torch.nn.Identity()
    with pytest.raises(SlimeError, match="not ComfyUI's own implementation"):
        ComfyFlow(patcher)


def test_text_beyond_half_precision_is_kept_whole(tmp_path) -> None:
    layers = LayerChoice(("layer.3",), ())
    text = torch.tensor([[1.0, -70_000.0], [0.5, 2.0]])
    made = PartEmbeddings(("a",), {"g": torch.zeros(1, 8)}, {"text": text}, "", "lumina-1", layers, 260, 64)
    kept = load_embeddings(save_embeddings(made, tmp_path / "x.safetensors")).condition
    assert kept is not None and torch.equal(kept["text"], text)
