"""fit, train and segment on a denoiser whose answer is known."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slime import (
    Example,
    PaperSettings,
    Segmenter,
    SegmentSettings,
    SlimeError,
    decode,
    extract,
    preset,
    segment,
    train,
)
from slime.backbones.attention import was_maps
from slime.backbones.layers import LayerChoice
from slime.backbones.text import Capture
from slime.batches import LARGEST_BATCH, batch_for
from slime.decode.lazy_maps import LazyMaps
from slime.edit import describe
from slime.extraction import crop_boxes
from slime.paper.losses import class_weights, sd_loss
from slime.paper.train import loss_terms
from slime.training import losses
from slime.training.augment import recolor, words
from slime.training.colors import COLORS
from slime.training.fit import _Problem, fit_vectors
from slime.training.lbfgs import minimize
from slime.training.losses import balanced_weights, weighted_cross_entropy
from testing.toy import LAYERS, ToyUNet, all_vectors, toy_example, toy_score


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"views": 2.5}, "views is 2.5; it must be a whole number"),
        ({"flip": "no"}, "flip is 'no'; it must be true or false or empty"),
        ({"read_layers": 3}, "read_layers is 3; it must be a text"),
        ({"blur": True}, "blur is True; it must be a number"),
    ],
)
def test_settings_of_another_type_are_refused(setting, message) -> None:
    with pytest.raises(SlimeError, match=message):
        preset("paper", **setting)
    with pytest.raises(SlimeError, match="tiles is '2'; it must be a whole number"):
        SegmentSettings(tiles="2")
    assert PaperSettings(steps=np.int64(3), blur=np.float32(0.5), rotation=3).steps == 3


def test_class_weights_are_the_official_rule() -> None:
    labels = torch.zeros(1, 4, 2, 5)
    labels[0, 0, 0], labels[0, 1, 1, :1], labels[0, 2, 1, 1:] = 1, 1, 1
    torch.testing.assert_close(class_weights(labels), torch.tensor([1.0, 5.0, 1.25, 0.0]))


def test_balanced_weights_count_a_part_against_the_background(monkeypatch) -> None:
    labels = torch.zeros(1, 3, 2, 5)
    labels[0, 0, 0], labels[0, 0, 1, 1:], labels[0, 1, 1, :1] = 1, 1, 1
    for exponent, weight in ((1.0, 9.0), (0.5, 3.0)):
        monkeypatch.setattr(losses, "WEIGHT_EXPONENT", exponent)
        torch.testing.assert_close(balanced_weights(labels), torch.tensor([1.0, weight, 0.0]))
    labels[0, 0] = 0  # no background at all
    assert balanced_weights(labels)[1] > 0


def test_cross_entropy_equals_torch_for_hard_labels() -> None:
    logits = torch.randn(2, 3, 4, 4)
    hard = torch.randint(0, 3, (2, 4, 4))
    weights = torch.tensor([1.0, 4.0, 2.0])
    soft = F.one_hot(hard, 3).movedim(-1, 1).float()
    torch.testing.assert_close(weighted_cross_entropy(logits, soft, weights), F.cross_entropy(logits, hard, weights))


def test_sd_loss_is_the_papers_reformulation() -> None:
    """0.005 MSE(u + 100 (c - u), eps) = 50 MSE(c, 0.99 u + 0.01 eps)."""
    c, u, eps = torch.randn(3, 1, 4, 8, 8)
    torch.testing.assert_close(
        0.005 * sd_loss(c, u, eps), 50 * F.mse_loss(c, 0.99 * u + 0.01 * eps), rtol=1e-3, atol=1e-3
    )


def test_fit_reaches_the_optimum_of_the_convex_problem() -> None:
    """At the solution the gradient of loss + L2 vanishes, and gradient descent from elsewhere ends there too."""
    g = torch.Generator().manual_seed(0)
    scores = {"coarse": torch.randn(2, 5, 4, 4, generator=g), "fine": torch.randn(2, 3, 8, 8, generator=g)}
    labels = torch.rand(2, 3, 8, 8, generator=g).mul(3).softmax(1)
    result = fit_vectors(scores, labels, steps=300, l2=1e-2)
    elsewhere = {name: vector + torch.randn(vector.shape, generator=g) for name, vector in result.vectors.items()}
    again = fit_vectors(scores, labels, steps=300, l2=1e-2, init=elsewhere)
    for name, vector in result.vectors.items():
        torch.testing.assert_close(vector, again.vectors[name], rtol=1e-2, atol=1e-2)
    assert result.losses[-1] < result.losses[0] == pytest.approx(np.log(3), rel=1e-4)


def test_fit_solves_what_torchs_own_solver_solves_in_a_fraction_of_the_steps() -> None:
    """Features with a large mean, as real ones have: the direction along it is what takes L-BFGS its steps."""
    g = torch.Generator().manual_seed(0)
    features = {"coarse": torch.randn(4, 24, 8, 8, generator=g) + 5 * torch.randn(24, 1, 1, generator=g)}
    labels = (3 * features["coarse"][:, :3]).softmax(1)
    problem = _Problem(features, labels, 0.1)
    point = torch.zeros(2, 24, requires_grad=True)
    solver = torch.optim.LBFGS([point], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-10)
    vectors, inverse = problem._whitenings["coarse"]
    values = []

    def evaluate() -> torch.Tensor:
        solver.zero_grad()
        scores = torch.einsum("pd,vdhw->vphw", point @ vectors.T, features["coarse"])
        logits = F.pad(scores, (0, 0, 0, 0, 1, 0))
        loss = weighted_cross_entropy(logits, labels, balanced_weights(labels)) + 0.1 * point.square().sum() / 2
        loss.backward()
        values.append(float(loss.detach()))
        return loss

    solver.step(evaluate)
    result = fit_vectors(features, labels, steps=100, l2=0.1)
    torch.testing.assert_close(result.vectors["coarse"], (point.detach() @ vectors.T), rtol=0.02, atol=5e-3)
    penalty = 0.1 * (result.vectors["coarse"] @ inverse.T).square().sum() / 2
    assert result.losses[-1] + float(penalty) < min(values) + 1e-4
    needed = next(i for i, value in enumerate(values) if value < min(values) + 1e-4)
    assert len(result.losses) < needed / 2


def test_fit_is_not_disturbed_by_a_group_that_never_varies() -> None:
    g = torch.Generator().manual_seed(0)
    features = {"fine": torch.randn(2, 6, 8, 8, generator=g)}
    labels = (3 * features["fine"][:, :3]).softmax(1)
    alone = fit_vectors(features, labels, steps=100)
    for constant in (0.0, 3.0, 1e4):
        more = fit_vectors({**features, "flat": torch.full((2, 6, 8, 8), constant)}, labels, steps=100)
        assert more.losses[-1] < alone.losses[-1] + 0.05
        assert all(torch.isfinite(vector).all() for vector in more.vectors.values())


def test_the_best_evaluation_is_returned_when_they_run_out() -> None:
    """The last trial of this search overshoots."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = ((x - 3) ** 2 + 0.01).sqrt()
        return value, (x - 3) / value

    for steps in range(1, 6):
        seen: list[tuple[float, float]] = []
        point, terms = minimize(function, torch.zeros(1), steps, lambda t, x: seen.append((t[0], float(x))))  # noqa: B023
        assert (terms[0], float(point)) == min(seen)


