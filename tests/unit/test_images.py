"""Augmentation, refinement, visualisation, layers and scenes."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from slime.backbones.layers import Layer, select_layers
from slime.backbones.sd_unet import PAPER_LAYERS, Family, automatic_layers, family_for
from slime.decode import refine
from slime.decode.refine import EDGE, RADIUS, refine_maps, refined_labels
from slime.errors import SlimeError
from slime.examples import Example
from slime.images import resize_maps, soft_labels, working_size
from slime.paper.views import official_view
from slime.parts import draw
from slime.parts.draw import color_labels, draw_legend, legend_below, overlay
from slime.settings import InstantSettings, PaperSettings
from slime.training.augment import augmented_image, augmented_labels, flip_allowed, rotate_image, rotate_labels
from testing import scenes, splits
from testing.toy import ToyUNet


def test_working_size_keeps_area_and_aspect() -> None:
    assert working_size(512, 512, 512, 64) == (512, 512)
    assert working_size(1080, 1920, 512, 64) == (384, 704)
    for height, width in ((100, 3000), (7, 5), (1536, 1024)):
        h, w = working_size(height, width, 512, 64)
        assert h % 64 == w % 64 == 0 and 0.6 < h * w / 512**2 < 1.5


def test_soft_labels_are_areas() -> None:
    labels = torch.tensor([[0, 1, 1, 255], [0, 0, 1, 255]])
    expected = torch.tensor([[[0.75, 0.0]], [[0.25, 0.5]]])
    torch.testing.assert_close(soft_labels(labels, 2, (1, 2)), expected)


def test_left_and_right_are_not_mirrored() -> None:
    settings = InstantSettings()
    assert flip_allowed(settings, ["wheel", "bright light"])
    assert not flip_allowed(settings, ["Left eye", "nose"])
    assert flip_allowed(settings, ["link", "leftover", "\u043b\u0435\u0432"])  # the last is a lion
    sided = "oeil gauche, ojo izquierdo, \u5de6\u76ee, \uc67c\ucabd \ub208, \u043b\u0435\u0432\u044b\u0439"
    sided += ", \u0627\u0644\u0639\u064a\u0646 \u0627\u0644\u064a\u0645\u0646\u0649"
    for name in sided.split(", "):
        assert not flip_allowed(settings, [name]), name
    assert flip_allowed(InstantSettings(flip=True), ["left eye"])


def test_rotation_moves_image_and_labels_together() -> None:
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[4:20, 24:40] = 1
    image = labels[..., None].float().expand(-1, -1, 3)
    turned, turned_labels = rotate_image(image, math.pi / 2), rotate_labels(labels, math.pi / 2)
    assert (turned[..., 0].round().long() == turned_labels).float().mean() > 0.99
    ys, xs = torch.nonzero(turned_labels == 1, as_tuple=True)
    assert abs(float(ys.float().mean()) - 31.5) < 1 and not 20 < float(xs.float().mean()) < 44


def test_views_are_seeded_and_labels_follow_the_image() -> None:
    labels = torch.zeros(80, 96, dtype=torch.int64)
    labels[20:60, 10:50] = 1
    example = Example.from_label_map(labels[..., None].float().expand(-1, -1, 3), labels, ["square"])
    settings = InstantSettings(blur=0.0)
    first, second = (augmented_image(example, settings, random.Random(5), (128, 128)) for _ in range(2))
    assert torch.equal(first, second)
    for seed in range(5):
        image = augmented_image(example, settings, random.Random(seed), (128, 128))
        maps = augmented_labels(example, settings, random.Random(seed), (16, 16))
        pooled = torch.nn.functional.adaptive_avg_pool2d(image[..., 0][None], (16, 16))[0]
        assert (pooled - maps[1]).abs().mean() < 0.02
        torch.testing.assert_close(maps.sum(0), torch.ones(16, 16))


def test_refinement_moves_the_border_to_the_edge() -> None:
    """A map cut at the wrong column follows the image's edge; sums stay 1; off is plain bilinear."""
    image = torch.zeros(1, 128, 128, 3)
    image[:, :, 60:] = 1
    coarse = torch.zeros(1, 2, 16, 16)
    coarse[:, 1, :, 8:] = 1
    coarse[:, 0] = 1 - coarse[:, 1]
    truth = (image[0, ..., 0] > 0.5).long()
    errors = {m: int((refine_maps(coarse, image, m).argmax(1)[0] != truth).sum()) for m in ("off", "fast", "best")}
    assert errors["best"] < errors["off"] and errors["fast"] <= errors["off"]
    for method in ("fast", "best"):
        torch.testing.assert_close(
            refine_maps(coarse, image, method).sum(1), torch.ones(1, 128, 128), rtol=1e-3, atol=1e-3
        )
    assert refine_maps(torch.rand(1, 2, 8, 8), torch.rand(1, 17, 40, 3), "fast").shape == (1, 2, 17, 40)


