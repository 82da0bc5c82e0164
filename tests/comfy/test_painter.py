"""SLiMe Part Painter: what the canvas saves becomes examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slime.errors import SlimeError
from slime.parts.palette import PALETTE
from slime.parts.runs import encode_runs


@pytest.fixture
def painter(extension, tmp_path, monkeypatch):
    import folder_paths
    import slime_extension.nodes.painter as module

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return module


def painting(labels: np.ndarray, names=("wheel", "window"), image=None) -> str:
    parts = [{"name": name, "color": f"#{index + 1:02x}8040"} for index, name in enumerate(names)]
    height, width = labels.shape
    return json.dumps(
        {"version": 1, "image": image, "parts": parts, "width": width, "height": height, "runs": encode_runs(labels)}
    )


@pytest.fixture
def labels():
    labels = np.zeros((40, 60), int)
    labels[5:15, 10:30], labels[20:35, 30:50] = 1, 2
    return labels


def test_runs_are_read_as_written(painter, labels) -> None:
    assert np.array_equal(painter.decode_runs(encode_runs(labels), 60, 40), labels)
    for broken, width in ((encode_runs(labels), 61), (encode_runs(labels)[:8], 60), ("????", 60)):
        with pytest.raises(ValueError):
            painter.decode_runs(broken, width, 40)


def test_a_connected_image_is_painted_on(painter, labels) -> None:
    image = torch.rand(1, 80, 120, 3)
    examples, pixels, picture = painter.SLiMePartPainter.execute(painting(labels), image).result
    assert examples[0].names == ("wheel", "window") and torch.equal(pixels, image)
    assert torch.equal(examples[0].labels[::2, ::2], torch.from_numpy(labels))
    exact = (picture[0, 20, 40] * 255).round().int().tolist()
    assert exact == [1, 128, 64] and picture[0, 0, 0].sum() == 0


def test_an_image_of_the_input_folder_is_read_and_watched(painter, labels, tmp_path) -> None:
    (tmp_path / "slime").mkdir()
    path = tmp_path / "slime" / "car.png"
    Image.fromarray(np.full((80, 120, 3), 51, np.uint8)).save(path)
    text = painting(labels, image={"name": "car.png", "subfolder": "slime", "type": "input"})
    node = painter.SLiMePartPainter
    _, pixels, _ = node.execute(text).result
    assert pixels.shape == (1, 80, 120, 3) and abs(float(pixels.mean()) - 0.2) < 1e-6
    before = node.fingerprint_inputs(text)
    assert before == node.fingerprint_inputs(text)
    import os

    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(text) != before
    path.unlink()
    with pytest.raises(SlimeError, match=r"SLiMe Part Painter: The image slime/car.png \[input\] no longer exists"):
        node.execute(text)


def test_files_of_any_kind_are_read_or_refused(painter, labels, tmp_path) -> None:
    ramp = np.linspace(0, 65535, 40 * 60).reshape(40, 60)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    whole = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole.replace(b"IDAT", b"I?AT"))

    def paint(name: str) -> torch.Tensor:
        file = {"name": name, "subfolder": "", "type": "input"}
        return painter.SLiMePartPainter.execute(painting(labels, image=file)).args[1]

    assert torch.allclose(paint("deep.png")[0, ..., 0], torch.from_numpy(ramp / 65535).float(), atol=0.01)
    with pytest.raises(SlimeError, match="cannot be read as an image"):
        paint("broken.png")
    with pytest.raises(SlimeError, match="no longer exists"):
        paint("x" * 300 + ".png")


def test_nothing_painted_shows_the_image_and_blocks_what_follows(painter) -> None:
    for text in ("", painting(np.zeros((4, 4), int))):
        output = painter.SLiMePartPainter.execute(text, torch.rand(1, 32, 32, 3))
        assert "nothing is painted" in output.block_execution
        assert output.ui["slime_message"] == [output.block_execution], "the painter says it at every run"
        assert output.ui["slime_image"][0]["filename"].endswith(".png")
    with pytest.raises(SlimeError, match="There is no image"):
        painter.SLiMePartPainter.execute("")


def test_parts_that_are_not_painted_are_left_out(painter, labels) -> None:
    image = torch.rand(1, 40, 60, 3)
    text = painting(np.where(labels == 1, 0, labels), ("wheel", "window"))
    examples = painter.SLiMePartPainter.execute(text, image).result[0]
    assert examples[0].names == ("window",) and int(examples[0].labels.max()) == 1


def test_paintings_chain(painter, labels) -> None:
    image = torch.rand(1, 40, 60, 3)
    first = painter.SLiMePartPainter.execute(painting(labels), image).result[0]
    more = painter.SLiMePartPainter.execute(painting(labels, ("door", "roof")), torch.rand(1, 40, 60, 3), first)
    assert len(more.result[0]) == 2 and more.result[0][0].names == ("wheel", "window", "door", "roof")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 1, "image": 3, "parts": [], "runs": ""}', '"x"']
)
def test_a_damaged_painting_says_so(painter, text) -> None:
    with pytest.raises(SlimeError, match="cannot be read"):
        painter.Painting.parse(text)


def test_a_newer_painting_says_so(painter) -> None:
    with pytest.raises(SlimeError, match="newer version"):
        painter.Painting.parse('{"version": 2}')


def test_the_canvas_has_the_palette_of_the_embeddings() -> None:
    script = Path(__file__).resolve().parents[2] / "web" / "painter" / "painting.js"
    colors = re.findall(r'"#([0-9a-f]{6})"', script.read_text(encoding="utf-8").split("COLORS = ")[1].split("]")[0])
    assert [tuple(bytes.fromhex(color)) for color in colors] == list(PALETTE[: len(colors)]) and len(colors) == 12
