"""The loop of correcting: what was found opens the painter, borders snap, the least sure image is picked."""

from __future__ import annotations

import json
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from slime.errors import SlimeError
from slime.parts.maps import DenseMaps, PartMaps
from slime.parts.palette import default_palette
from slime.parts.runs import decode_runs, encode_runs
from testing.server import WorkflowFailed

SEG = namedtuple("SEG", "cropped_image cropped_mask confidence crop_region bbox label control_net_wrapper")


@pytest.fixture
def nodes(extension, tmp_path, monkeypatch):
    import folder_paths
    import slime_extension.nodes.initial_masks
    import slime_extension.nodes.painter
    import slime_extension.nodes.select_image
    import slime_extension.nodes.snapping as module

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return slime_extension.nodes if hasattr(slime_extension, "nodes") else module


def parts_of(nodes, labels: np.ndarray, peaks=None):
    """A result whose probabilities are these label maps [B, h, w]."""
    maps = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 3).movedim(-1, 1).float()
    sure = torch.ones(len(labels), 2) if peaks is None else torch.tensor(peaks)
    found = PartMaps(DenseMaps(maps), ("wheel", "window"), tuple(default_palette(2)), sure, 0.5)
    return nodes.common.Parts(found, torch.rand(len(labels), *labels.shape[1:], 3))


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.zeros((1, 40, 60), int)
    labels[0, 5:15, 10:30], labels[0, 20:35, 30:50] = 1, 2
    return labels


def proposed(output) -> tuple[list[str], np.ndarray]:
    found = output.ui["slime_initial_masks"][0]
    return [part["name"] for part in found["parts"]], decode_runs(found["runs"], found["width"], found["height"])


def test_an_empty_painter_opens_with_parts_and_what_follows_waits(nodes, labels) -> None:
    parts = parts_of(nodes, labels)
    output = nodes.painter.SLiMePartPainter.execute("", initial_masks=parts)
    names, opened = proposed(output)
    assert names == ["wheel", "window"] and np.array_equal(opened, labels[0])
    assert output.block_execution is None and all(value.message is None for value in output.args)  # no red
    # What the page saves from it teaches, on this image only.
    saved = json.dumps(
        {
            "version": 1,
            "image": None,
            "parts": output.ui["slime_initial_masks"][0]["parts"],
            "width": 60,
            "height": 40,
            "runs": encode_runs(opened),
            "of": output.ui["slime_digest"][0],
        }
    )
    examples, pixels, _ = nodes.painter.SLiMePartPainter.execute(saved, initial_masks=parts).args
    assert torch.equal(pixels, parts.images) and np.array_equal(examples[0].labels.numpy(), labels[0])
    another = nodes.painter.SLiMePartPainter.execute(saved, initial_masks=parts_of(nodes, labels))
    assert "another image" in another.block_execution


def test_masks_segs_and_boxes_open_the_painter_too(nodes, labels) -> None:
    image = torch.rand(1, 40, 60, 3)
    wheel, window = (torch.from_numpy(labels[0] == label).float() for label in (1, 2))

    def run(found):
        return proposed(nodes.painter.SLiMePartPainter.execute("", image, initial_masks=found))

    names, opened = run(torch.stack([wheel, window]))
    assert names == ["part 1", "part 2"] and np.array_equal(opened, labels[0])
    pieces = [
        SEG(None, np.ones((10, 20), np.float32), 0.9, (10, 5, 30, 15), None, "wheel", None),
        SEG(None, np.ones((15, 20), np.float32), 0.9, (30, 20, 50, 35), None, "window", None),
    ]
    names, opened = run(((40, 60), pieces))
    assert names == ["wheel", "window"] and np.array_equal(opened, labels[0])
    box = {"x": 10, "y": 5, "width": 20, "height": 10}
    for given in (box, [box], [[box]]):
        names, opened = run(given)
        assert names == ["part 1"] and np.array_equal(opened, labels[0] == 1)
    for outside in ({"x": -50, "y": 0}, {"x": 0, "y": -50}, {"x": 90, "y": 0}):
        assert not run(outside | {"width": 20, "height": 10})[1].any()