def test_refinement_is_the_guided_filter() -> None:
    """As kornia has it, away from the image's border, which kornia mirrors and we leave out."""
    from kornia.filters import guided_blur

    torch.manual_seed(0)
    image = resize_maps(torch.rand(2, 3, 9, 11), (72, 88)).movedim(1, -1)
    coarse = torch.rand(2, 3, 9, 11).softmax(1)
    radius = round(RADIUS * 8)
    known = guided_blur(image.movedim(-1, 1), resize_maps(coarse, (72, 88)), 2 * radius + 1, EDGE).clamp(min=0)
    known = known / known.sum(1, keepdim=True)
    best, fast = (refine_maps(coarse, image, method) for method in ("best", "fast"))
    inside = (..., slice(2 * radius, -2 * radius), slice(2 * radius, -2 * radius))
    assert best[inside].numel() > 100
    torch.testing.assert_close(best[inside], known[inside], rtol=0, atol=1e-4)
    assert (fast - best).abs().mean() < 0.01 < (fast - resize_maps(coarse, (72, 88))).abs().mean()


@pytest.mark.parametrize("method", ["off", "fast", "best"])
def test_labels_are_the_most_probable_class_in_strips_as_well(monkeypatch, method: str) -> None:
    torch.manual_seed(1)
    maps, images = torch.rand(2, 5, 9, 7).softmax(1), torch.rand(2, 131, 66, 3)
    whole = refine_maps(maps, images, method)
    if method == "off":
        torch.testing.assert_close(whole, resize_maps(maps, (131, 66)), rtol=1e-4, atol=1e-5)
    assert torch.equal(refined_labels(maps, images, method), whole.argmax(1).byte())
    monkeypatch.setattr(refine, "STRIP", 3 * 2 * 20 * 66)  # three rows of the coefficients at once
    torch.testing.assert_close(refine_maps(maps, images, method), whole, rtol=1e-4, atol=1e-5)
    assert (refined_labels(maps, images, method) == whole.argmax(1)).float().mean() > 0.999


def test_names_that_no_font_has_are_drawn_as_numbers(monkeypatch) -> None:
    page = Image.new("RGB", (96, 96))
    monkeypatch.setattr(draw, "WIDE_FONTS", ())
    draw._fonts.cache_clear()
    assert [draw.drawable(name, 7, 12)[0] for name in ("wheel 2", "\u8f66", "Kotfl\u00fcgel")] == ["wheel 2", "7", "7"]
    wheel, window = (np.asarray(legend_below(page, [name], [(9, 9, 9)])) for name in ("\u8f66", "\u7a97"))
    assert np.array_equal(wheel, window)  # both are part 1
    both = np.asarray(legend_below(page, ["\u8f66", "\u7a97"], [(9, 9, 9)] * 2))
    assert not np.array_equal(both[:, :48], both[:, 48:])
    draw._fonts.cache_clear()


def test_label_colors_are_exact_and_overlay_leaves_the_rest() -> None:
    labels = np.zeros((64, 64), int)
    labels[16:48, 16:48] = 2
    palette = [(1, 2, 3), (250, 128, 7)]
    colored = color_labels(labels, palette)
    assert (colored[20, 20] == (250, 128, 7)).all() and (colored[0, 0] == 0).all()
    image = np.full((64, 64, 3), 100, np.uint8)
    tinted = overlay(image, labels, palette, opacity=0.5)
    assert (tinted[0, 0] == 100).all() and (tinted[32, 32] == [175, 114, 53]).all()
    red, mask = np.full((64, 64, 3), (250, 128, 7), np.uint8), labels // 2
    outlined = overlay(red, mask, palette[1:]).astype(int)  # a part on its own colour
    assert np.abs(outlined[16, 32] - outlined[15, 32]).min() > 40 and (outlined[32, 32] == red[0, 0]).all()
    names, colors = ["one", "two", "a third with a long name"], [*palette, (250, 128, 8)]
    below = np.asarray(legend_below(Image.fromarray(image), names, colors))
    assert below.shape[1:] == (64, 3) and (below[:64] == image).all()  # nothing is covered
    assert all((below[64:] == color).all(-1).any() for color in colors)
    picture = Image.fromarray(image)
    draw_legend(picture, ["one", "two"], palette)
    assert not (np.asarray(picture)[:8, :8] == 100).all()


STRIDES = {3: 4, 4: 4, 5: 4, 6: 2, 7: 2, 8: 2, 9: 1, 10: 1, 11: 1}
SD1 = [Layer(f"output.{block}.0", stride) for block, stride in STRIDES.items()]


def test_layer_patterns() -> None:
    assert select_layers("output.3-4, output.9.0", SD1) == ("output.3.0", "output.4.0", "output.9.0")
    assert select_layers("double.9", [Layer("double.9", 1), Layer("double.19", 1)]) == ("double.9",)
    for bad, message in (
        ("up..3", "not a layer pattern"),
        ("up.3", "No layer of this model"),
        ("output.1", "No layer of this model"),
        ("output.3.7", "No layer of this model"),
        ("output.0-999999999999.5", "No layer of this model"),
    ):
        with pytest.raises(SlimeError, match=message):
            select_layers(bad, SD1)