@pytest.mark.parametrize(("grouping", "names"), [("resolution", ["stride4", "stride2"]), ("layer", None)])
def test_instant_finds_the_parts(grouping: str, names: list[str] | None) -> None:
    toy = ToyUNet()
    toy.info = replace(toy.info, grouping=grouping)
    embeddings = train(toy, [toy_example(0)], preset("instant", views=6))
    assert list(embeddings.vectors) == (names or ["output.3.0", "output.6.0"])
    assert all(vector.shape == (2, 12) for vector in embeddings.vectors.values())
    assert toy_score(embeddings, toy) > 0.85


def test_training_through_the_unet_lowers_the_loss_and_finds_the_parts() -> None:
    toy = ToyUNet()
    reports = []
    settings = PaperSettings(steps=60, views=6, learning_rate=0.05)
    embeddings = train(toy, [toy_example(0)], settings, on_step=reports.append)
    steps = [r for r in reports if r.stage == "train"]
    assert embeddings.mode == "context" and len(steps) == 60 and set(steps[0].losses) == {"loss", "ce", "was", "sd"}
    assert np.mean([r.losses["ce"] for r in steps[-6:]]) < 0.8 * np.mean([r.losses["ce"] for r in steps[:6]])
    assert toy_score(embeddings, toy) > 0.5
    assert sum(r.preview is not None for r in steps) == 7


