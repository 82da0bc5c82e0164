"""The benchmark's data sources and its determinism."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import CEILING, grid_ceiling, measure, summarise
from benchmarks.methods import Variant, make_methods
from benchmarks.sources import OTHER, folder_task, read_folder, scene_task
from demo import scenes
from demo.server import MODEL
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
    assert task.names == scenes.PARTS["car"] and len(task.examples) == 1
    test = task.tests["plain"]
    assert test.images.shape == (2, 512, 512, 3) and len(test.truths) == 2 and test.truths[0].shape == (512, 512)
    assert np.array_equal(test.truths[0][::2, ::2], scenes.render("car", 42).labels)
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
    first, second = (scene_task("horse", 2, 1, 3, "test", ["plain", "small", OTHER]) for _ in range(2))
    assert np.array_equal(first.tests["plain"].images, second.tests["plain"].images)
    assert all((a.image == b.image).all() for a, b in zip(first.examples, second.examples, strict=True))
    plain = first.tests["plain"]
    assert evaluate(grid_ceiling(plain, 5), plain.truths, 5).part_miou > 0.75
    assert len(first.tests["small"].images) == 1 and not first.tests[OTHER].truths[0].any()


def test_rows_hold_what_the_tables_need(capsys) -> None:
    task = scene_task("horse", 1, 0, 2, "validation", ["plain", "small", OTHER])
    learn = make_methods(MODEL, Variant("instant"))["colour neighbours"]
    assert [row["set"] for row in measure(task, "colour neighbours", learn, 1, 0)[0]] == ["plain"]
    rows, shown = measure(task, "default", learn, 1, 0)
    assert [row["set"] for row in rows] == ["plain", "small", OTHER] and len(shown) == 1
    assert 0 <= rows[0]["part_miou"] <= 1 and rows[2]["part_miou"] is None and 0 <= rows[2]["false_area"] <= 1
    json.dumps(rows)
    summarise(rows)
    assert "| default |" in capsys.readouterr().out
    assert measure(task, CEILING, None, 1, 0)[0][0]["part_miou"] > 0.7
