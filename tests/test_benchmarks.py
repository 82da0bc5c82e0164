"""The benchmark's data sources and its determinism."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import grid_ceiling
from benchmarks.sources import folder_task, read_folder, scene_task
from demo import scenes
from slime.errors import SlimeError
from slime.metrics import evaluate


@pytest.fixture
def official(tmp_path):
    """A tiny fixture in the official layout."""
    for split, count in (("train_1", 1), ("train_10", 3), ("val", 1), ("test", 2)):
        folder = tmp_path / "car" / split
        folder.mkdir(parents=True)
        for index in range(count):
            scene = scenes.render("car", 42 + index)
            Image.fromarray(scene.image).save(folder / f"{index}.png")
            np.save(folder / f"{index}.npy", scene.labels)
    return tmp_path


def test_official_layout_is_read(official) -> None:
    task = folder_task(official, "car", 1, seed=0, split="test")
    assert task.names == scenes.PARTS["car"] and len(task.examples) == 1 and len(task.truths) == 2
    assert task.images.shape == (2, 512, 512, 3) and task.truths[0].shape == (512, 512)
    assert np.array_equal(task.truths[0][::2, ::2], scenes.render("car", 42).labels)
    several = [folder_task(official, "car", 2, seed, "validation") for seed in (0, 0, 1)]
    assert [e.labels.sum() for e in several[0].examples] == [e.labels.sum() for e in several[1].examples]


def test_broken_layout_says_what_is_missing(official) -> None:
    with pytest.raises(SlimeError, match="3 labelled images; 5 are asked for"):
        folder_task(official, "car", 5, 0, "test")
    (official / "car" / "test" / "1.npy").unlink()
    with pytest.raises(SlimeError, match="1.png has no label map 1.npy"):
        read_folder(official / "car" / "test")
    with pytest.raises(SlimeError, match="no PNG images"):
        read_folder(official)


def test_tasks_are_seeded_and_the_ceiling_is_high() -> None:
    first, second = (scene_task("horse", 2, 1, 3, "test", "plain") for _ in range(2))
    assert np.array_equal(first.images, second.images)
    assert all((a.image == b.image).all() for a, b in zip(first.examples, second.examples, strict=True))
    assert evaluate(grid_ceiling(first, 0), first.truths, 5).part_miou > 0.75