def test_passes_are_what_the_design_promises() -> None:
    """No encoding inside the loop; the unconditional half runs once for each view."""
    toy = ToyUNet()
    train(toy, [toy_example(0)], preset("paper", steps=20, views=5))
    assert toy.encoded == 5 + 1
    assert toy.passes == 20 + 5 + 2, "20 steps, 5 unconditional, and the example itself judged every tenth step"
    toy = ToyUNet()
    train(toy, [toy_example(0)], preset("instant", views=7, recolor=0.0))
    assert toy.encoded == 7 and toy.passes == 2 + 1, "seven views in batches of four, and the key projections"


def test_one_pass_serves_every_file() -> None:
    toy = ToyUNet()
    several = [train(toy, [toy_example(0)], preset("instant", views=2, seed=seed)) for seed in range(3)]
    image = toy_example(5).image[None]
    toy.passes = toy.encoded = 0
    results = segment(toy, image, several)
    assert toy.passes == 1 and toy.encoded == 1
    for item, maps in zip(several, results, strict=True):
        torch.testing.assert_close(maps.probabilities, segment(toy, image, item)[0].probabilities)


def test_same_seed_same_result_and_batches_do_not_matter() -> None:
    toy = ToyUNet()
    a, b = (train(toy, [toy_example(0)], preset("instant", views=3)) for _ in range(2))
    assert torch.equal(all_vectors(a), all_vectors(b))
    images = torch.stack([toy_example(i).image for i in range(5)])
    whole = segment(toy, images, a, SegmentSettings(batch_size=8))[0]
    parts = segment(toy, images, a, SegmentSettings(batch_size=2))[0]
    torch.testing.assert_close(whole.probabilities, parts.probabilities, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(97, 211), (300, 64), (16, 16)])
def test_any_size_comes_back_at_its_size(height: int, width: int) -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=2))
    maps = segment(toy, torch.rand(2, height, width, 4), embeddings)[0]
    assert maps.probabilities.shape == (2, 3, height, width)
    torch.testing.assert_close(maps.probabilities.sum(1), torch.ones(2, height, width), rtol=1e-3, atol=1e-3)


def test_crops_and_flip_find_the_parts_too() -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=6))
    assert toy_score(embeddings, toy, tiles=2, average_flip=True) > 0.85


def test_crop_boxes_cover_the_image_as_in_the_paper() -> None:
    """2 x 2 crops of 400 in 512, as the paper cuts faces."""
    boxes = crop_boxes(512, 512, 2, overlap=288 / 400)
    assert boxes == [(0, 0, 400, 400), (0, 112, 400, 400), (112, 0, 400, 400), (112, 112, 400, 400)]
    for count in (1, 2, 3):
        cover = np.zeros((101, 57), bool)
        for top, left, h, w in crop_boxes(101, 57, count, 0.3):
            cover[top : top + h, left : left + w] = True
        assert cover.all()


