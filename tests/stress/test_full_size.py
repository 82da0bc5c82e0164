"""One step on models of full size with random weights: SD1.5 as a checkpoint file, SDXL's layout reduced.

Slow: ``python dev.py test -m slow``.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from slime import SlimeError, load_embeddings, preset, save_embeddings, segment, train
from slime.backbones.base import ExtractionSpec, seeded_noise
from slime.backbones.load import load_model
from testing import splits
from testing.models import comfy_patcher
from testing.random_models import VAE, random_dinov2, random_state, random_weight, unet_config
from testing.toy import all_vectors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sd15_file(extension, tmp_path_factory):
    """A 2 GB SD1.5 checkpoint with random half-precision weights."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("sd15") / "random_sd15.safetensors"
    save_file(random_sd15_state(), str(path))
    return path


@pytest.fixture(scope="module")
def sd15(sd15_file):
    """The same, read by ComfyUI's stock loader."""
    import comfy.sd
    import comfy.supported_models

    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(sd15_file), output_vae=True, output_clip=True)
        adapter = importlib.import_module("slime_extension.nodes.comfy_unet")
        return adapter.ComfyUNet(model, vae, clip)


def random_sd15_state() -> dict[str, torch.Tensor]:
    """Every tensor of an SD1.5 checkpoint, in the shapes of ComfyUI's own classes."""
    import comfy.ops
    from comfy import sd1_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    parts = {
        "model.diffusion_model.": UNetModel(
            **unet_config("sd1"), device="meta", dtype=torch.float16, operations=comfy.ops.disable_weight_init
        ),
        "first_stage_model.": AutoencoderKL(embed_dim=4, ddconfig=VAE),
        "cond_stage_model.": sd1_clip.SDClipModel(device="cpu", dtype=torch.float16),
    }
    generator = torch.Generator().manual_seed(0)
    state = {}
    for prefix, module in parts.items():
        for name, tensor in module.state_dict().items():
            if name.startswith(("logit_scale", "text_projection", "transformer.text_projection")):
                continue
            value = random_weight(name, tensor, generator)
            state[prefix + name] = value.half().contiguous()
    return state


def test_sd15_learns_and_segments_one_step(sd15, tmp_path) -> None:
    """Stock loading, family and layers recognised, one instant fit, one full-gradient step, one segmentation."""
    assert sd15.info.id == "sd1" and sd15.prediction == "eps" and len(sd15.layers) == 16
    example = splits.example("car", splits.EXAMPLES)
    with torch.inference_mode():
        embeddings = train(sd15, [example], preset("instant", sd15.info, views=1))
        assert all_vectors(embeddings).shape == (2, 5, 768) and torch.isfinite(all_vectors(embeddings)).all()
        assert save_embeddings(embeddings, tmp_path / "e.safetensors").stat().st_size < 300_000
        maps = segment(sd15, example.image[None], load_embeddings(tmp_path / "e.safetensors"))[0]
        assert maps.probabilities.shape == (1, 6, 256, 256)
        reports = []
        settings = preset("paper", sd15.info, views=1, steps=1, checkpointing=True)
        stepped = train(sd15, [example], settings, on_step=reports.append)
    assert torch.isfinite(all_vectors(stepped)).all() and set(reports[-1].losses) == {"loss", "ce", "was", "sd"}


def test_a_checkpoint_file_is_read_without_a_hub(sd15, sd15_file) -> None:
    """By diffusers' classes and shapes alone; it shows what ComfyUI's loader shows."""
    ours = load_model(str(sd15_file), "cpu")
    assert ours.info.id == sd15.info.id and ours.default_layers() == sd15.default_layers()
    with torch.inference_mode():
        own, theirs = (backbone.condition("") for backbone in (ours, sd15))
        torch.testing.assert_close(own["context"].float(), theirs["context"].float(), rtol=1e-2, atol=1e-2)
        image = torch.rand(1, 128, 128, 3)
        latents = [backbone.encode_images(image).float() for backbone in (ours, sd15)]
        torch.testing.assert_close(latents[0], latents[1], rtol=1e-2, atol=1e-2)
        plan = ExtractionSpec(ours.default_layers(), theirs, ours.info.timestep)
        noise = seeded_noise(latents[0].shape, 0, torch.device("cpu"))
        seen, known = (backbone.extract(latents[0], plan, noise) for backbone in (ours, sd15))
    assert seen.groups.keys() == known.groups.keys()
    for group, maps in seen.groups.items():
        expected = known.groups[group].float().ravel()
        assert torch.nn.functional.cosine_similarity(maps.float().ravel(), expected, 0) > 0.999
    with pytest.raises(SlimeError, match="only the empty prompt"):
        ours.condition("a wheel")


