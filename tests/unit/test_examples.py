"""Examples: construction, validation, chaining."""

from __future__ import annotations

import logging

import pytest
import torch

from slime.errors import SlimeError
from slime.examples import Example, merge_examples

IMAGE = torch.rand(20, 24, 3, generator=torch.Generator().manual_seed(0))


def mask(top: int, bottom: int) -> torch.Tensor:
    m = torch.zeros(20, 24)
    m[top:bottom] = 0.9961  # what a white pixel of a grey mask is in newer cores
    return m


def test_masks_become_labels_and_later_wins(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        example = Example.from_masks(IMAGE, {"a": mask(0, 8), " b ": mask(6, 12)})
    assert example.names == ("a", "b")
    assert [int((example.labels == k).sum()) for k in range(3)] == [8 * 24, 6 * 24, 6 * 24]
    assert '48 pixels of "b"' in caplog.text


def test_label_map_and_ignored_pixels() -> None:
    labels = torch.zeros(20, 24, dtype=torch.uint8)
    labels[0], labels[1] = 1, 255
    assert Example.from_label_map(IMAGE, labels, ["a"]).labels[1].eq(255).all()
    labels[2] = 7
    with pytest.raises(SlimeError, match=r"\[7\]"):
        Example.from_label_map(IMAGE, labels, ["a"])


def test_colors_take_the_nearest_within_ten_levels() -> None:
    colored = torch.zeros(20, 24, 3)
    colored[:4] = torch.tensor([250, 3, 0]) / 255
    colored[4:8] = torch.tensor([200, 0, 0]) / 255
    example = Example.from_colors(IMAGE, colored, {"lamp": (255, 0, 0)})
    assert example.labels[:4].eq(1).all() and example.labels[4:].eq(0).all()
    with pytest.raises(SlimeError, match="door"):
        Example.from_colors(IMAGE, colored, {"lamp": (255, 0, 0), "door": (0, 255, 0)})


@pytest.mark.parametrize(
    ("image", "masks", "message"),
    [
        (IMAGE, {"a": torch.zeros(20, 24)}, '"a" is empty'),
        (IMAGE, {"a": torch.zeros(64, 64)}, "Nothing is painted"),
        (IMAGE, {"a": 0.3 * mask(0, 2)}, "reaches only 0.30"),
        (IMAGE, {"a": mask(0, 2) + torch.nan}, "NaN or infinite"),
        (IMAGE, {"a": torch.ones(64, 64)}, "64x64 but the image is 24x20"),
        (IMAGE, {}, "No part names"),
        (IMAGE, {"a": mask(0, 2), "a ": mask(2, 4)}, "more than once: a"),
        (IMAGE, {"background": mask(0, 2)}, "not a part"),
        (IMAGE, {"": mask(0, 2)}, "empty name"),
        (IMAGE, {f"p{i}": mask(0, 2) for i in range(77)}, "77 parts given; at most 76"),
        (IMAGE, {"a": mask(2, 4), "b": mask(0, 9)}, "cover it"),
        (torch.rand(1, 1, 3), {"a": torch.ones(1, 1)}, "1x1"),
        (torch.full((20, 24, 3), float("nan")), {"a": mask(0, 2)}, "1440 NaN"),
        (IMAGE * 255, {"a": mask(0, 2)}, r"\[0, 1\]"),
        (torch.rand(20, 24), {"a": mask(0, 2)}, r"\[H, W, 3\]"),
    ],
)
def test_bad_input_says_what_to_do(image, masks, message) -> None:
    with pytest.raises(SlimeError, match=message):
        Example.from_masks(image, masks)


def test_rgba_and_grey_images_are_taken() -> None:
    assert Example.from_masks(torch.rand(20, 24, 4), {"a": mask(0, 2)}).image.shape == (20, 24, 3)
    assert Example.from_masks(torch.rand(20, 24, 1), {"a": mask(0, 2)}).image.shape == (20, 24, 3)


def test_chaining_the_same_image_adds_parts_another_image_a_shot() -> None:
    first = merge_examples((), Example.from_masks(IMAGE, {"a": mask(0, 4)}))
    both = merge_examples(first, Example.from_masks(IMAGE, {"b": mask(3, 8)}))
    assert len(both) == 1 and both[0].names == ("a", "b")
    assert both[0].labels[3].eq(2).all() and both[0].labels[0].eq(1).all()
    more = merge_examples(both, Example.from_masks(1 - IMAGE, {"b": mask(0, 4), "c": mask(4, 6)}))
    assert len(more) == 2 and more[0].names == more[1].names == ("a", "b", "c")
    assert more[1].labels[0].eq(2).all() and more[1].labels[4].eq(3).all()