def test_stopping_keeps_the_best_rows() -> None:
    toy, last = ToyUNet(), []

    def stop(report) -> None:
        last.append(report)
        if report.stage == "train" and report.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(toy, [toy_example(0)], preset("paper", steps=50, views=3), on_step=stop)
    kept = last[-1].embeddings()
    assert kept is not None and torch.isfinite(all_vectors(kept)).all()
    resumed = train(toy, [toy_example(0)], preset("paper", steps=5, views=3), init_embeddings=kept)
    assert resumed.names == kept.names


def test_mismatches_are_refused(tmp_path) -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=1))
    other = Example.from_label_map(toy_example(0).image, toy_example(0).labels, ["x", "y"])
    with pytest.raises(SlimeError, match="same parts"):
        train(toy, [toy_example(0), other])
    with pytest.raises(SlimeError, match="have the parts red, blue"):
        train(toy, [other], init_embeddings=embeddings)
    with pytest.raises(SlimeError, match="learned by the other trainer"):
        train(toy, [toy_example(0)], preset("paper", steps=1, views=1), init_embeddings=embeddings)
    with pytest.raises(SlimeError, match="There is no example"):
        train(toy, [])
    with pytest.raises(SlimeError, match='"toy" model'):
        segment(ToyUNet("elsewhere"), toy_example(0).image[None], embeddings)
    for bad, message in (
        (torch.rand(1, 1, 1, 3), "1x1"),
        (torch.full((1, 32, 32, 3), torch.nan), "NaN"),
        (torch.rand(32, 32, 3), "B, H, W"),
    ):
        with pytest.raises(SlimeError, match=message):
            segment(toy, bad, embeddings)
    with pytest.raises(SlimeError, match="views is 0; it must be from 1 to 10000"):
        preset("instant", views=0)
    with pytest.raises(SlimeError, match="Unknown preset"):
        preset("fast")


def test_settings_that_a_trainer_does_not_use_are_refused() -> None:
    for name, change in (("instant", "dice"), ("instant", "learning_rate"), ("paper", "timestep")):
        with pytest.raises(SlimeError, match=f"The preset {name} has no setting {change}; it has: .*views"):
            preset(name, **{change: 0.1})
    assert preset("paper") == PaperSettings(), "an instance without arguments is the preset"
    with pytest.raises(SlimeError, match="no trainer for SegmentSettings"):
        train(ToyUNet(), [toy_example(0)], SegmentSettings())


def test_a_segmenter_equals_its_halves() -> None:
    toy = ToyUNet()
    segmenter = Segmenter(toy, train(toy, [toy_example(0)], preset("instant", views=2)))
    images = torch.stack([toy_example(i).image for i in range(6)])
    whole = segmenter(images)
    assert torch.equal(
        decode(extract(toy, images, segmenter.embeddings), segmenter.embeddings).label_map, whole.label_map
    )
    batches = list(map(segmenter, images.split(2)))
    assert torch.equal(torch.cat([maps.label_map for maps in batches]), whole.label_map)
    assert whole.label_map.dtype == torch.uint8 and whole.size == (128, 128) and len(whole) == 6


def test_part_maps_keep_small_maps_and_make_pixels_when_asked() -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=2))
    images = torch.stack([toy_example(i, 512, 512).image for i in range(4)])
    maps = segment(toy, images, embeddings)[0]
    assert isinstance(maps.source, LazyMaps)
    held = maps.source.maps.numel() + maps.peaks.numel()
    assert held < 4 * 3 * 512 * 512 / 100 and maps.source.images.data_ptr() == images.data_ptr(), (
        "no copy of the images"
    )
    passes = toy.passes
    torch.testing.assert_close(torch.cat([c for _, c in maps.chunks()]), maps.probabilities)
    torch.testing.assert_close(maps.source(slice(2, 3)), maps.probabilities[2:3])
    assert toy.passes == passes and torch.equal(maps.label_map, maps.probabilities.argmax(1).to(torch.uint8))


