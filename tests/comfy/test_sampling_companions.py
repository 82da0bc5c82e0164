"""Parts while sampling beside what else people use: ControlNets, LoRA hooks, patches of attention, little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from demo.pack.shapes import UNET_CONFIG
from testing.sampling import part_guider, plain_guider, sampled, with_entries

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("in_inference_mode")]


def a_control_net(tiny) -> Any:
    """ComfyUI's ControlNet of the demo model's shape, with random weights that do something, and its picture."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    known = {
        name: value for name, value in UNET_CONFIG.items() if name not in ("out_channels", "transformer_depth_output")
    }
    net = comfy.cldm.cldm.ControlNet(**known, hint_channels=3, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(5)
    for weight in net.parameters():
        weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=torch.float32)
    return control.set_cond_hint(tiny.car.movedim(-1, 1), 1.0, (0.0, 1.0))


def test_a_control_net_of_the_picture_holds_inside_its_parts(tiny, plain_sample) -> None:
    first, second = a_control_net(tiny), a_control_net(tiny)
    positive = with_entries(tiny.whole, control=first, control_apply_to_uncond=False)
    plain = sampled(plain_guider(tiny, positive=positive))
    assert not torch.equal(plain, plain_sample)
    assert torch.equal(sampled(part_guider(tiny, positive=positive, names="wing")), plain)
    guider = part_guider(tiny, positive=positive)
    found = sampled(guider)
    assert guider.used[0].any() and not torch.equal(found, plain) and torch.isfinite(found).all()
    assert guider.original_conds["part prompt 0"][0]["control"] is first
    own = part_guider(tiny, positive=positive, part=with_entries(tiny.part, control=second))
    assert own.original_conds["part prompt 0"][0]["control"] is second
    assert "control" not in part_guider(tiny).original_conds["part prompt 0"][0]


def a_hook() -> Any:
    """ComfyUI's hook of a LoRA on every query of cross-attention."""
    import comfy.hooks

    generator = torch.Generator().manual_seed(6)
    lora = {}
    for block, width in (("output_blocks_5_1", 128), ("output_blocks_8_1", 64)):
        name = f"lora_unet_{block}_transformer_blocks_0_attn2_to_q"
        lora[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator)
        lora[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator)
    return comfy.hooks.create_hook_lora(lora, 1.0, 1.0)


QUERY = "output_blocks.8.1.transformer_blocks.0.attn2.to_q.weight"


@pytest.mark.parametrize("where", [("positive",), ("part",), ("positive", "negative", "part")])
def test_hooks_of_a_lora_apply_where_they_are_set_and_not_to_looks(tiny, monkeypatch, where) -> None:
    from slime_extension.nodes import sampling_segmenter

    weight = tiny.backbone.model.model.diffusion_model.get_parameter(QUERY)
    before, seen, real = weight.clone(), [], vars(sampling_segmenter)["segment"]

    def segment(*args: Any, **named: Any) -> Any:
        seen.append(torch.equal(tiny.backbone.model.model.diffusion_model.get_parameter(QUERY), before))
        return real(*args, **named)

    monkeypatch.setattr(sampling_segmenter, "segment", segment)
    hook, plain = a_hook(), {"positive": tiny.whole, "negative": tiny.nothing, "part": tiny.part}
    without = part_guider(tiny, update_every=1)
    guider = part_guider(tiny, update_every=1, **{name: with_entries(plain[name], hooks=hook) for name in where})
    assert (sampled(guider) - sampled(without)).abs().mean() > 0.01
    assert guider.used[0].any() and seen and all(seen)
    assert torch.equal(tiny.backbone.model.model.diffusion_model.get_parameter(QUERY), before)


def test_patches_of_attention_see_the_parts_conditionings_and_no_looks(tiny) -> None:
    """As IPAdapter patches cross-attention, for some of the conditionings of a call."""
    kinds: list[list[int]] = []

    def attend(n: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        kinds.append(list(extra_options["cond_or_uncond"]))
        share = len(n) // len(kinds[-1])
        return torch.cat([1.2 * one if kind == 0 else one for one, kind in zip(n.split(share), kinds[-1], strict=True)])

    model = tiny.backbone.model.clone()
    model.set_model_attn2_output_patch(attend)
    plain = sampled(plain_guider(tiny, model))
    calls = len(kinds)
    assert torch.equal(sampled(part_guider(tiny, model, names="wing")), plain)
    kinds.clear()
    guider = part_guider(tiny, model, update_every=1, start_percent=0.3)
    found = sampled(guider)
    assert guider.used[0].any() and torch.isfinite(found).all() and not torch.equal(found, plain)
    assert len(kinds) == calls and max(kind.count(0) for kind in kinds) == 2  # the picture's and the part's in one call


@pytest.mark.parametrize("cache", ["EasyCacheNode", "LazyCacheNode"])
def test_comfyuis_own_caches_skip_steps_and_parts_are_found(tiny, cache, caplog) -> None:
    from comfy_extras import nodes_easycache

    caplog.set_level("INFO")
    model = getattr(nodes_easycache, cache).execute(tiny.backbone.model, 5.0, 0.0, 1.0, True).args[0]
    plain = sampled(plain_guider(tiny, model), steps=12)
    assert torch.equal(sampled(part_guider(tiny, model, names="wing"), steps=12), plain)
    caplog.clear()
    guider = part_guider(tiny, model, update_every=2, start_percent=0.4)
    found = sampled(guider, steps=12)
    assert "skipped" in caplog.text and guider.used[0].any()
    assert torch.isfinite(found).all() and not torch.equal(found, plain)


@pytest.mark.parametrize("lora", [False, True])
def test_little_memory_changes_no_picture(tiny, monkeypatch, lora) -> None:
    """ComfyUI's --novram on what it takes for a GPU: weights are cast, and LoRAs applied, when a layer runs."""
    import comfy.model_management as management

    generator = torch.Generator().manual_seed(6)
    model = tiny.backbone.model.clone()
    if lora:
        up, down = (torch.randn(shape, generator=generator) for shape in ((64, 4), (4, 64)))
        model.add_patches({f"diffusion_model.{QUERY}": ("diff", (0.3 * up @ down,))})

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        guider = part_guider(tiny, model, update_every=1)
        return sampled(guider), guider.used[0]

    wanted = run()
    management.unload_all_models()
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    monkeypatch.setattr(management, "is_device_cpu", lambda _device: False)
    try:
        found = run()
        cast = [m for m in tiny.backbone.model.model.diffusion_model.modules() if hasattr(m, "prev_comfy_cast_weights")]
        patched = [m for m in cast if getattr(m, "weight_function", None)]
        assert len(cast) > 100 and len(patched) == lora
    finally:
        management.unload_all_models()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
