"""The whole road on devices that are not here: one that keeps CUDA's rules, one that refuses float64 as MPS does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slime import PaperSettings, Segmenter, SegmentSettings, preset, train
from testing.toy import ToyUNet, all_vectors, toy_example

OWN_PROCESS = "SLIME_SIMULATED_DEVICE"
there = pytest.mark.skipif(OWN_PROCESS not in os.environ, reason="torch learns of a device only in a fresh process")
here = pytest.mark.skipif(OWN_PROCESS in os.environ, reason="this is that process")
TRAINERS = {
    "instant": preset("instant", views=3),
    "auto": preset("instant", views=3, read_layers="auto"),
    "paper": PaperSettings(views=2, steps=2),
    "paper, checkpointing": PaperSettings(views=2, steps=2, checkpointing=True),
}
READERS = (
    SegmentSettings(),
    SegmentSettings(closeups=1, refine="best", average_flip=True, noise_samples=2),
    SegmentSettings(tiles=2, min_confidence=0.5),
)


def walk(backbone: ToyUNet, trainer: str) -> list[torch.Tensor]:
    """Rows, and the label map from every reader."""
    embeddings = train(backbone, [toy_example(0)], TRAINERS[trainer])
    image = toy_example(1).image[None]
    maps = [Segmenter(backbone, embeddings, settings)(image) for settings in READERS]
    return [all_vectors(embeddings), *(one.label_map for one in maps)]


@pytest.mark.long
@here
def test_simulated_devices_in_a_process_of_their_own() -> None:
    pytest.importorskip("testing.devices", reason="this torch cannot simulate a device")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {OWN_PROCESS: "1"}
    done = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:]


DEVICES = {
    "mps-float32": (False, torch.float32, tuple(TRAINERS)),
    "cuda-float16": (True, torch.float16, ("instant", "paper")),
    "cuda-bfloat16": (True, torch.bfloat16, ("paper",)),
}


@there
@pytest.mark.parametrize(("name", "trainer"), [(name, one) for name, (*_, some) in DEVICES.items() for one in some])
def test_the_whole_road_on_another_device(name, trainer) -> None:
    from testing.devices import simulated_device

    float64, dtype, _ = DEVICES[name]
    with simulated_device(float64) as device:
        found = walk(ToyUNet(device=device, dtype=dtype), trainer)
    wanted = walk(ToyUNet(dtype=dtype), trainer)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-3, rtol=1e-3)  # which refuses tensors of another device
    assert all((a == b).float().mean() > 0.99 for a, b in zip(found[1:], wanted[1:], strict=True))


@there
def test_the_simulated_device_refuses_what_real_ones_refuse() -> None:
    from testing.devices import simulated_device

    with simulated_device(float64=False) as device:
        ones = torch.ones(3).to(device)
        with pytest.raises(RuntimeError, match="same device"):
            ones + torch.ones(3)
        with pytest.raises(TypeError, match="float64"):
            ones.double()
        with pytest.raises(TypeError, match="numpy"):
            ones.numpy()


@there
def test_a_training_step_does_not_wait_for_the_device() -> None:
    """Twenty steps more fetch hardly more from the device."""
    from testing.devices import simulated_device, waits

    with simulated_device() as device:
        counts = []
        for steps in (20, 40):
            before = waits()
            train(ToyUNet(device=device), [toy_example(0)], PaperSettings(views=2, steps=steps))
            counts.append(waits() - before)
    assert counts[1] - counts[0] < 20


@there
def test_the_fit_waits_twice_for_an_evaluation(monkeypatch) -> None:
    from slime.training import lbfgs
    from slime.training.fit import fit_vectors
    from testing.devices import simulated_device, waits

    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 6, 8, 8, generator=generator)
    labels = (5 * maps[:, :3]).softmax(1)
    monkeypatch.setattr(lbfgs, "TOLERANCE", 0.0)
    counts = []
    with simulated_device() as device:
        for steps in (2, 12):
            before = waits()
            result = fit_vectors({"fine": maps.to(device)}, labels.to(device), steps=steps, l2=1e-4)
            counts.append((waits() - before, len(result.losses)))
    assert counts[1][1] > counts[0][1] + 8
    assert counts[1][0] - counts[0][0] <= 2 * (counts[1][1] - counts[0][1])


@there
def test_a_mesh_is_rendered_and_a_concept_is_learned_on_another_device() -> None:
    from slime.concepts.detection import Detections, detection_losses, instances
    from slime.mesh.views import Camera, render_views
    from testing.devices import simulated_device
    from testing.meshes import build

    labels = torch.zeros(16, 16, dtype=torch.int64)
    labels[2:6, 3:9] = 1
    target = instances(labels, 1, labels >= 0)
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(1, 3, 4, generator=generator).cumsum(-1) / 4
    shapes = ((1, 3), (1, 3, 16, 16), (1, 1))
    found = Detections(boxes, *(torch.randn(shape, generator=generator) for shape in shapes))
    surface, _ = build("horse", 1)
    with simulated_device() as device:
        views = render_views(surface, [Camera(30.0)], 48, device=device)
        moved = detection_losses(Detections(*(tensor.to(device) for tensor in found)), target)
        losses = {name: loss.cpu() for name, loss in moved.items()}
    wanted = render_views(surface, [Camera(30.0)], 48)
    assert torch.equal(views.faces, wanted.faces) and torch.allclose(views.images, wanted.images, atol=1e-5)
    for name, loss in detection_losses(found, target).items():
        torch.testing.assert_close(losses[name], loss)


@there
def test_a_video_is_smoothed_on_another_device() -> None:
    from slime.parts.video import VideoSmoother
    from testing.devices import simulated_device

    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(1, 8, 300, 3, generator=generator).expand(3, -1, -1, -1)  # wider than it is matched at
    maps = torch.rand(3, 2, 8, 300, generator=generator).softmax(1)
    wanted = VideoSmoother(0.7)
    expected = [wanted(*pair) for pair in zip(maps, frames, strict=True)]
    with simulated_device(float64=False) as device:
        smoother = VideoSmoother(0.7)
        found = [smoother(one.to(device), frame.to(device)).cpu() for one, frame in zip(maps, frames, strict=True)]
        labels = smoother.labels.cpu()
    torch.testing.assert_close(found, expected)
    assert torch.equal(labels, wanted.labels)
