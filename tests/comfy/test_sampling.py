"""Parts while sampling: plain where there is nothing to do, the part alone where there is, nothing left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime import PartEmbeddings, SlimeError, preset, segment, train
from slime.settings import SHARED
from testing import splits
from testing.inprocess import load_flow
from testing.models import LAYOUTS, comfy_patcher, comfy_vision
from testing.sampling import SIDE, STEPS, part_guider, plain_guider, sampled
from testing.server import FLOW, MODEL

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("in_inference_mode")]


NOTHING_TO_DO = {
    "no strength": {"strength": 0.0},
    "no such part": {"names": "wing"},
    "no steps": {"start_percent": 0.5, "end_percent": 0.5},
    "no parts that are sure": {"min_confidence": 1.0},
    "a part shrunk to nothing": {"grow": -512},
}


@pytest.mark.parametrize("options", NOTHING_TO_DO.values(), ids=NOTHING_TO_DO)
def test_where_there_is_nothing_to_do_sampling_is_plain_to_the_bit(tiny, plain_sample, options) -> None:
    assert torch.equal(sampled(part_guider(tiny, **options)), plain_sample)


def test_a_part_prompt_changes_its_part_above_all(tiny, plain_sample) -> None:
    """With the same noise, and the masks it says it used."""
    from slime_extension.nodes.part_prompts import SLiMeGuiderMasks

    guider = part_guider(tiny, start_percent=0.3, update_every=1)
    found, plain = sampled(guider), plain_sample
    mask = SLiMeGuiderMasks.execute(guider, {"samples": found}).args[0]
    assert mask.shape == (1, 8 * SIDE, 8 * SIDE) and 0.01 < float(mask.mean()) < 0.5
    cells = torch.nn.functional.interpolate(mask[:, None], (SIDE, SIDE), mode="area")[:, 0]
    moved = (found - plain).abs().mean(1)
    assert moved[cells > 0.5].mean() > 3 * moved[cells == 0].mean() > 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"start_percent": 0.0, "update_every": 1}, [1, 2, 3, 4, 5]),
        ({"start_percent": 0.5, "update_every": 2}, [3, 5]),
        ({"start_percent": 0.5, "end_percent": 0.7, "update_every": 1}, [3, 4]),
        ({"start_percent": 0.0, "update_every": 0}, [1]),
    ],
)
def test_looks_come_when_they_are_wanted(tiny, monkeypatch, options, steps) -> None:
    from slime_extension.nodes import part_prompts
    from slime_extension.nodes.sampling_segmenter import SamplingSegmenter, current_step

    segmented_at: list[int] = []
    now = [0]

    def counted(*args: Any) -> Any:
        now[0] = current_step(*args)[0]
        return current_step(*args)

    def segment(*args: Any) -> Any:
        segmented_at.append(now[0])
        return find(*args)

    find = SamplingSegmenter.segment
    monkeypatch.setattr(part_prompts, "current_step", counted)
    monkeypatch.setattr(SamplingSegmenter, "segment", segment)
    sampled(part_guider(tiny, **options))
    assert segmented_at == steps


def test_a_part_has_its_prompt_in_place_of_the_pictures_own() -> None:
    """Shares of a step: the picture's prompt outside, the part's inside; masks that conditionings bring count too."""
    from slime_extension.nodes.part_prompts import _masked

    mask, half, x = torch.rand(2, 4, 4), torch.full((1, 4, 4), 0.5), torch.zeros(2, 4, 4, 4)
    whole, own, part = _masked([{"n": 0}, {"n": 1, "mask": half}], [([{"n": 2}], mask)], x)
    assert torch.equal(whole["mask"], 1 - mask) and torch.equal(own["mask"], (1 - mask) * half)
    assert torch.equal(part["mask"], mask) and [one["n"] for one in (whole, own, part)] == [0, 1, 2]
    crowded = _masked([{}], [([{}], torch.ones(2, 4, 4)), ([{}], mask)], x)
    assert 0 < crowded[0]["mask"].min() == crowded[0]["mask"].max() < 1e-3


def test_an_area_keeps_its_soft_border_and_a_batch_of_masks_its_size() -> None:
    from slime_extension.nodes.part_prompts import _masked

    x, nothing = torch.zeros(4, 4, 32, 32), torch.zeros(4, 32, 32)
    own = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    left, masked, _ = _masked([{"area": (32, 16, 0, 8)}, {"mask": own}], [([{}], nothing)], x)
    row = left["mask"][0, 5]
    assert not row[:8].any() and not row[24:].any() and row[8:13].tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert masked["mask"].mean((1, 2)).tolist() == [0, 1, 0, 1]


def test_several_prompts_and_further_shapes_of_sampling(tiny) -> None:
    """Two prompts, a batch, CFG 1, samplers that ask twice a step, areas, masks and previews."""
    from slime_extension.nodes.part_prompts import SLiMePartPrompt

    window = SLiMePartPrompt.execute(tiny.embeddings, tiny.part, "window").args[0]
    seen: list[Any] = []
    both = part_guider(tiny, more=window)
    first = sampled(both, count=2, callback=lambda step, x0, x, total: seen.append(x0.shape))
    assert len(both.used) == 2 and both.used[0].shape == (2, 8 * SIDE, 8 * SIDE) and len(seen) == STEPS
    assert not torch.equal(both.used[0], both.used[1])
    assert torch.isfinite(first).all()
    for sampler, cfg in (("heun", 1.0), ("dpmpp_2s_ancestral", 3.0), ("uni_pc", 3.0)):
        guider = part_guider(tiny, cfg=cfg)
        assert torch.isfinite(sampled(guider, sampler=sampler)).all() and guider.used
    half = [[rows, dict(more, area=(SIDE, SIDE // 2, 0, 0), strength=1.0)] for rows, more in tiny.part]
    left = [[rows, dict(more, mask=torch.ones(1, SIDE, SIDE).triu(), mask_strength=0.7)] for rows, more in tiny.part]
    for further in (half, left):
        positive = [*tiny.whole, *further]
        assert not torch.equal(
            sampled(part_guider(tiny, positive=positive)), sampled(plain_guider(tiny, positive=positive))
        )
        absent = part_guider(tiny, positive=positive, names="wing")
        assert torch.equal(sampled(absent), sampled(plain_guider(tiny, positive=positive)))


def test_separate_calls_and_skipped_steps_find_the_same_parts(tiny, monkeypatch) -> None:
    """Memory for one conditioning at a time; a patch that answers every second call with what it said before."""
    usual = part_guider(tiny, update_every=0, start_percent=0.3)
    wanted = sampled(usual)
    monkeypatch.setattr(tiny.backbone.model.model, "memory_required", lambda *_, **__: 1e18)
    alone = part_guider(tiny, update_every=0, start_percent=0.3)
    torch.testing.assert_close(sampled(alone), wanted, rtol=1e-3, atol=1e-3)
    monkeypatch.undo()

    calls, said = [], {}

    def lazy(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        calls.append(len(given["input"]))
        if len(calls) % 2 or said.get("x") is None or said["x"].shape != given["input"].shape:
            said["x"] = apply(given["input"], given["timestep"], **given["c"])
        return said["x"]

    model = tiny.backbone.model.clone()
    model.set_model_unet_function_wrapper(lazy)
    skipping = part_guider(tiny, model, update_every=1)
    assert torch.isfinite(sampled(skipping)).all() and skipping.used[0].any()
    count = len(calls)
    calls.clear()
    sampled(plain_guider(tiny, model))
    assert count <= 2 * len(calls)  # conditionings of the part alone: segmentation does not pass through the patch


@pytest.mark.parametrize("failure", ["interrupt", "memory", "mistake"])
@pytest.mark.parametrize("late", [False, True])
def test_what_goes_wrong_at_a_step_leaves_everything_as_it_was(tiny, plain_sample, monkeypatch, failure, late) -> None:
    import comfy.model_management
    from slime_extension.nodes.sampling_segmenter import SamplingSegmenter

    errors = {
        "interrupt": comfy.model_management.InterruptProcessingException(),
        "memory": torch.cuda.OutOfMemoryError("none left"),
        "mistake": SlimeError("cannot be"),
    }
    real, count = SamplingSegmenter.segment, [0]

    def failing(*args: Any) -> Any:
        count[0] += 1
        found = real(*args)
        if count[0] > late:
            raise errors[failure]
        return found

    model = tiny.backbone.model
    options, hooks = dict(model.model_options), len(model.model.diffusion_model._forward_hooks)
    monkeypatch.setattr(SamplingSegmenter, "segment", failing)
    guider = part_guider(tiny, update_every=1)
    with pytest.raises(type(errors[failure])):
        sampled(guider)
    monkeypatch.undo()
    assert guider._denoised is None and not guider._masks
    assert model.model_options == options and len(model.model.diffusion_model._forward_hooks) == hooks
    assert torch.equal(sampled(plain_guider(tiny)), plain_sample)
    assert guider.model_patcher.model is model.model and torch.isfinite(sampled(guider)).all()


def test_no_weights_move_while_sampling_runs(tiny, monkeypatch) -> None:
    """Models are loaded once, before the first step."""
    import comfy.model_management

    loads: list[int] = []
    real = comfy.model_management.load_models_gpu

    def counted(*args: Any, **named: Any) -> Any:
        loads.append(1)
        return real(*args, **named)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", counted)
    sampled(plain_guider(tiny))
    usual, guider = len(loads), part_guider(tiny, update_every=1)
    loads.clear()
    sampled(guider)
    assert len(loads) == usual and guider.used
    assert all(mask.device.type == "cpu" for mask in guider.used)


def test_the_detailer_redraws_parts_and_nothing_else(tiny) -> None:
    from slime_extension.nodes.common import Parts
    from slime_extension.nodes.part_detailer import SLiMePartDetailer

    images = torch.cat([tiny.car, splits.example("car", splits.TEST + 1).image[None]])
    parts = Parts(segment(tiny.backbone, images, tiny.embeddings)[0], images)

    def run(**options: Any) -> Any:
        given = {"names": "plate, light", "steps": 3, "cfg": 2.0, "size": 128, "seed": 7} | options
        return SLiMePartDetailer.execute(
            parts, tiny.backbone.model, tiny.backbone.vae, tiny.part, tiny.nothing, **given
        ).args

    image, mask = run()
    assert image.shape == images.shape and mask.shape == images.shape[:3]
    wanted = sum(parts.maps.label_map == 1 + tiny.embeddings.names.index(name) for name in ("plate", "light"))
    near = torch.nn.functional.max_pool2d(wanted[:, None].float(), 65, 1, 32)[:, 0] > 0
    assert not mask[~near].any() and (~near).any(1).any() and mask[wanted > 0].any()
    assert torch.equal(image[mask == 0], images[mask == 0]) and not torch.equal(image[mask > 0.9], images[mask > 0.9])
    assert torch.equal(run()[0], image) and not torch.equal(run(seed=8)[0], image)
    assert torch.equal(run(denoise=0.0)[0], images) and not run(minimum_area=100_000)[1].any()
    with pytest.raises(SlimeError, match="SLiMe Part Detailer: There is no part wing"):
        run(names="wing")


def test_a_flow_transformer_is_watched_too(tiny) -> None:
    backbone = load_flow(FLOW)
    embeddings = train(backbone, [tiny.example], preset("instant", backbone.info, views=6))
    shape = (1, backbone.info.channels, SIDE, SIDE)
    guider = part_guider(tiny, backbone.model, embeddings=embeddings, update_every=1)
    found, plain = sampled(guider, shape=shape), sampled(plain_guider(tiny, backbone.model), shape=shape)
    assert guider.used[0].any() and not torch.equal(found, plain)


@pytest.mark.parametrize("layout", ["sd2", "sdxl"])
def test_stable_diffusions_relatives_are_watched(layout) -> None:
    """Narrow random models of the real classes."""
    from slime_extension.nodes.comfy_unet import ComfyUNet
    from slime_extension.nodes.part_prompts import SLiMePartGuider, SLiMePartPrompt

    patcher = comfy_patcher(layout, "v" if layout == "sd2" else "eps")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 77, LAYOUTS[layout]["context_dim"], generator=generator)
    pooled = torch.randn(1, 32, generator=generator)
    backbone = ComfyUNet(patcher)
    condition = {"context": rows[0]} | ({"pooled": pooled[0]} if layout == "sdxl" else {})
    learned = torch.randn(1, rows.shape[2], generator=generator)
    info, layers = backbone.info, backbone.default_layers()
    embeddings = PartEmbeddings(("a",), {SHARED: 5 * learned}, condition, "", info.id, layers, 100, 128)
    cond = [[rows, {"pooled_output": pooled}]]
    prompts = SLiMePartPrompt.execute(embeddings, [[2 * rows, {"pooled_output": pooled}]]).args[0]
    guider = SLiMePartGuider.execute(patcher, cond, cond, prompts, 2.0).args[0]
    plain = plain_guider(SimpleNamespace(whole=cond, nothing=cond), patcher, 2.0)
    shape = (1, 4, 16, 24)
    found, other = sampled(guider, shape=shape), sampled(plain, shape=shape)
    assert guider.used[0].shape == (1, 128, 192) and torch.isfinite(found).all()
    assert guider.used[0].any() and not torch.equal(found, other)


@pytest.mark.slow
def test_a_compiled_model_is_looked_at_as_it_is(tiny) -> None:
    """ComfyUI's TorchCompileModel compiles for its own passes; segmentation runs beside them."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = tiny.backbone.model.clone()
    set_torch_compile_wrapper(model=model, backend="eager")
    guider = part_guider(tiny, model, update_every=0, start_percent=0.3)
    torch.testing.assert_close(
        sampled(guider), sampled(part_guider(tiny, update_every=0, start_percent=0.3)), rtol=1e-3, atol=1e-3
    )
    assert guider.used[0].any()


