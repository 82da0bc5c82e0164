"""Video: steadier where nothing moves, untouched where something does."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.video import flicker
from slime.parts.maps import DenseMaps, PartMaps
from slime.parts.palette import default_palette
from slime.parts.video import VideoSmoother, smooth_video_parts, stillness
from testing.clips import clip


def noisy_maps(truth: torch.Tensor, seed: int = 0) -> PartMaps:
    generator = torch.Generator().manual_seed(seed)
    one_hot = torch.nn.functional.one_hot(truth, 2).movedim(-1, 1).float()
    logits = 2 * one_hot + 1.2 * torch.randn(one_hot.shape, generator=generator)
    probabilities = logits.softmax(1)
    return PartMaps(DenseMaps(probabilities), ("a",), default_palette(1), probabilities[:, 1:].amax((2, 3)))


def test_still_pictures_flicker_less_and_stay_right() -> None:
    truth = torch.zeros(10, 24, 24, dtype=torch.int64)
    truth[:, 6:18, 6:18] = 1
    frames = 0.3 + 0.4 * truth[..., None].float().expand(-1, -1, -1, 3)
    maps = noisy_maps(truth)
    steady = smooth_video_parts(maps, frames, 0.8)
    before, after = (flicker(m.label_map.numpy(), truth.numpy()) for m in (maps, steady))
    assert after < 0.5 * before
    assert (steady.label_map == truth).float().mean() > (maps.label_map == truth).float().mean()
    torch.testing.assert_close(steady.probabilities.sum(1), torch.ones(10, 24, 24))
    assert smooth_video_parts(maps, frames, 0.0) is maps and smooth_video_parts(
        noisy_maps(truth[:1]), frames[:1]
    ).names == ("a",)


def test_nothing_trails_behind_what_moves() -> None:
    truth = torch.zeros(6, 32, 64, dtype=torch.int64)
    for t in range(6):
        truth[t, :, 10 * t : 10 * t + 10] = 1
    frames = truth[..., None].float().expand(-1, -1, -1, 3)
    one_hot = torch.nn.functional.one_hot(truth, 2).movedim(-1, 1).float()
    maps = PartMaps(DenseMaps(0.8 * one_hot + 0.1), ("a",), default_palette(1), torch.ones(6, 1))
    steady = smooth_video_parts(maps, frames, 0.9)
    assert (steady.label_map == truth).float().mean() > 0.99
    still = stillness(frames[0], frames[1])
    assert still.min() < 0.01 and still[16, 60] > 0.99


def test_averages_follow_what_moves() -> None:
    """A textured square that moves 3 pixels a frame, its part unsure in every second frame."""
    texture = torch.rand(24, 24, 3, generator=torch.Generator().manual_seed(1))
    smoother, found = VideoSmoother(0.8), []
    for number in range(8):
        frame, inside = torch.full((48, 64, 3), 0.5), torch.zeros(48, 64)
        frame[12:36, 4 + 3 * number : 28 + 3 * number] = texture
        inside[12:36, 4 + 3 * number : 28 + 3 * number] = 0.95 if number % 2 == 0 else 0.42
        smooth = smoother(torch.stack([1 - inside, inside]), frame)
        torch.testing.assert_close(smooth.sum(0), torch.ones(48, 64))
        found.append((smooth.argmax(0) == (inside > 0)).float().mean())
    assert min(found) > 0.99


def test_a_label_stays_unless_another_wins_clearly() -> None:
    still, smoother = torch.full((32, 32, 3), 0.5), VideoSmoother(0.7)
    sure, unsure = torch.tensor([0.1, 0.9])[:, None, None], torch.tensor([0.7, 0.3])[:, None, None]
    sure, unsure = sure.expand(2, 32, 32), unsure.expand(2, 32, 32)
    assert torch.equal(smoother(sure, still), sure)
    kept = [bool(smoother(unsure, still).argmax(0).all()) for _ in range(12)]
    assert kept[0] and not kept[-1]  # it holds for some frames, and lets go
    smoother(sure, still)
    assert not smoother(unsure, still + 0.4).argmax(0).any()  # where the picture changes, at once
    assert torch.equal(smoother(unsure[:, :8], still[:8]), unsure[:, :8])  # another size starts anew


def test_clips_move_and_carry_their_labels() -> None:
    frames, labels = clip("horse", 1, 5)
    again, _ = clip("horse", 1, 5)
    assert torch.equal(frames, again) and frames.shape == (5, 256, 256, 3) and labels.shape == (5, 256, 256)
    assert (labels[0] != labels[2]).any() and np.array_equal(labels[3], labels[4]), "the camera stops"
    assert flicker(labels, labels) == 0
