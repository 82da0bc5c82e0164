"""Video: steadier where nothing moves, untouched where something does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.video import flicker
from slime.parts.maps import DenseMaps, PartMaps
from slime.parts.palette import default_palette
from slime.parts.video import VideoSmoother, smooth_video_parts
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


@pytest.mark.parametrize(("contrast", "speed", "share"), [(0.1, 3, 0.01), (0.05, 3, 0.04), (0.2, 1, 0.01)])
def test_nothing_trails_where_colours_hardly_differ(contrast, speed, share) -> None:
    """A flat object on a flat ground, its part not much more probable than the ground."""
    smoother, wrong = VideoSmoother(0.7), 0
    for number in range(16):
        frame, truth = torch.full((64, 160, 3), 0.4), torch.zeros(64, 160)
        frame[16:48, 4 + speed * number : 44 + speed * number] += contrast
        truth[16:48, 4 + speed * number : 44 + speed * number] = 1
        inside = torch.where(truth > 0, 0.62, 0.4)
        wrong += int((smoother(torch.stack([1 - inside, inside]), frame).argmax(0) != truth).sum())
    assert wrong < share * 16 * 1280


def test_a_dissolve_carries_no_label_over() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.rand(2, 48, 48, 3, generator=generator)
    smoother = VideoSmoother(0.7)
    for number in range(60):
        share = min(1.0, max(0.0, (number - 5) / 12))
        inside = torch.full((48, 48), 0.9 - 0.5 * share)
        smoother(torch.stack([1 - inside, inside]), 0.5 * torch.lerp(one, other, share))
    assert not smoother.labels.any()


def test_large_frames_are_matched_at_a_smaller_size() -> None:
    """Motion of 7 pixels in a picture four times as wide as it is matched at."""
    picture = torch.rand(40, 140, 3, generator=torch.Generator().manual_seed(2)).repeat_interleave(8, 0)
    picture = picture.repeat_interleave(8, 1)
    smoother, mask = VideoSmoother(0.9), torch.zeros(320, 1024)
    for number in range(4):
        x = 100 + 7 * number
        frame = picture[:, 50 - 7 * number : 50 - 7 * number + 1024]
        mask = torch.zeros(320, 1024)
        mask[100:200, x : x + 200] = 0.9 if number < 3 else 0.45
        smoother(torch.stack([1 - mask, mask]), frame)
    assert (smoother.labels == (mask > 0)).float().mean() > 0.99


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