def test_examples_of_different_shapes_are_learned_together() -> None:
    toy = ToyUNet()
    shapes = [toy_example(0), toy_example(1, 96, 192)]
    assert toy_score(train(toy, shapes, preset("instant", views=6)), toy) > 0.85
    assert toy_score(train(toy, shapes, preset("paper", steps=60, views=6, learning_rate=0.05)), toy) > 0.5


def test_batches_and_views_are_what_the_model_asks_for() -> None:
    assert batch_for(torch.device("cpu"), 1, 1e12) == 1
    assert batch_for(torch.device("meta"), 1e6, 1e7) == 5 and batch_for(torch.device("meta"), 1, 1e12) == LARGEST_BATCH
    toy = ToyUNet()
    toy.info = replace(toy.info, views=3)
    assert preset("instant", toy.info).views == 3 and preset("instant", toy.info, views=7).views == 7
    assert preset("paper", toy.info) == PaperSettings()
    assert train(toy, [toy_example(0)]).settings["views"] == 3


def test_short_memory_halves_the_batches_and_says_so_at_one() -> None:
    class Small(ToyUNet):
        limit = 1

        def predict_noise(self, noisy, *args):
            if len(noisy) > self.limit and noisy.shape[-1] > 8:  # the 8x8 probe always fits
                raise torch.OutOfMemoryError("no memory")
            return super().predict_noise(noisy, *args)

    toy, small = ToyUNet(), Small()
    embeddings = train(small, [toy_example(0)], preset("instant", views=6))
    torch.testing.assert_close(
        all_vectors(embeddings),
        all_vectors(train(toy, [toy_example(0)], preset("instant", views=6))),
        rtol=0.05,
        atol=0.05,
    )
    images = torch.stack([toy_example(i).image for i in range(5)])
    expected = segment(toy, images, embeddings)[0].probabilities
    torch.testing.assert_close(segment(small, images, embeddings)[0].probabilities, expected, rtol=1e-4, atol=1e-5)
    small.limit = 0
    with pytest.raises(SlimeError, match="Out of GPU memory with a single image"):
        segment(small, images, embeddings)


def test_the_check_of_colours_says_what_it_found() -> None:
    """The toy's features are colours: recoloured views lose its parts; a name that says a colour keeps its views."""
    plain = toy_example(0)
    neutral = Example.from_label_map(plain.image, plain.labels, ["wheel", "door"])
    found = train(ToyUNet(), [neutral], preset("instant", views=24)).settings["color_check"]
    assert found["recolored"] < 0.9 and "trained with changed colours" in found["found"]
    assert plain.names == ("red", "blue")
    for names in (plain.names, ("redStripe", "door"), ("grüner Streifen", "door"), ("\u7ea2\u8272", "door")):
        named = Example.from_label_map(plain.image, plain.labels, names)
        found = train(ToyUNet(), [named], preset("instant", views=6)).settings["color_check"]
        assert found["named"] and found["recolored"] is None
    for name in ("bored", "greenhouse", "predator", "wheel"):
        assert not COLORS.search(words(name))
    assert "colours: Parts were lost" in describe(train(ToyUNet(), [neutral], preset("instant", views=24)))
    assert "color_check" not in train(ToyUNet(), [neutral], preset("instant", views=6, recolor=0.0)).settings


def test_recoloured_views_keep_their_shapes_and_forget_colours() -> None:
    """Every part gets a colour change of its own; inside a part the change is one affine map."""
    example = toy_example(0)
    changed = recolor(example.image, example.labels, 1.0, random.Random(0))
    for label in range(3):
        inside = changed[example.labels == label]
        assert inside.std(0).max() < 1e-5
    assert (changed - example.image).abs().max() > 0.1
    assert torch.equal(recolor(example.image, example.labels, 0.0, random.Random(0)), example.image)