def test_sdxl_layout_learns_and_segments_one_step(extension, monkeypatch) -> None:
    """SDXL's blocks, depths and size conditioning at a tenth of its width; latents stand in for the VAE's."""
    from types import SimpleNamespace

    adapter = importlib.import_module("slime_extension.nodes.comfy_unet")
    patcher = comfy_patcher("sdxl")
    vae = SimpleNamespace(
        encode=lambda pixels: torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]
    )
    clip = SimpleNamespace(
        tokenize=lambda text: text,
        encode_from_tokens=lambda tokens, return_pooled: (torch.randn(1, 77, 2048) * 0.3, torch.randn(1, 32)),
    )
    example = splits.example("horse", splits.EXAMPLES)
    with torch.inference_mode():
        denoiser = adapter.ComfyUNet(patcher, vae, clip)
        monkeypatch.setattr(denoiser, "info", replace(denoiser.info, side=256))
        embeddings = train(denoiser, [example], preset("instant", denoiser.info, views=2))
        assert embeddings.condition["pooled"].ndim == 1
        assert {name.split(".")[1] for name in embeddings.layers.read} == set("012345")
        assert len(embeddings.layers.read) == 36 and len(embeddings.layers.propagate) == 6
        assert segment(denoiser, example.image[None], embeddings)[0].probabilities.shape == (1, 5, 256, 256)
        stepped = train(denoiser, [example], preset("paper", denoiser.info, views=1, steps=1))
    assert torch.isfinite(all_vectors(stepped)).all()


def test_dinov2_large_looks(extension) -> None:
    """Read by ComfyUI's stock loader, at its 60 x 60 cells."""
    with torch.inference_mode():
        backbone = importlib.import_module("slime_extension.nodes.comfy_vision").ComfyVision(random_dinov2())
        assert backbone.info.id == "dinov2-1024" and len(backbone.layers) == 24 and backbone.info.side == 840
        example = splits.example("car", splits.EXAMPLES)
        settings = preset("instant", backbone.info, views=1, propagate_layers="block.11")
        embeddings = train(backbone, [example], settings)
        assert all_vectors(embeddings).shape == (1, 5, 1024) and embeddings.layers.read == ("block.23",)
        assert segment(backbone, example.image[None], embeddings)[0].probabilities.shape == (1, 6, 256, 256)


def test_sd35_medium_looks(extension, monkeypatch) -> None:
    """2.5 billion weights, read by ComfyUI's stock loader; latents and text stand in for those of VAE and CLIP."""
    from types import SimpleNamespace

    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}}
    shapes = OpenAISignatureMMDITWrapper(
        in_channels=16,
        depth=24,
        input_size=None,
        adm_in_channels=2048,
        context_embedder_config=context,
        num_patches=384**2,
        pos_embed_max_size=384,
        qk_norm="rms",
        x_block_self_attn_layers=list(range(13)),
        device=torch.device("meta"),
        dtype=torch.float16,
        operations=comfy.ops.disable_weight_init,
    )
    vae = SimpleNamespace(
        downscale_ratio=8,
        encode=lambda pixels: torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16],
    )
    given = {"cond": torch.randn(1, 77, 4096) * 0.3, "pooled_output": torch.randn(1, 2048)}
    clip = SimpleNamespace(tokenize=str, encode_from_tokens=lambda text, return_pooled, return_dict: given)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(random_state(shapes))
        backbone = importlib.import_module("slime_extension.nodes.comfy_flow").ComfyFlow(model, vae, clip)
        assert backbone.info.id == "sd3-1536x24" and backbone.info.side == 1024 and backbone.info.timestep == 500
        monkeypatch.setattr(backbone, "info", replace(backbone.info, side=256))
        example = splits.example("horse", splits.EXAMPLES)
        embeddings = train(backbone, [example], preset("instant", backbone.info, views=1))
        assert all_vectors(embeddings).shape == (1, 4, 1536) and embeddings.layers.read == ("joint.9",)
        assert segment(backbone, example.image[None], embeddings)[0].probabilities.shape == (1, 5, 256, 256)
