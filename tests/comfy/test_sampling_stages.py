"""Parts while sampling in further graphs: ranges and masks of a part, odd schedules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime import segment
from testing.inprocess import load_backbone
from testing.sampling import SIDE, part_guider, sampled, with_entries
from testing.server import MODEL

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("in_inference_mode")]


def test_where_a_parts_prompt_does_not_apply_the_pictures_own_does(tiny, monkeypatch) -> None:
    """Never a prediction of nothing."""
    import comfy.samplers

    real, empty = comfy.samplers.calc_cond_batch, []

    def calc(*args: Any, **named: Any) -> Any:
        found = real(*args, **named)
        empty.append(int((found[0].abs().amax(1) == 0).sum()))
        return found

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", calc)
    half = torch.zeros(1, 8 * SIDE, 8 * SIDE)
    half[..., : 4 * SIDE] = 1
    ranged = with_entries(tiny.part, start_percent=0.6, end_percent=1.0)
    masked = with_entries(tiny.part, mask=half, mask_strength=1.0, set_area_to_bounds=False)
    for part in (ranged, masked):
        guider = part_guider(tiny, part=part, update_every=0, names="", grow=16)
        assert torch.isfinite(sampled(guider)).all() and guider.used[0].eq(1).any()
    assert empty and not any(empty)


def test_a_copy_of_the_model_that_is_sampled_is_looked_at_itself(tiny, monkeypatch) -> None:
    """As newer cores take one for hooks on models that are loaded piece by piece."""
    from slime_extension.nodes import sampling_segmenter

    other, seen, real = load_backbone(MODEL), [], vars(sampling_segmenter)["segment"]

    def segment(eye: Any, *args: Any, **named: Any) -> Any:
        seen.append(eye.model.model)
        return real(eye, *args, **named)

    monkeypatch.setattr(sampling_segmenter, "segment", segment)
    guider = part_guider(tiny, update_every=1)
    wanted = sampled(guider)
    assert all(one is tiny.backbone.model.model for one in seen)
    seen.clear()
    guider.model_patcher = other.model
    torch.testing.assert_close(sampled(guider), wanted, rtol=1e-3, atol=1e-3)
    assert seen and all(one is other.model.model for one in seen)


def test_what_two_nodes_look_with_is_loaded_with_the_model(tiny) -> None:
    from slime_extension.nodes.sampling_segmenter import KEY, SamplingSegmenter

    first, second = (SimpleNamespace(model=object()) for _ in range(2))
    for one in (first, second):
        one.clone = lambda one=one: one
    segmenter = SamplingSegmenter(tiny.backbone.model, None, None, None, [tiny.embeddings])
    segmenter._beside = [first]
    segmenter.model = segmenter.model_to_sample()
    segmenter._beside = [second]
    assert segmenter.model_to_sample().get_additional_models_with_key(KEY) == [first, second]


def test_a_sampler_that_goes_on_at_another_size(tiny) -> None:
    """ComfyUI's SamplerLCMUpscale."""
    import comfy.samplers
    from comfy_extras.nodes_advanced_samplers import sample_lcm_upscale

    guider = part_guider(tiny, start_percent=0.0, update_every=0)
    sampler = comfy.samplers.KSAMPLER(sample_lcm_upscale, {"total_upscale": 1.5, "upscale_method": "bilinear"})
    found = sampled(guider, sampler=sampler)
    assert guider.used[0].any() and found.shape[-1] == SIDE * 3 // 2 and torch.isfinite(found).all()


def test_every_prompt_has_its_mask(tiny) -> None:
    from slime_extension.nodes.part_prompts import SLiMePartPrompt, used_masks

    off = SLiMePartPrompt.execute(tiny.embeddings, tiny.part, "window", strength=0.0).args[0]
    guider = part_guider(tiny, more=off)
    assert len(used_masks(guider, torch.zeros(1, 4, SIDE, SIDE))) == 2
    sampled(guider)
    first, second = used_masks(guider, torch.zeros(1, 4, SIDE, SIDE))
    assert not first.any() and second.any()


def test_steps_are_counted_in_any_schedule() -> None:
    from slime_extension.nodes.sampling_segmenter import current_step

    def counted(sigmas: list[float], now: float) -> tuple[int, int]:
        return current_step(torch.tensor([now]), {"transformer_options": {"sample_sigmas": torch.tensor(sigmas)}})

    assert [counted([8.0, 4.0, 2.0, 0.0], now) for now in (8.0, 5.0, 4.0, 2.0)] == [(0, 3), (1, 3), (1, 3), (2, 3)]
    assert counted([8.0, 4.0, 2.0], 2.0) == (1, 2)  # the second half of a last step that does not end at 0
    assert [counted([0.0, 2.0, 4.0, 8.0], now)[0] for now in (0.0, 2.0, 4.0)] == [0, 1, 2]  # to noise


def test_pieces_of_any_size_are_redrawn(tiny, monkeypatch) -> None:
    """Autoencoders that take other multiples, the last seed there is, pieces that were shrunk away, grey images."""
    from slime_extension.nodes import part_detailer
    from slime_extension.nodes.common import Parts

    parts = Parts(segment(tiny.backbone, tiny.car, tiny.embeddings)[0], tiny.car)
    sizes, seeds = [], []

    def redraw(_self: Any, pixels: torch.Tensor, _mask: torch.Tensor, size: tuple[int, int], seed: int) -> torch.Tensor:
        sizes.append(size)
        seeds.append(seed)
        return torch.ones_like(pixels)

    monkeypatch.setattr(part_detailer._Sampling, "redraw", redraw)
    monkeypatch.setattr(tiny.backbone.vae, "spacial_compression_encode", lambda: 32)

    def run(**options: Any) -> Any:
        given = {"names": "wheel, window", "size": 100, "seed": 2**64 - 1} | options
        vae, grey = tiny.backbone.vae, Parts(parts.maps, parts.images[..., :1])
        return part_detailer.SLiMePartDetailer.execute(
            grey, tiny.backbone.model, vae, tiny.part, tiny.nothing, **given
        ).args

    image, mask = run()
    assert image.shape == tiny.car.shape and mask.any()
    assert len(sizes) > 1 and all(side % 32 == 0 and side > 0 for size in sizes for side in size)
    assert seeds[:2] == [2**64 - 1, 0]
    sizes.clear()
    assert not run(grow=-512)[1].any() and not sizes
