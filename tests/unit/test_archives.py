"""The paper's data sets, from small archives of the same structure, and its tables."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import archives, methods, paper
from benchmarks.rows import read_rows
from slime import SlimeError
from testing import scenes
from testing.models import small_encoder
from testing.toy import ToyUNet


def pascal_archive(root):
    """PASCAL-Part's structure: one MATLAB file an image, with objects that have masks and parts."""
    from scipy.io import savemat

    voc = root / "VOCdevkit" / "VOC2010"
    for folder in ("JPEGImages", "Annotations_Part", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    names = [f"2008_{n:06d}" for n in range(8)]
    (voc / "ImageSets" / "Main" / "val.txt").write_text("\n".join(names[5:]) + "\n", encoding="utf-8")
    for number, name in enumerate(names):
        Image.new("RGB", (160, 120), (number * 20, 90, 40)).save(voc / "JPEGImages" / f"{name}.jpg")

        def mask(y, x, height, width):
            found = np.zeros((120, 160), np.uint8)
            found[y : y + height, x : x + width] = 1
            return found

        parts = [
            ("leftside", mask(20, 10, 60, 100)),
            ("wheel_1", mask(60, 20, 20, 20)),
            ("window_2", mask(25, 40, 20, 30)),
        ]
        kind = np.dtype([("part_name", object), ("mask", object)])
        made = np.array([parts], dtype=kind)
        objects = np.zeros(
            (1, 2), dtype=[("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
        )
        objects[0, 0] = ("car", 7, mask(20, 10, 60, 100), made)
        objects[0, 1] = ("person", 15, mask(0, 0, 9, 9), np.zeros((0, 0)))
        savemat(voc / "Annotations_Part" / f"{name}.mat", {"anno": {"imname": name, "objects": objects}})
    return root


def celeba_archive(root):
    """CelebAMask-HQ's structure: one picture an annotated part, in folders of 2,000 faces."""
    (root / "CelebA-HQ-img").mkdir(parents=True)
    (root / "CelebAMask-HQ-mask-anno" / "0").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (1024, 1024), (200, 150, 120)).save(root / "CelebA-HQ-img" / f"{number}.jpg")
        for part, box in (("skin", (100, 100, 400, 450)), ("l_eye", (150, 200, 200, 230)), ("hat", (0, 0, 512, 60))):
            mask = Image.new("RGB", (512, 512))
            mask.paste((255, 255, 255), box)
            mask.save(root / "CelebAMask-HQ-mask-anno" / "0" / f"{number:05d}_{part}.png")
    return root


def test_the_papers_archives_become_the_official_layout(tmp_path) -> None:
    data = tmp_path / "data"
    assert archives.prepare(pascal_archive(tmp_path / "voc"), data, ["car", "celeba"]) == {"car": 3}
    assert archives.prepare(celeba_archive(tmp_path / "faces"), data, ["car", "celeba"]) == {"celeba": 3}
    labels = np.load(data / "car" / "test" / "2008_000005_0.npy")
    assert labels.shape == (60, 100) and Image.open(data / "car" / "test" / "2008_000005_0.png").size == (100, 60)
    names = scenes.PARTS["car"]
    assert [names[labels[y, x] - 1] for y, x in ((2, 2), (50, 15), (10, 40))] == ["body", "wheel", "window"]
    face = np.load(data / "celeba" / "test" / "00003.npy")
    assert face.shape == (512, 512) and face[0, 0] == 0  # hats are no part of the paper's
    assert [scenes.PARTS["face"][face[y, x] - 1] for y, x in ((210, 160), (300, 300))] == ["eye", "skin"]
    with pytest.raises(SlimeError, match="neither PASCAL-Part"):
        archives.prepare(tmp_path / "data", tmp_path / "other", ["car"])


def test_the_papers_tables(tmp_path, monkeypatch, capsys) -> None:
    """From archives to a page, with a method that needs no model."""
    page = tmp_path / "report.md"
    line = [
        "--checkpoint",
        "none.safetensors",
        "--data",
        str(tmp_path / "data"),
        "--methods",
        "mean mask",
        "--shots",
        "1",
    ]
    line += ["--archives", str(pascal_archive(tmp_path / "voc")), "--json", str(tmp_path / "a.json"), "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["paper", *line, "--report", str(page)])
    paper.main()
    text = page.read_text(encoding="utf-8")
    assert "| mean mask | 100.0 +- 0.0 |" in text and "| SLiMe, published | 61.6 |" in text
    assert "Left open" in text and "| SLiMe, published | 75.7 | 79.6 |" in text
    assert len(read_rows(tmp_path / "a.json")) == 2
    monkeypatch.setattr(paper, "measure", None)  # nothing is measured again
    paper.main()
    assert "100.0" in capsys.readouterr().out


@pytest.mark.long
def test_the_papers_tables_with_an_encoder(tmp_path, monkeypatch, capsys) -> None:
    """Rows of an encoder, alone and beside the model, with stand-ins for both files; a flow model has no paper."""
    encoder = small_encoder()
    monkeypatch.setattr(methods, "encoder", lambda file: encoder)
    monkeypatch.setattr(methods, "trained", lambda checkpoint: ToyUNet())
    monkeypatch.setattr(methods, "load_encoder", lambda file, cell: small_encoder(cell))
    monkeypatch.setattr(paper, "trained", lambda checkpoint: encoder)
    line = ["--checkpoint", "x", "--clip-vision", "y", "--data", str(tmp_path), "--shots", "1", "--seeds", "1"]
    for split, seed in (("train_1", 1), ("val", 2), ("test", 3)):
        scene = scenes.render("car", seed)
        (tmp_path / "car" / split).mkdir(parents=True)
        Image.fromarray(scene.image).save(tmp_path / "car" / split / "1.png")
        np.save(tmp_path / "car" / split / "1.npy", scene.labels)
    monkeypatch.setattr(sys, "argv", ["paper", *line])
    paper.main()
    told = capsys.readouterr().out
    for method in ("default", "encoder", "default beside encoder", "feature neighbours"):
        assert f"\n| {method} | " in told, method
    assert "\n| paper | " not in told
