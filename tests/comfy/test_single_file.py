"""Checkpoint files of SD1.x, SD2.x and SDXL without a hub, at a fraction of their width, against ComfyUI's own code.

The full size of SD1.5 stands in test_full_size.py.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slime.backbones.base import ExtractionSpec, seeded_noise
from slime.backbones.single_file import (
    ACROSS,
    END,
    FIRST,
    LABELS,
    START,
    UNET,
    V_NORM,
    VAE,
    load_checkpoint,
    schedule,
    standard_weights,
)
from slime.errors import SlimeError
from testing import random_models
from testing.inprocess import import_comfyui

pytestmark = pytest.mark.long

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
    layout, path, *_ = written
    if layout != "sd2":
        assert load_checkpoint(path, "cpu", torch.float32).prediction == "eps"
        return
    state = load_file(str(path))
    for spread, kind in ((0.01, "eps"), (0.5, "v")):
        state[V_NORM] = spread * torch.randn(state[V_NORM].shape, generator=torch.Generator().manual_seed(0))
        save_file(state, str(tmp_path / "x.safetensors"))
        assert load_checkpoint(tmp_path / "x.safetensors", "cpu", torch.float32).prediction == kind


def scaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's attention in fp8 with scales, as ComfyUI's scaled checkpoints have it."""
    found = state | {UNET + "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name in [name for name in state if name.startswith(UNET) and name.endswith(("to_k.weight", "to_q.weight"))]:
        scale = state[name].abs().max() / 440
        found[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        found[name.replace(".weight", ".scale_weight")] = scale.float()
    return found


def old_merge(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half precision, text weights without "text_model" and with position ids as numbers, EMA copies beside."""
    changed = {name.replace(".transformer.text_model.", ".transformer."): value.half() for name, value in state.items()}
    changed[CLIP["sd1"] + "embeddings.position_ids"] = torch.arange(77)[None] - 0.01
    return changed | {"model_ema." + name.replace(".", ""): value.clone() for name, value in changed.items()}


def turbo(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD-Turbo's names, with weights of the UNet in fp8."""
    return {
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): value.to(torch.float8_e4m3fn)
        if name.startswith(UNET) and value.ndim > 1
        else value.bfloat16()
        for name, value in state.items()
    }


# What people's files have against plain ones; the model is the same but for rounding.
AS_PEOPLE_HAVE_THEM = {"sd1": [old_merge, scaled], "sd2": [turbo]}


def test_files_as_people_have_them(written, tmp_path) -> None:
    layout, path, *_ = written
    if layout not in AS_PEOPLE_HAVE_THEM:
        pytest.skip("the names of weights do not depend on the layout")
    plain = load_checkpoint(path, "cpu", torch.float32)
    expected = plain.unet.state_dict()
    for change in AS_PEOPLE_HAVE_THEM[layout]:
        state = {name: value.contiguous() for name, value in change(load_file(str(path))).items()}
        save_file(state, str(tmp_path / "X.SAFETENSORS"))
        ours = load_checkpoint(tmp_path / "X.SAFETENSORS", "cpu", torch.float32)
        for name, value in ours.unet.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.02, msg=name)
        for ours_text, text in zip(ours.text_encoders, plain.text_encoders, strict=True):
            weights = dict(text.named_parameters())
            assert all(torch.allclose(value, weights[name], 1e-2, 1e-2) for name, value in ours_text.named_parameters())


def test_late_names_of_scales() -> None:
    weight, scale = torch.ones(2, 2, dtype=torch.float8_e4m3fn), torch.tensor([2.0, 3.0])
    state = {"a.weight": weight, "a.weight_scale": scale, "b.weight": torch.ones(2), "a.comfy_quant": torch.zeros(1)}
    found = standard_weights(state, "x")
    assert found.keys() == {"a.weight", "b.weight"} and found["a.weight"].tolist() == [[2, 2], [3, 3]]


def test_pickled_checkpoints_of_a_trainer(written, tmp_path) -> None:
    """Stable Diffusion's own files hold a callback's class and numpy's numbers beside the weights."""
    layout, path, *_ = written
    if layout != "sd1":
        pytest.skip("one is enough")
    modules = {}
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        modules[name] = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": list(modules)[-1]})
    vars(modules[callback.__module__])["ModelCheckpoint"] = callback
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        body = {"state_dict": load_file(str(path)), "callbacks": {callback: {"best": np.float64(3)}}, "epoch": 7}
        torch.save(body, str(tmp_path / "sd-v1-4.ckpt"))
    assert load_checkpoint(tmp_path / "sd-v1-4.ckpt", "cpu", torch.float32).prediction == "eps"


def test_sdxl_that_predicts_v(written, tmp_path) -> None:
    layout, path, *_ = written
    if layout != "sdxl":
        pytest.skip("SD2 tells it otherwise")
    state = load_file(str(path)) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(state, str(tmp_path / "noob.safetensors"))
    ours = load_checkpoint(tmp_path / "noob.safetensors", "cpu", torch.float32)
    assert ours.prediction == "v" and float(schedule("v_prediction", zero_terminal=True).alphas_cumprod[-1]) < 1e-9


def sketch(large: bool = False, channels: int = 4, text: int = 8, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """The weights alone that tell which model a file is, mostly empty."""
    shapes = {
        FIRST: (4, channels, 3, 3),
        ACROSS: (4, text * (1 + large)),
        VAE + "encoder.conv_in.weight": (4, 3, 3, 3),
        (CLIP["sdxl" if large else "sd1"] + "text_model.embeddings.token_embedding.weight"): (2, text),
    }
    if large:
        shapes |= {LABELS + "0.0.weight": (4, 4), OPEN_CLIP["sdxl"][0] + "token_embedding.weight": (2, text)}
    else:
        shapes[UNET + "input_blocks.1.1.norm.weight"] = (4,)
    return {name: torch.zeros(shape) for name, shape in (shapes | more).items()}


def without(state: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(stem)}


REFUSED = {
    "a LoRA": ({"weight": torch.zeros(2)}, "not a complete checkpoint"),
    "a UNet of diffusers": ({"conv_in.weight": torch.zeros(4, 4, 3, 3)}, "not a complete checkpoint"),
    "inpainting": (sketch(channels=9), "takes 9 input channels"),
    "instruct-pix2pix": (sketch(channels=8), "takes 8 input channels"),
    "no text": (without(sketch(), "cond"), "has no text encoder"),
    "no VAE": (without(sketch(), VAE), "has no VAE"),
    "UNet alone": (without(without(sketch(), VAE), "cond"), "has no VAE and no text encoder"),
    "refiner": (without(sketch(large=True), CLIP["sdxl"]), "two text encoders"),
    "SDXL without G": (without(sketch(large=True), OPEN_CLIP["sdxl"][0]), "two text encoders"),
    "SSD-1B": (sketch(large=True), "distilled SDXL"),
    "Playground": (sketch(large=True, edm_mean=(4,)), "another noise schedule"),
    "unCLIP": (sketch(**{LABELS + "0.0.weight": (4, 4)}), "unCLIP"),
    "half a text encoder": (
        without(sketch(), CLIP["sd1"] + "text_model.emb") | {CLIP["sd1"] + "x": torch.zeros(1)},
        "is incomplete",
    ),
    "SD1 with weights left out": (sketch(), "looks like SD1"),
    "nvfp4": (
        sketch()
        | {
            UNET + "out.weight": torch.zeros(2, dtype=torch.uint8),
            UNET + "out.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
        },
        r"quantised weights \(nvfp4\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_told(tmp_path, kind: str) -> None:
    state, words = REFUSED[kind]
    save_file(state, str(tmp_path / "x.safetensors"))
    with pytest.raises(SlimeError, match=words):
        load_checkpoint(tmp_path / "x.safetensors", "cpu", torch.float32)


BYTES = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    "a web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "GGUF": (b"GGUF\3\0\0\0", "GGUF"),
    "nothing": (b"", "truncated"),
    "cut safetensors": (b"\xff\0\0\0\0\0\0\0{", "truncated"),
    "cut pickle": (b"PK\3\4\0", "truncated"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_other_files_are_told(tmp_path, kind: str) -> None:
    data, words = BYTES[kind]
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(SlimeError, match=words):
        load_checkpoint(tmp_path / "x.ckpt", "cpu", torch.float32)
    with pytest.raises(SlimeError, match="cannot be opened"):
        load_checkpoint(tmp_path / "none.ckpt", "cpu", torch.float32)