def test_a_vision_encoder_looks_at_the_decoded_picture(tiny, monkeypatch) -> None:
    """Alone and beside the model; the VAE's own decode, which loads models, is not called."""
    from slime_extension.nodes.backbones import build_backbone

    vision, _ = comfy_vision("dinov2")
    backbone = tiny.backbone
    for model in (None, backbone.model):
        eye = build_backbone(model, backbone.vae, backbone.clip, vision)
        settings = preset("instant", eye.info, views=2, read_layers="block.1", propagate_layers="block.1")
        embeddings = train(eye, [tiny.example], settings)
        with pytest.raises(SlimeError, match=r"connect the VAE of the checkpoint, or put taesd_decoder.safetensors"):
            part_guider(tiny, embeddings=embeddings, clip_vision=vision, start_percent=0.0)
        guider = part_guider(tiny, embeddings=embeddings, clip_vision=vision, vae=backbone.vae, update_every=0)
        monkeypatch.setattr(type(backbone.vae), "decode", None)
        assert torch.isfinite(sampled(guider)).all() and guider.used
        monkeypatch.undo()


def test_masks_that_were_never_looked_for_are_empty_and_of_the_pictures_size(tiny, monkeypatch) -> None:
    from slime_extension.nodes.part_prompts import used_masks

    guider = part_guider(tiny)
    assert [mask.shape for mask in used_masks(guider, torch.zeros(2, 4, 8, 16))] == [(2, 64, 128)]
    kind = guider.model_patcher.model.latent_format
    monkeypatch.setattr(kind, "spacial_downscale_ratio", 16, raising=False)
    (mask,) = used_masks(guider, torch.zeros(1, 4, 1, 8, 8))
    assert mask.shape == (1, 128, 128) and not mask.any()


