"""Checkpoint files of SD1.x, SD2.x and SDXL without a hub, at a fraction of their width, against ComfyUI's own code.

The full size of SD1.5 stands in test_full_size.py.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import random_models
from slime.backbones.base import ExtractionSpec, seeded_noise
from slime.backbones.single_file import END, START, UNET, V_NORM, VAE, load_checkpoint
from slime.errors import SlimeError
from testing.inprocess import import_comfyui

WIDTH, TEXT, LAYERS, TOKENS = 64, 64, 3, 49408
OPEN_CLIP = {"sd2": ("cond_stage_model.model.",), "sdxl": ("conditioner.embedders.1.model.",)}
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
PADDING = {"sd1": (END,), "sd2": (0,), "sdxl": (END, 0)}
LAYOUTS = ("sd1", "sd2", "sdxl")


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.ones(shape) if "ln_" in name and name.endswith("weight") else 0.0)
        + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def open_clip(seed: int) -> dict[str, Tensor]:
    """Weights of a small OpenCLIP text tower, as checkpoints name them."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (TOKENS, TEXT),
        "positional_embedding": (77, TEXT),
        "ln_final.weight": (TEXT,),
        "ln_final.bias": (TEXT,),
        "text_projection": (TEXT, TEXT),
    }
    for index in range(LAYERS):
        stem = f"transformer.resblocks.{index}."
        for name, shape in (
            ("ln_1", (TEXT,)),
            ("ln_2", (TEXT,)),
            ("mlp.c_fc", (4 * TEXT, TEXT)),
            ("mlp.c_proj", (TEXT, 4 * TEXT)),
            ("attn.out_proj", (TEXT, TEXT)),
        ):
            shapes |= {f"{stem}{name}.weight": shape, f"{stem}{name}.bias": shape[:1]}
        shapes |= {f"{stem}attn.in_proj_weight": (3 * TEXT, TEXT), f"{stem}attn.in_proj_bias": (3 * TEXT,)}
    return drawn(shapes, seed)


def text_config(**more):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=TOKENS,
        hidden_size=TEXT,
        intermediate_size=4 * TEXT,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        projection_dim=TEXT,
        eos_token_id=END,
        **more,
    )


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, tmp_path_factory):
    """A small checkpoint, ComfyUI's UNet and VAE with its weights, and its text towers as transformers has them."""
    import_comfyui()
    import comfy.utils
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    layout, plain = request.param, random_models.unet_config
    with pytest.MonkeyPatch.context() as patch:
        heads = {} if layout == "sd1" else {"num_head_channels": 64}
        patch.setattr(random_models, "unet_config", lambda *args: plain(*args) | heads)
        patcher = random_models.comfy_patcher(layout, width=WIDTH)
    vae = AutoencoderKL(embed_dim=4, ddconfig=random_models.VAE | {"ch": 32}).eval()
    random_models.randomise(vae, 1)
    state = {UNET + name: tensor.clone() for name, tensor in patcher.model.diffusion_model.state_dict().items()}
    state |= {VAE + name: tensor for name, tensor in vae.state_dict().items()}
    towers = []
    if layout in CLIP:
        tower = CLIPTextModel(text_config(hidden_act="quick_gelu")).eval()
        state |= {CLIP[layout] + name: tensor for name, tensor in tower.state_dict().items()}
        towers.append(tower)
    for prefix in OPEN_CLIP.get(layout, ()):
        weights = open_clip(len(prefix))
        state |= {prefix + name: tensor for name, tensor in weights.items()}
        named = comfy.utils.clip_text_transformers_convert(dict(weights), "", "")
        tower = CLIPTextModelWithProjection(text_config(hidden_act="gelu")).eval()
        missing, unknown = tower.load_state_dict(named, strict=False)
        assert not unknown and not [name for name in missing if "position_ids" not in name]
        towers.append(tower)
    path = tmp_path_factory.mktemp(layout) / f"{layout}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(path))
    return layout, path, patcher, vae, towers


def test_text_is_encoded_as_the_model_wants_it(written) -> None:
    """SD1.x: the last layer, normalised; SD2.x: the last but one, normalised; SDXL: the last but one of both, and G's
    projection of the text's end."""
    layout, path, _, _, towers = written
    found = load_checkpoint(path, "cpu", torch.float32).encode_prompt("")
    rows, pooled = [], None
    with torch.no_grad():
        for tower, padding in zip(towers, PADDING[layout], strict=True):
            seen = tower(torch.tensor([[START, END] + [padding] * 75]), output_hidden_states=True)
            last_but_one = seen.hidden_states[-2]
            if layout == "sd2":
                last_but_one = tower.text_model.final_layer_norm(last_but_one)
            rows.append(seen.last_hidden_state if layout == "sd1" else last_but_one)
            pooled = seen.text_embeds[0] if layout == "sdxl" and hasattr(seen, "text_embeds") else None
    torch.testing.assert_close(found.tokens, torch.cat(rows, -1)[0], rtol=1e-4, atol=1e-4)
    assert (found.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-4)


def test_images_and_features_are_comfyuis(written, extension) -> None:
    from slime_extension.nodes.comfy_unet import ComfyUNet

    layout, path, patcher, vae, _ = written
    ours = load_checkpoint(path, "cpu", torch.float32)
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = ComfyUNet(patcher)
        latents = ours.encode_images(image)
        mean = vae.encode(image.movedim(-1, 1) * 2 - 1)  # ComfyUI's takes the mean where nothing asks for a draw
        scale = patcher.model.latent_format.scale_factor
        torch.testing.assert_close(latents, mean * scale, rtol=1e-3, atol=1e-3)
        width = ours.unet.config.cross_attention_dim
        condition = {"context": torch.randn(77, width, generator=torch.Generator().manual_seed(2))}
        if layout == "sdxl":
            added = ours.unet.config.projection_class_embeddings_input_dim - 6 * 256
            condition["pooled"] = torch.randn(added, generator=torch.Generator().manual_seed(3))
        plan = ExtractionSpec(ours.default_layers(), condition, 100)
        noise = seeded_noise(latents.shape, 0, latents.device)
        seen, known = (backbone.extract(latents, plan, noise) for backbone in (ours, theirs))
    assert seen.grid == known.grid and seen.groups.keys() == known.groups.keys()
    for name, expected in known.groups.items():
        torch.testing.assert_close(seen.groups[name], expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


def test_a_model_that_predicts_v_is_told_by_its_norms(written, tmp_path) -> None:
    from safetensors.torch import load_file

    layout, path, *_ = written
    if layout != "sd2":
        assert load_checkpoint(path, "cpu", torch.float32).prediction == "eps"
        return
    state = load_file(str(path))
    for spread, kind in ((0.01, "eps"), (0.5, "v")):
        state[V_NORM] = spread * torch.randn(state[V_NORM].shape, generator=torch.Generator().manual_seed(0))
        save_file(state, str(tmp_path / "x.safetensors"))
        assert load_checkpoint(tmp_path / "x.safetensors", "cpu", torch.float32).prediction == kind


def test_other_files_are_told(tmp_path) -> None:
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "lora.safetensors"))
    with pytest.raises(SlimeError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "lora.safetensors", "cpu", torch.float32)
    with pytest.raises(SlimeError, match="can be read"):
        load_checkpoint(tmp_path / "none.ckpt", "cpu", torch.float32)