def test_training_that_does_not_fit_is_tried_again_with_checkpointing(caplog) -> None:
    class Small(ToyUNet):
        """Gradients fit only with checkpointing; ``never`` not even then."""

        never = False

        @contextmanager
        def differentiable(self, checkpointing: bool):
            with super().differentiable(checkpointing):
                if self.never or not checkpointing:
                    raise torch.OutOfMemoryError("no memory")
                yield

    toy = Small()
    embeddings = train(toy, [toy_example(0)], preset("paper", steps=3, views=2))
    assert torch.isfinite(all_vectors(embeddings)).all() and "training again with checkpointing" in caplog.text
    toy.never = True
    for checkpointing in (False, True):
        with pytest.raises(SlimeError, match="Use the preset instant"):
            train(toy, [toy_example(0)], preset("paper", steps=3, views=2, checkpointing=checkpointing))


def test_overflow_is_reported_and_not_returned_as_a_mask() -> None:
    class Overflow(ToyUNet):
        broken = False

        def predict_noise(self, noisy, *args):
            return super().predict_noise(noisy * torch.nan if self.broken else noisy, *args)

    toy = Overflow()
    presets = (preset("instant", views=2), preset("paper", views=2, steps=3))
    learned = [train(toy, [toy_example(0)], chosen) for chosen in presets]
    toy.broken = True
    for embeddings in learned:
        with pytest.raises(SlimeError, match="NaN or infinite"):
            segment(toy, toy_example(1).image[None], embeddings)
    with pytest.raises(SlimeError, match="NaN or infinite"):
        train(toy, [toy_example(0)], preset("instant", views=2))


def test_an_instant_fit_ends_with_its_own_preview() -> None:
    """The maps of the first example come from features at hand: no further encoding, no further pass."""
    toy, reports = ToyUNet(), []
    embeddings = train(toy, [toy_example(0)], preset("instant", views=3), on_step=reports.append)
    passes, encoded = toy.passes, toy.encoded
    last = reports[-1]
    assert last.stage == "done" and last.embeddings() == embeddings and last.preview is not None
    maps = segment(toy, toy_example(0).image[None], embeddings, SegmentSettings(refine="off"))[0]
    assert toy.passes > passes and toy.encoded > encoded
    shown = torch.nn.functional.interpolate(last.preview[1][None], size=maps.label_map.shape[1:], mode="bilinear")
    assert (shown.argmax(1) == maps.label_map).float().mean() > 0.97


def test_official_files_need_no_score_features() -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("paper", steps=2, views=1))
    toy.passes = 0
    segment(toy, toy_example(1).image[None], embeddings)
    assert toy.passes == 1, "no pass for key projections"


def test_features_are_decoded_for_every_file_and_every_setting() -> None:
    """Decoding costs no encoding and no pass, and gives what segmenting gives."""
    toy = ToyUNet()
    several = [train(toy, [toy_example(0)], preset("instant", views=2, seed=seed)) for seed in range(3)]
    images = torch.stack([toy_example(i).image for i in range(5)])
    features = extract(toy, images, several[0], SegmentSettings(average_flip=True, noise_samples=2))
    toy.passes = toy.encoded = 0
    for item in several:
        for refine in ("off", "fast"):
            found = decode(features, item, SegmentSettings(refine=refine))
            assert toy.passes == toy.encoded == 0
            direct = segment(toy, images, item, SegmentSettings(average_flip=True, noise_samples=2, refine=refine))[0]
            torch.testing.assert_close(found.probabilities, direct.probabilities)
            toy.passes = toy.encoded = 0
    other = train(toy, [toy_example(0)], preset("instant", views=2, timestep=60))
    with pytest.raises(SlimeError, match="need other features"):
        decode(features, other)


def test_paper_starts_from_the_words_of_its_prompt() -> None:
    toy, seen = ToyUNet(), []

    def watch(report) -> None:
        seen.append(report.embeddings())

    train(toy, [toy_example(0)], preset("paper", steps=1, views=1, learning_rate=1e-6), on_step=watch)
    words = toy.encode_prompt("part part part").tokens[1:3]
    torch.testing.assert_close(seen[-1].vectors["shared"], words, rtol=1e-2, atol=1e-3)


