"""What goes beyond the paper: close-ups, layer probe, partial labels, absent parts."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from slime import SegmentSettings, load_embeddings, preset, save_embeddings, segment, train
from slime.backbones.base import Features
from slime.backbones.text import Capture
from slime.decode import closeups
from slime.decode.closeups import (
    Window,
    candidate_windows,
    choose_closeups,
    closeup_peaks,
    paste_closeups,
    spots,
    window_confidence,
    window_images,
)
from slime.decode.linear import apply_temperature, calibrating_temperature, part_logits
from slime.decode.refine import refine_maps
from slime.errors import SlimeError
from slime.examples import IGNORE, Example, merge_examples
from slime.paper.decoder import official_maps
from slime.paper.train import official_iou
from slime.parts.metrics import evaluate
from slime.training import probe
from slime.training.augment import window
from slime.training.probe import probe_layers
from testing.toy import LAYERS, ColorAndPlace, ToyUNet, toy_example, toy_score


def blob(size: int, top: int, left: int, side: int) -> torch.Tensor:
    maps = torch.full((2, size, size), 0.05)
    maps[0] = 0.95
    maps[1, top : top + side, left : left + side] = 0.9
    maps[0, top : top + side, left : left + side] = 0.1
    return maps


def test_windows_lie_on_the_densest_spots() -> None:
    maps = blob(32, 4, 20, 6)
    maps[1, 24:27, 3:6] = 0.9
    (y, x), (y2, x2) = spots(maps[1], 0.25, 2)
    assert 4 / 32 <= y <= 10 / 32 and 20 / 32 <= x <= 26 / 32 and y2 > 0.6 and x2 < 0.4
    for box in candidate_windows(maps, (200, 300), 2):
        assert box.top >= 0 and box.left >= 0 and box.top + box.height <= 200 and box.left + box.width <= 300
    assert Window(0, 0, 10, 10).overlap(Window(5, 5, 10, 10)) == 0.25
    assert spots(torch.zeros(8, 8), 0.5, 2) == []


def test_closeups_take_the_more_confident_window_and_else_the_whole_image() -> None:
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    coarse = 0.6 * blob(32, 4, 20, 6) + 0.4 * torch.tensor([0.9, 0.1])[:, None, None]
    windows = candidate_windows(coarse, (64, 64), 1)
    assert window_images(image, windows).shape == (len(windows), 64, 64, 3)
    closeups = choose_closeups(windows, torch.stack([blob(16, 4, 4, 8)] * len(windows)), coarse, 1)
    assert closeup_peaks(coarse, closeups).tolist() == pytest.approx([0.9])

    def off(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return refine_maps(maps, images, "off")

    blank = torch.stack([torch.ones(64, 64), torch.zeros(64, 64)])
    found = paste_closeups(blank, image, closeups, off)
    assert found.shape == (2, 64, 64) and torch.allclose(found.sum(0), torch.ones(64, 64), atol=1e-5)
    where = torch.nonzero(found.argmax(0))
    assert 0 < len(where) < 64 * 64 / 4 and where[:, 0].max() < 40 and where[:, 1].min() > 20

    assert choose_closeups(windows, torch.full((len(windows), 2, 16, 16), 0.5), coarse, 1) == []
    assert window_confidence(blob(16, 4, 4, 8)[None]) > window_confidence(blob(16, 0, 0, 8)[None]), (
        "parts at the border count less"
    )


def test_closeups_never_fail_where_nothing_is_found() -> None:
    flat = torch.zeros(2, 8, 8)
    flat[0] = 1
    assert candidate_windows(flat, (32, 48), 3) == []


def test_closeups_of_several_objects_in_the_whole_pipeline(monkeypatch) -> None:
    monkeypatch.setattr(closeups, "CONFIDENCE_LIMIT", 2.0)
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=4))
    images = torch.stack([toy_example(5).image, toy_example(6).image])
    plain, zoomed = (segment(toy, images, embeddings, SegmentSettings(closeups=n))[0] for n in (0, 2))
    assert zoomed.probabilities.shape == plain.probabilities.shape
    assert torch.allclose(zoomed.probabilities.sum(1), torch.ones(2, *images.shape[1:3]), atol=1e-4)
    assert torch.equal(zoomed.label_map, zoomed.probabilities.argmax(1).byte())


def test_only_images_of_low_confidence_get_closeups(monkeypatch) -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=4))
    images = torch.stack([toy_example(0).image, torch.full_like(toy_example(0).image, 0.5)])
    sure, unsure = segment(toy, images, embeddings)[0].confidence.tolist()
    monkeypatch.setattr(closeups, "CONFIDENCE_LIMIT", (sure + unsure) / 2)
    passes = []
    for image in images:
        before = toy.passes
        segment(toy, image[None], embeddings, SegmentSettings(closeups=1, batch_size=1))
        passes.append(toy.passes - before)
    assert passes[0] == 1 < passes[1]


def test_probe_prefers_layers_that_know_the_parts() -> None:
    class Blind(ToyUNet):
        """The coarsest layer's queries are noise, and its self-attention too."""

        def __init__(self) -> None:
            super().__init__()
            self.w_q[LAYERS[0].name] = torch.zeros_like(self.w_q[LAYERS[0].name])

    toy = Blind()
    found = probe_layers(toy, [toy_example(0)], preset("instant", views=4), toy.condition(""), 100)
    assert LAYERS[0].name not in found.choice.read and found.choice.read and found.choice.propagate
    assert found.read[LAYERS[0].name] == max(found.read.values())
    embeddings = train(toy, [toy_example(0)], preset("instant", views=4, read_layers="auto", propagate_layers="auto"))
    assert embeddings.layers == found.choice and toy_score(embeddings, toy) > 0.8
    reports = []
    half = train(toy, [toy_example(0)], preset("instant", views=4, propagate_layers="auto"), on_step=reports.append)
    assert half.layers.propagate == found.choice.propagate
    chosen = [report.step for report in reports if report.stage == "layers"]
    assert sorted(set(chosen)) == list(range(1, reports[0].steps + 1)) and chosen == sorted(chosen)
    assert reports[len(chosen)].stage == "views"