def test_the_papers_layers_for_sd_and_a_rule_for_the_rest() -> None:
    paper = family_for(768, "eps")
    assert (select_layers(paper.cross, SD1), select_layers(paper.self_, SD1)) == PAPER_LAYERS
    automatic = automatic_layers(SD1)
    assert automatic.read == tuple(f"output.{block}.0" for block in range(3, 9))
    assert automatic.propagate == PAPER_LAYERS.propagate

    class Nothing(ToyUNet):
        def __init__(self) -> None:
            super(ToyUNet, self).__init__(paper, "eps", [], torch.ones(5), torch.device("cpu"), 4, 8)

    with pytest.raises(SlimeError, match="no cross-attention"):
        Nothing()


def test_families_by_text_width_and_prediction() -> None:
    found = [family_for(*a).name for a in ((768, "eps"), (1024, "eps"), (1024, "v"), (2048, "v"), (1280, "eps"))]
    assert found == ["sd1", "sd2", "sd2-768", "sdxl", "unet-1280"]
    own = Family("mine", 96, 256, views=5)
    assert own.views == 5 and own.timestep == 100


@pytest.mark.parametrize("domain", scenes.DOMAINS)
def test_scenes_are_seeded_and_hold_their_parts(domain: str) -> None:
    first, second = scenes.render(domain, 12345), scenes.render(domain, 12345)
    assert np.array_equal(first.image, second.image) and first.caption == second.caption
    assert not np.array_equal(first.image, scenes.render(domain, 12346).image)
    held = np.zeros(len(scenes.PARTS[domain]) + 1)
    for seed in range(12):
        scene = scenes.render(domain, seed)
        assert scene.image.shape == (256, 256, 3) and domain in scene.caption
        present = np.unique(scene.labels)
        assert present.max() <= len(scenes.PARTS[domain])
        held[present] += 1
    assert (held >= 11).all()


def test_splits_do_not_meet_the_training_seeds() -> None:
    starts = sorted((splits.TRAINING, splits.VALIDATION_EXAMPLES, splits.VALIDATION, splits.EXAMPLES, splits.TEST))
    assert starts[0] == splits.TRAINING and all(b - a >= 50_000 for a, b in zip(starts[:-1], starts[1:], strict=True))


def test_variations_change_what_they_say() -> None:
    plain, small = (scenes.render("car", 3, scenes.VARIATIONS[name]) for name in ("plain", "small"))
    ratio = (small.labels > 0).sum() / (plain.labels > 0).sum()
    assert 0.07 < ratio < 0.16
    covered = scenes.render("horse", 3, scenes.VARIATIONS["occlusion"])
    assert (covered.labels > 0).sum() < (scenes.render("horse", 3).labels > 0).sum()


@pytest.mark.parametrize("domain", scenes.DOMAINS)
def test_natural_scenes_have_usual_colours_fine_parts_and_leave_much_unsaid(domain: str) -> None:
    found = [scenes.render(domain, 600_000 + i, style="natural") for i in range(30)]
    again = scenes.render(domain, 600_000, style="natural")
    assert np.array_equal(found[0].image, again.image) and found[0].caption == again.caption
    for label, _ in enumerate(scenes.FINE[domain], start=1):
        assert sum((scene.fine == label).any() for scene in found) >= 25
        assert all((scene.labels[scene.fine == label] > 0).all() for scene in found), "a fine part lies in a named one"
    assert 2 <= sum("part" in scene.caption for scene in found) <= 18
    assert not any(fine in scene.caption for scene in found for fine in scenes.FINE[domain])
    mentions = [sum(part in scene.caption for part in scenes.PARTS[domain]) for scene in found]
    assert np.mean(mentions) < 0.6 * len(scenes.PARTS[domain])
    if domain == "car":
        wheels = [scene.image[scene.labels == 4].mean() for scene in found]
        assert np.median(wheels) < 80, "most wheels are dark"


def test_views_of_the_official_code() -> None:
    """Corners that a rotation leaves are black and background, and every class in turn is in its crop."""
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[8:30, 4:28], labels[30:60, 36:60] = 1, 2
    example = Example.from_label_map(torch.ones(64, 64, 3), labels, ["red", "blue"])
    settings = PaperSettings(smallest_crop=0.3, blur=0.0)
    turned = 0
    for turn in range(30):
        rng = random.Random(turn)
        image, found = official_view(example, settings, rng, (64, 64), (64, 64), turn)
        assert torch.equal(found.sum(0), torch.ones(64, 64)) and found[turn % 3].any()
        black = image.amax(-1) == 0
        turned += bool(black.any())
        assert found[1:, black].sum() < 0.05 * found[1:].sum()  # images and labels are turned on grids of their own
    assert 8 <= turned <= 22
    still = replace(settings, rotation=0.0, smallest_crop=1.0, flip=False)
    image, found = official_view(example, still, random.Random(0), (64, 64), (64, 64), 0)
    assert torch.equal(found.argmax(0), example.labels) and torch.allclose(image, example.image)
    colored, _ = official_view(example, replace(still, recolor=1.0), random.Random(0), (64, 64), (64, 64), 0)
    assert not torch.allclose(colored, image, atol=0.05)