def test_what_cannot_be_painted_says_so(nodes, labels) -> None:
    image = torch.rand(1, 40, 60, 3)
    for found, wanted in (
        (parts_of(nodes, np.repeat(labels, 2, 0)), "2 images"),
        (torch.zeros(1, 8, 8), "8x8 but the image is 60x40"),
        (torch.zeros(77, 40, 60), "at most 76"),
        ("car", "Connect SLiMe parts"),
        ({"x": 1, "left": 2}, "A bounding box of initial_masks is .*needs the numbers x, y, width and height"),
    ):
        with pytest.raises(SlimeError, match=wanted):
            nodes.painter.SLiMePartPainter.execute("", image, initial_masks=found)


def test_the_least_sure_image_comes_first(nodes, labels) -> None:
    parts = parts_of(nodes, np.repeat(labels, 3, 0), [[0.5, 0.5], [0.1, 0.3], [0.3, 0.3]])
    picked, image, index, order = nodes.select_image.SLiMePickLeastSure.execute(parts).args
    assert index == 1 and torch.equal(image, parts.images[1:2]) and order == "1: 0.40, 2: 0.60, 0: 1.00"
    assert len(picked.maps) == 1 and picked.maps.confidence.tolist() == pytest.approx([0.4])
    assert nodes.select_image.SLiMePickLeastSure.execute(parts, 3).args[2] == 0
    with pytest.raises(SlimeError, match="there are 3 images"):
        nodes.select_image.SLiMePickLeastSure.execute(parts, 4)


def disc(radius: float) -> np.ndarray:
    y, x = np.mgrid[:128, :128] - 63.5
    return np.hypot(y, x) < radius


def test_a_rough_outline_snaps_to_the_edge(nodes) -> None:
    rng = np.random.default_rng(0)
    picture = np.where(disc(40)[..., None], (200, 60, 40), (60, 90, 160)) + rng.normal(0, 8, (128, 128, 3))
    image = np.asarray(Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(1)))
    truth = disc(40)
    for rough in (disc(37), disc(43), np.roll(disc(40), 3, 1)):
        before = (rough & truth).sum() / (rough | truth).sum()
        found = nodes.snapping.snap(rough.astype(np.uint8), image, 0.06) > 0
        after = (found & truth).sum() / (found | truth).sum()
        assert after > 0.96 and after > before
    two = np.zeros((128, 128), np.uint8)
    two[:, :60][disc(38)[:, :60]], two[:, 68:][disc(38)[:, 68:]] = 1, 2
    assert set(np.unique(nodes.snapping.snap(two, image))) == {0, 1, 2}  # both stay, however close
    thin = np.zeros((128, 128), np.uint8)
    thin[60:62, 40:80] = 1
    assert (nodes.snapping.snap(thin, image) == 1).any()  # a line has no inside, and is kept all the same


@pytest.mark.long
def test_snapping_over_the_wire(server) -> None:
    labels = disc(37).astype(np.uint8)
    picture = np.where(disc(40)[..., None], 220, 40).astype(np.uint8).repeat(3, 2)
    Image.fromarray(picture).save(server.base / "input" / "snap.png")
    painting: dict[str, object] = {"version": 1, "image": None, "width": 128, "height": 128}
    painting |= {"parts": [{"name": "disc", "color": "#ff0000"}], "runs": encode_runs(labels)}
    answer = server.post("/slime/snap", {"painting": json.dumps(painting), "image": "snap.png [input]"})
    found = decode_runs(answer["runs"], answer["width"], answer["height"]) > 0
    assert (found & disc(40)).sum() / (found | disc(40)).sum() > 0.97
    for bad in ({}, {"painting": "{"}, {"painting": json.dumps(painting), "image": "../../etc/passwd [input]"}):
        with pytest.raises(WorkflowFailed, match="/slime/snap"):
            server.post("/slime/snap", bad)
