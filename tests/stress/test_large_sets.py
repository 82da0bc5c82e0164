"""Large sets as users run them: processes that are killed, a thousand pictures, Ray. Slow: ``dev.py test -m slow``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slime import save_embeddings, train
from slime.backbones.load import load_model
from slime.data.annotations import read_annotations
from slime.settings import InstantSettings
from testing import scenes, splits

pytestmark = pytest.mark.slow
PARTS = scenes.PARTS["horse"]
SIDE = 112
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, Path]:
    """A small random DINOv2 in a folder, and what it learned of horses."""
    from transformers import Dinov2Config, Dinov2Model

    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(image_size=126, patch_size=14, **config)).save_pretrained(place / "dino")
    settings = InstantSettings(views=8, read_layers="block.1", propagate_layers="block.1")
    embeddings = train(load_model(str(place / "dino"), "cpu"), [splits.example("horse", splits.EXAMPLES)], settings)
    save_embeddings(embeddings, place / "horse.safetensors")
    return str(place / "dino"), place / "horse.safetensors"


def rendered(place: Path, count: int) -> Path:
    place.mkdir(parents=True)
    for index in range(count):
        scene = scenes.render("horse", splits.TEST + index, size=SIDE)
        Image.fromarray(scene.image).save(place / f"{index:05d}.png")
        np.save(place / f"{index:05d}.npy", scene.labels)
    (place / "names.txt").write_text("\n".join(PARTS) + "\n", encoding="utf-8")
    return place


def arguments(trained: tuple[str, Path], source: Path, out: Path, *more: str) -> list[str]:
    model, file = trained
    common = ["--model", model, "--device", "cpu", "--embeddings", str(file), str(source), "--output", str(out)]
    return [sys.executable, "-m", "slime", "segment", *common, *more]


def slime(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def said(*command: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-m", "slime", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def records(out: Path) -> dict[str, str]:
    lines = [
        (json.loads(line)["name"], line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert max(Counter(name for name, _ in lines).values()) == 1, "nothing twice"
    return dict(lines)


def annotated(out: Path) -> dict[str, list[tuple[int, str]]]:
    """What the COCO file says of every picture, whatever its number there."""
    body = json.loads((out / "annotations.json").read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in body["images"]}
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in names.values()}
    for one in body["annotations"]:
        found[names[one["image_id"]]].append((one["category_id"], one["segmentation"]["counts"]))
    return found


def test_a_thousand_pictures_become_the_coco_file_that_segment_says(trained, tmp_path) -> None:
    source, out = rendered(tmp_path / "set", 1000), tmp_path / "out"
    slime(arguments(trained, source, out, "--format", "coco"))
    found = read_annotations(str(out / "annotations.json"))
    assert (
        found.names == PARTS
        and len(json.loads((out / "annotations.json").read_text(encoding="utf-8"))["images"]) == 1000
    )
    (out / "images").symlink_to(source)
    written = said("evaluate", "--labels", str(out / "annotations.json"), str(source))
    model, file = trained
    direct = said("evaluate", "--model", model, "--device", "cpu", "--embeddings", str(file), str(source))
    assert written == direct and written["images"] == 1000


def test_the_lines_of_the_readme_are_true(trained, tmp_path) -> None:
    """As written there, with another model and a horse's parts."""
    rendered(tmp_path / "labelled", 2)
    rendered(tmp_path / "photos", 3)
    lines = [
        line.strip()
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("    slime ")
    ]
    assert [line.split()[1] for line in lines] == ["train", "segment"]
    for line in lines:
        words = [{"sd15.safetensors": trained[0]}.get(word, word) for word in line.split()[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "slime", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    found = read_annotations(str(tmp_path / "labels" / "annotations.json"))
    assert set(found.names) <= set(PARTS) and len(found.images) == 3


@pytest.mark.parametrize("count", [24, 96, 240])
def test_kills_at_random_moments_lose_and_double_nothing(trained, tmp_path, count) -> None:
    source = rendered(tmp_path / "set", count)
    slime(arguments(trained, source, tmp_path / "whole", "--format", "coco", "label-map"))
    command, out, killed = (
        arguments(trained, source, tmp_path / "out", "--format", "coco", "label-map"),
        tmp_path / "out",
        0,
    )
    draw = random.Random(0)
    while killed < 5:
        before = len(records(out)) if (out / "records.jsonl").is_file() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            book = out / "records.jsonl"
            if book.is_file() and book.read_bytes().count(b"\n") > before:
                break
            time.sleep(0.02)
        time.sleep(draw.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed >= (1 if count < 100 else 5)
    slime(command)
    assert records(out) == records(tmp_path / "whole")
    assert annotated(out) == annotated(tmp_path / "whole")
    for file in (tmp_path / "whole" / "labels").rglob("*.png"):
        assert file.read_bytes() == (out / file.relative_to(tmp_path / "whole")).read_bytes()


# ----------------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A set with a broken picture, and what a single process finds in it."""
    place = tmp_path_factory.mktemp("ray")
    source = rendered(place / "set", 96)
    (source / "broken.png").write_bytes((source / "00000.png").read_bytes()[:200])
    slime(arguments(trained, source, place / "single", "--format", "parquet"))
    found = {name: json.loads(line) for name, line in records(place / "single").items()}
    return source, {name: [part["counts"] for part in one["parts"]] for name, one in found.items()}


def found_by_ray(out: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert max(Counter(row["path"] for row in rows).values()) == 1, "nothing twice"
    good = {Path(row["path"]).name: [part["counts"] for part in row["parts"]] for row in rows if not row["error"]}
    return good, {Path(row["path"]).name: row["error"] for row in rows if row["error"]}


RAY = ("--ray", "--actors", "2", "--format", "parquet")


@pytest.fixture
def ray():
    pytest.importorskip("ray")
    yield
    subprocess.run([str(Path(sys.executable).parent / "ray"), "stop", "--force"], capture_output=True, check=False)


def test_ray_finds_what_a_single_process_does(ray, trained, whole, tmp_path) -> None:
    source, expected = whole
    slime(arguments(trained, source, tmp_path / "out", *RAY))
    good, errors = found_by_ray(tmp_path / "out")
    assert good == expected and list(errors) == ["broken.png"]


def test_an_actor_that_is_killed_costs_nothing(ray, trained, whole, tmp_path) -> None:
    source, expected = whole
    process = subprocess.Popen(arguments(trained, source, tmp_path / "out", *RAY), stderr=subprocess.PIPE)
    actors = wait_for(process, finders)
    os.kill(actors[0], signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    good, _ = found_by_ray(tmp_path / "out")
    assert good == expected


def test_a_driver_that_is_killed_is_gone_on_from(ray, trained, whole, tmp_path) -> None:
    source, expected = whole
    process = subprocess.Popen(arguments(trained, source, tmp_path / "out", *RAY), stderr=subprocess.DEVNULL)
    wait_for(process, lambda: list((tmp_path / "out" / ".checkpoint").glob("*.parquet")))
    process.kill()
    process.wait()
    subprocess.run([str(Path(sys.executable).parent / "ray"), "stop", "--force"], capture_output=True, check=False)
    slime(arguments(trained, source, tmp_path / "out", *RAY))
    good, _ = found_by_ray(tmp_path / "out")
    assert good == expected


def finders() -> list[int]:
    """Processes of actors that have a model."""
    import psutil  # type: ignore[import-untyped]

    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::") and "SegmentActor" in line:
            found.append(process.pid)
    return found


def wait_for(process: subprocess.Popen, what):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("the run ended before, or never got there")