def test_the_probe_judges_wide_features_in_fewer_directions() -> None:
    class Wide(ColorAndPlace):
        """Says the same in very many channels."""

        def extract(self, encoded, plan, noise):
            seen = super().extract(encoded, plan, noise)
            return replace(seen, groups={name: maps.repeat(1, 400, 1, 1) for name, maps in seen.groups.items()})

    found = [
        probe_layers(eye, [toy_example(0)], preset("instant", views=4), {}, 0) for eye in (ColorAndPlace(), Wide())
    ]
    assert all(min(one.read, key=one.read.__getitem__) == "color.0" == one.choice.read[0] for one in found)
    directions = probe._project(torch.eye(1200)[None, :, :, None])
    assert directions.shape == (1, probe.DIRECTIONS, 1200, 1)
    assert torch.allclose(directions.square().sum(1).mean(), torch.tensor(probe.DIRECTIONS / 1200), rtol=0.05)
    assert torch.equal(probe._project(torch.ones(1, 1024, 2, 2)), torch.ones(1, 1024, 2, 2))


def test_parts_that_an_example_does_not_label_are_unknown_there() -> None:
    first, second = toy_example(0), toy_example(1)
    alone = Example.from_masks(second.image, {second.names[1]: second.labels == 2})
    merged = merge_examples([first], alone)
    assert merged[1].names == first.names and not merged[1].with_ignored_pixels().labels.eq(0).any()
    assert merged[0].with_ignored_pixels() is merged[0]
    assert (merged[1].with_ignored_pixels().labels == IGNORE).sum() == (merged[1].labels == 0).sum()
    same = merge_examples([Example.from_masks(first.image, {"a": first.labels == 1})],
                          Example.from_masks(first.image, {"b": first.labels == 2}))  # fmt: skip
    assert len(same) == 1 and same[0].with_ignored_pixels().labels.eq(0).any(), (
        "both calls labelled one image: nothing is unknown"
    )
    assert replace(merged[1], unlabelled="background").with_ignored_pixels().labels.eq(0).any()
    assert not replace(first, unlabelled="ignore").with_ignored_pixels().labels.eq(0).any()
    toy = ToyUNet()
    assert toy_score(train(toy, merged, preset("instant", views=6)), toy) > 0.8
    with pytest.raises(SlimeError, match="no background to learn"):
        train(toy, [replace(first, unlabelled="ignore")], preset("instant", views=2))


def test_images_without_the_object_can_be_left_empty(tmp_path) -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=4))
    assert 0.5 < embeddings.example_confidence <= 1
    assert (
        load_embeddings(save_embeddings(embeddings, tmp_path / "a.safetensors")).example_confidence
        == embeddings.example_confidence
    )
    flat = torch.full_like(toy_example(0).image, 0.5)
    images = torch.stack([toy_example(0).image, flat])
    found = segment(toy, images, embeddings)[0]
    assert found.peaks.shape == (2, 2) and abs(float(found.confidence[0]) - 1) < 0.05 and found.confidence[1] < 0.9
    between = float(found.confidence.mean())
    decided = segment(toy, images, embeddings, SegmentSettings(min_confidence=between))[0]
    assert torch.equal(decided.label_map[0], found.label_map[0]) and not decided.label_map[1].any()
    assert torch.allclose(decided.probabilities.sum(1), torch.ones(2, *images.shape[1:3]), atol=1e-4)
    zoomed = segment(toy, images, embeddings, SegmentSettings(closeups=1))[0]
    assert zoomed.peaks.shape == (2, 2)