def test_ignored_pixels_train_nothing_in_any_term() -> None:
    """Changing the prediction where nothing is labelled changes no loss term and no IoU."""
    toy = ToyUNet()
    capture = Capture(LayerChoice((LAYERS[0].name, LAYERS[1].name), (LAYERS[2].name,)))
    toy.predict_noise(torch.randn(1, 4, 16, 16), 10, toy.encode_prompt(""), capture)
    labels = torch.zeros(1, 3, 16, 16)
    labels[:, 1, :4], labels[:, 0, 4:8] = 1, 1  # the lower half is unknown
    scores = torch.randn(1, 3, 16, 16)
    changed = scores.clone()
    changed[:, :, 8:] += 5 * torch.randn(1, 3, 8, 16)
    first, second = (loss_terms(s, capture, labels) for s in (scores, changed))
    torch.testing.assert_close(first["ce"], second["ce"])
    was = loss_terms(scores.requires_grad_(True), capture, labels)["was"]
    half = labels.sum(1, keepdim=True)
    spread = was_maps(list(capture.self_.values()), scores.softmax(1))
    torch.testing.assert_close(was, 3 * ((spread - labels) * half).square().mean())


class HostReads(TorchDispatchMode):
    """Counts, by file, the operations that hand a tensor's value to Python: on a GPU the host waits for each.

    Not counted: values that lie on the CPU anyway (the noise schedule, Adam's step), and ``one_hot``'s check, which
    only the CPU makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            ours = [f for f in traceback.extract_stack() if {"slime", "optim"} & set(Path(f.filename).parts[-3:-1])]
            caller = ours[-1]
            exempt = "one_hot" in (caller.line or "") or caller.name in ("add_noise", "_get_value")
            self.files[Path(caller.filename).stem] += not exempt
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_in_loops() -> None:
    def reads(steps: int) -> Counter[str]:
        with HostReads() as seen:
            train(ToyUNet(), [toy_example(0)], preset("paper", steps=steps, views=4))
        return +seen.files

    more = reads(40) - reads(20)
    assert more == {"train": 2 * 4}, "loss and its three terms, every tenth step"
    embeddings = train(ToyUNet(), [toy_example(0)], preset("instant", views=2))
    images = toy_example(1).image[None].expand(8, -1, -1, -1)
    with HostReads() as seen:
        segment(ToyUNet(), images, embeddings, SegmentSettings(batch_size=2))
    assert +seen.files == {"batches": 4, "images": 2 * 8}, "one look for NaN a sub-batch, and one at each image"


def test_the_papers_rows_are_chosen_on_validation_images() -> None:
    seen = []

    class Counting(ToyUNet):
        def encode_images(self, images):
            seen.append(images.clone())
            return super().encode_images(images)

    train(Counting(), [toy_example(0)], PaperSettings(views=1, steps=1), validation=[toy_example(1), toy_example(2)])
    assert torch.equal(torch.cat(seen)[1:], torch.stack([toy_example(1).image, toy_example(2).image]))
    with pytest.raises(SlimeError, match="same parts"):
        train(ToyUNet(), [toy_example(0)], PaperSettings(), validation=[replace(toy_example(1), names=("a", "b"))])


def test_segmenting_tells_of_every_sub_batch_from_the_first_encoded_one() -> None:
    toy, example = ToyUNet(), toy_example(0)
    learned = train(toy, [example], preset("instant", views=2))
    heard: list[tuple[int, int]] = []
    images = example.image.expand(6, -1, -1, -1)
    settings = SegmentSettings(batch_size=2, average_flip=True)
    segment(toy, images, learned, settings, on_batch=lambda done, total: heard.append((done, total)))
    assert heard[0][0] <= 2 and heard[-1] == (12, 12) and len(heard) == 6 + 3
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