def test_a_preview_decoder_stands_in_for_the_vae(tiny, monkeypatch, tmp_path) -> None:
    """The demo's VAE is a TAESD: its decoder, installed as ComfyUI's previews want it, shows the encoder the same."""
    import folder_paths
    from slime_extension.nodes.backbones import build_backbone

    prefix = "first_stage_model.taesd_decoder."
    decoder = {name.removeprefix(prefix): w.float() for name, w in load_file(str(MODEL)).items() if prefix in name}
    vision, _ = comfy_vision("dinov2")
    backbone = tiny.backbone
    eye = build_backbone(None, backbone.vae, backbone.clip, vision)
    settings = preset("instant", eye.info, views=2, read_layers="block.1", propagate_layers="block.1")
    segmenting = {"embeddings": train(eye, [tiny.example], settings), "clip_vision": vision, "update_every": 0}
    by_vae = part_guider(tiny, vae=backbone.vae, **segmenting)
    wanted = sampled(by_vae)
    save_file(decoder, str(tmp_path / "taesd_decoder.safetensors"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    by_preview = part_guider(tiny, **segmenting)
    assert by_preview.used == [] and not any(backbone.vae.patcher is one for one in by_preview._segmenter._beside)
    found = sampled(by_preview)
    assert by_preview.used[0].any() and (by_preview.used[0] - by_vae.used[0]).abs().mean() < 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_watched_says_so(tiny) -> None:
    from slime_extension.nodes.part_prompts import SLiMeGuiderMasks

    compiled = tiny.backbone.model.clone()
    compiled.add_object_patch("diffusion_model", torch.nn.Identity())
    with pytest.raises(SlimeError, match="SLiMe Part Guider: Another node replaced this model"):
        part_guider(tiny, compiled)
    with pytest.raises(SlimeError, match="SLiMe Part Guider: These embeddings .* were trained on"):
        part_guider(tiny, load_flow(FLOW).model)
    with pytest.raises(SlimeError, match="The guider is a CFGGuider, which has no masks"):
        SLiMeGuiderMasks.execute(plain_guider(tiny), {"samples": torch.zeros(1, 4, 8, 8)})