def test_calibration_moves_no_border() -> None:
    maps = torch.rand(2, 3, 8, 8).softmax(1)
    sharp = apply_temperature(maps, 0.5)
    assert torch.equal(sharp.argmax(1), maps.argmax(1)) and (sharp.amax(1) >= maps.amax(1)).all()
    assert torch.allclose(sharp.sum(1), torch.ones(2, 8, 8)) and apply_temperature(maps, 1.0) is maps


def test_the_temperature_is_found_from_the_examples() -> None:
    labels = (3 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).softmax(1)
    dull = (labels**0.5) / (labels**0.5).sum(1, keepdim=True)
    assert calibrating_temperature(dull, labels) == pytest.approx(0.5)
    ignored = labels * (torch.arange(16) < 8)
    assert calibrating_temperature(torch.where(ignored.sum(1, keepdim=True) > 0, dull, labels**4), ignored) == 0.5
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("instant", views=4))
    assert 1 / 16 <= embeddings.decoder.temperature <= 1


def test_windows_lie_in_the_image() -> None:
    assert window(4, 1.0, random.Random(0)) == slice(0, 4)
    for seed in range(20):
        found = window(10, 0.5, random.Random(seed))
        assert 0 <= found.start < found.stop <= 10 and found.stop - found.start == 5


def test_training_iou_is_that_of_the_evaluation(monkeypatch) -> None:
    """Also where a class is predicted that the truth has not, and pixels do not count."""
    toy, generator = ToyUNet(), torch.Generator().manual_seed(0)
    capture = Capture(toy.default_layers())
    toy.predict_noise(torch.randn(1, 4, 16, 16), 10, toy.encode_prompt(""), capture)
    predicted, truth = torch.randint(0, 3, (2, 16, 16), generator=generator)
    truth[truth == 2] = 0
    labels = F.one_hot(truth, 3).movedim(-1, 0)[None].float()
    labels[..., :4] = 0  # ignored
    truth[:, :4] = 255
    maps = F.one_hot(predicted, 3).movedim(-1, 0)[None].float()
    monkeypatch.setattr("slime.paper.train.official_maps", lambda *_: maps)
    wanted = evaluate([predicted.numpy()], [truth.numpy()], 3).miou
    assert float(official_iou(capture, labels)) == pytest.approx(wanted)


@pytest.mark.parametrize("count", [3, 30])
def test_probe_takes_examples_of_any_shape_and_number(count: int) -> None:
    toy = ToyUNet()
    shapes = [(128, 128), (96, 192), (192, 96)]
    examples = [toy_example(i, *shapes[i % 3]) for i in range(count)]
    found = probe_layers(toy, examples, preset("instant"), toy.condition(""), 100)
    assert found.choice.read and found.choice.propagate


def test_adding_parts_keeps_what_was_decided_before() -> None:
    first = toy_example(0)
    red = Example.from_masks(first.image, {"red": first.labels == 1})
    blue = Example.from_masks(first.image, {"blue": first.labels == 2})
    chain = merge_examples([replace(red, unlabelled="ignore"), toy_example(1)], blue)
    assert len(chain) == 2 and torch.equal(chain[-1].image, first.image), "the changed example is the last"
    assert chain[-1].unlabelled == "ignore" and torch.equal(chain[-1].labels, first.labels)
    ignored = replace(blue, labels=torch.where(blue.labels > 0, blue.labels, IGNORE))
    kept = merge_examples([red], ignored)[0].labels
    assert torch.equal(kept == 1, first.labels == 1) and torch.equal(kept == 2, first.labels == 2)


def test_official_maps_are_background_where_no_class_counts(monkeypatch) -> None:
    toy = ToyUNet()
    embeddings = train(toy, [toy_example(0)], preset("paper", steps=2, views=1))
    monkeypatch.setattr("slime.paper.decoder.official_maps", partial(official_maps, gate=2.0))
    for crops in (1, 2):
        found = segment(toy, toy_example(1).image[None], embeddings, SegmentSettings(tiles=crops))[0]
        assert not found.label_map.any() and torch.allclose(found.probabilities[:, 0], torch.ones(1, 128, 128))


def test_vectors_go_to_the_device_of_the_features() -> None:
    """Vectors stay on the CPU; "meta" stands in for a GPU."""
    seen = Features({"group": torch.zeros(2, 6, 4, 4, device="meta")}, (), (4, 4))
    for vectors in (torch.zeros(2, 6), torch.zeros(2, 6, device="meta")):
        logits = part_logits(seen, {"group": vectors})
        assert logits.device.type == "meta" and logits.shape == (2, 3, 4, 4)
