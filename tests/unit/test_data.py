"""Large sets: pictures in, labels in the formats of annotation tools out, by their makers' readers where there are."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slime import Segmenter, SegmentSettings, SlimeError, save_embeddings, segment, train
from slime.backbones.load import fingerprint, load_model
from slime.data import command
from slime.data import run as engine_module
from slime.data.annotations import read_annotations
from slime.data.file_names import FileNames, changed_names, folders_of, leads_outside, write_table
from slime.data.formats import FORMATS, Format
from slime.data.formats.label_studio import brush_rle, mask_of_brush
from slime.data.pixels import decode
from slime.data.records import Record
from slime.data.review import least_confident, review_page
from slime.data.run import Engine, segment_images
from slime.data.run_log import RunLog
from slime.data.shapes import coco_rle, mask_of_coco, outlines
from slime.data.sources import SourceImage, source_images, source_names
from slime.files import write_whole
from slime.parts.maps import DenseMaps
from slime.settings import InstantSettings
from testing.browser import CHROMIUM, FLAGS, SHOTS
from testing.toy import ToyUNet, toy_example

ABOUT = {"embeddings": "e", "model": "m"}


def png(pixels: np.ndarray, **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", **options)
    return data.getvalue()


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_every_kind_are_decoded() -> None:
    levels = np.arange(32 * 20 * 3, dtype=np.uint8).reshape(20, 32, 3)
    plain = Image.fromarray(levels)
    assert np.array_equal(decode(png(levels)), levels)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert decode(saved(plain, "PNG", exif=turned)).shape == (32, 20, 3)
    wide = (levels[..., 0].astype(np.uint16) << 8) + levels[..., 0]
    assert np.array_equal(decode(png(wide))[..., 1], levels[..., 0])
    assert np.array_equal(
        decode(saved(Image.fromarray(levels[..., 0] / np.float32(255)), "TIFF"))[..., 2], levels[..., 0]
    )
    cmyk = decode(saved(plain.convert("CMYK"), "JPEG", quality=100))
    assert cmyk.shape == levels.shape and np.abs(cmyk.astype(int) - levels)[..., 0].mean() < 40
    with_alpha = np.dstack([levels, np.zeros((20, 32), np.uint8)])
    assert np.array_equal(decode(png(with_alpha)), levels), "colours under transparency, as Load Image gives them"
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (10, 200)]
    assert decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).max() < 20
    for broken in (b"", b"no picture", png(levels)[:60], saved(plain, "JPEG")[:200]):
        with pytest.raises(SlimeError, match="Pillow cannot read this image"):
            decode(broken)


def test_sources_name_the_same_pictures_in_the_same_order(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    files = {}
    for index in range(5):
        name = f"{'ab'[index % 2]}/{index}.png"
        files[name] = png(np.full((16, 16, 3), index, np.uint8))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[name])
    (tmp_path / "a" / "notes.md").write_text("none", encoding="utf-8")
    names = sorted(files)
    listed, coco = tmp_path / "list.txt", tmp_path / "coco.json"
    listed.write_text("\n".join(names) + "\n\n", encoding="utf-8")
    coco.write_text(json.dumps({"images": [{"file_name": name} for name in names]}), encoding="utf-8")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            archive.addfile(entry, io.BytesIO(files[name]))
    rows = [{"bytes": files[name], "path": name} for name in names]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "set.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [files[name] for name in names]}), tmp_path / "plain.parquet")
    for source in (tmp_path, tmp_path / "[ab]" / "*.png", listed, coco, tmp_path / "set.tar", tmp_path / "set.parquet"):
        found = list(source_images(str(source)))
        assert [one.name for one in found] == names, source
        assert [one.read() for one in found] == [files[name] for name in names]
        assert [one.name for one in source_images(str(source), (1, 2))] == names[1::2]
        assert [one.name for one in source_images(str(source), (0, 2), 2)] == names[0:4:2]
    plain = list(source_images(str(tmp_path / "plain.parquet")))
    assert plain[3].name == "plain_00000003.png" and plain[3].read() == files[names[3]]
    assert [one.name for one in source_images(str(tmp_path / "*.tar"))] == names, "archives by a pattern"
    again = [{"bytes": data, "path": "image.jpg"} for data in files.values()]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"image": again}), tmp_path / folder / "train.parquet")
    many = [one.name for one in source_images(str(tmp_path / "*" / "train.parquet"))]
    assert len(set(many)) == 10 and many[0] == "one/train/image.jpg"
    assert many == list(source_names(str(tmp_path / "*" / "train.parquet"), tmp_path / "out")), "without reading"
    for nothing in ("none", "none/*.png"):
        with pytest.raises(SlimeError, match="There (is nothing|are no images) at"):
            list(source_images(str(tmp_path / nothing)))


# -------------------------------------------------------------------------------------------------------------- shapes


def shapes() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    ring = np.zeros((40, 30), bool)
    ring[5:35, 4:26] = True
    ring[15:20, 10:15] = False
    return [ring, rng.random((17, 23)) > 0.5, np.ones((300, 400), bool), np.zeros((8, 9), bool), np.eye(12, dtype=bool)]


def test_brushes_of_label_studio_are_read() -> None:
    """The code is what label_studio_sdk.converter.brush.encode_rle 2.1.2 gives for the mask."""
    mask = np.zeros((12, 9), bool)
    mask[3:8, 2:7] = True
    mask[4:6, 4] = False
    code = [0, 0, 1, 176, 57, 27, 254, 115, 0, 194, 127, 247, 192, 39, 255, 140, 2, 127, 251, 224, 19, 255, 198, 1, 63]
    code += [253, 240, 12, 39, 255, 124, 3, 9, 255, 233, 112, 0]
    assert np.array_equal(mask_of_brush(code, *mask.shape), mask)


@pytest.mark.parametrize("mask", shapes(), ids=["ring", "noise", "full", "empty", "diagonal"])
def test_brushes_come_back(mask: np.ndarray) -> None:
    code = brush_rle(mask)
    assert np.array_equal(mask_of_brush(code, *mask.shape), mask)
    with pytest.raises(ValueError):
        mask_of_brush(code, mask.shape[0] + 1, mask.shape[1])


@pytest.mark.parametrize("mask", shapes(), ids=["ring", "noise", "full", "empty", "diagonal"])
def test_run_lengths_are_pycocotools(mask: np.ndarray) -> None:
    from pycocotools import mask as coco

    assert coco_rle(mask) == coco.encode(np.asfortranarray(mask))["counts"].decode()
    assert np.array_equal(mask_of_coco(coco_rle(mask), *mask.shape), mask)
    with pytest.raises(ValueError, match="its run lengths do not fit"):
        mask_of_coco(coco_rle(mask), mask.shape[0] + 1, mask.shape[1])


def test_cut_run_lengths_are_refused() -> None:
    """Pycocotools decodes some of them without an error: why our own decoder stays."""
    ring = shapes()[0]
    for end in range(1, len(coco_rle(ring))):
        cut = coco_rle(ring)[:-end]
        with pytest.raises(ValueError, match="its run lengths do not fit"):
            mask_of_coco(cut, *ring.shape)
    with pytest.raises(ValueError, match="do not fit"):
        mask_of_coco("o" * 10_000_000, *ring.shape)  # one endless number


def test_outlines_are_the_masks_and_know_holes() -> None:
    from pycocotools import mask as coco

    ring = shapes()[0]
    ((outer, holes),) = outlines(ring)
    assert len(holes) == 1 and outer.min() >= 4 and outer[:, 1].max() <= 35
    filled = coco.decode(coco.frPyObjects([outer[:-1].ravel().tolist()], *ring.shape))[..., 0].astype(bool)
    whole = ring.copy()
    whole[15:20, 10:15] = True
    assert (filled & whole).sum() / (filled | whole).sum() > 0.99
    assert len(list(outlines(np.eye(12, dtype=bool)))) >= 1 and list(outlines(np.zeros((5, 5), bool))) == []


# ----------------------------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def learned():
    toy = ToyUNet()
    return toy, train(toy, [toy_example(0), toy_example(1)], InstantSettings(views=4))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures of three sizes, and a broken one."""
    place = tmp_path / "pictures"
    (place / "deep").mkdir(parents=True)
    for index in range(5):
        pixels = (toy_example(index).image.numpy() * 255).round().astype(np.uint8)
        pixels = np.asarray(Image.fromarray(pixels).resize([(96, 96), (96, 96), (150, 100)][index % 3]))
        (place / ("deep/" if index == 4 else "") / f"{index}.png").write_bytes(png(pixels))
    (place / "broken.jpg").write_bytes(b"no picture")
    return place


def run(learned, source: Path, out: Path, *names: str, batch: int = 2, **more) -> RunLog:
    backbone, embeddings = learned
    engine = Engine(Segmenter(backbone, embeddings, SegmentSettings(batch_size=batch)))
    log = RunLog(out, ABOUT)
    outputs = [FORMATS[name](out, embeddings, "v1") for name in names]
    segment_images(engine, source_images(str(source)), outputs, log, **more)
    for output in outputs:
        output.finish(log)
    log.close()
    return log


def failures(log: RunLog) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in log.folder.glob("errors*.jsonl"))


def expected(learned, file: Path) -> np.ndarray:
    image = torch.from_numpy(decode(file.read_bytes())).float() / 255
    backbone, embeddings = learned
    return segment(backbone, image[None], embeddings)[0].label_map[0].numpy()


def test_labels_are_those_of_segment_in_every_format(learned, folder, tmp_path) -> None:
    from pycocotools.coco import COCO

    out, names = tmp_path / "out", learned[1].names
    seen: list[int] = []
    log = run(learned, folder, out, *FORMATS, on_done=seen.append)
    assert sum(seen) == 6 and failures(log) == 1
    assert "broken.jpg" in (out / "errors.jsonl").read_text(encoding="utf-8")
    truth = {
        one.name: expected(learned, folder / one.name) for one in source_images(str(folder)) if one.name != "broken.jpg"
    }
    assert any(labels.any() for labels in truth.values())
    for record in log.records():
        assert np.array_equal(record.labels(), truth[record.name])
        assert all(
            0 < part.score <= 1 and part.area == (truth[record.name] == part.label).sum() for part in record.parts
        )
    assert (out / "labels" / "names.txt").read_text(encoding="utf-8").split("\n")[:-1] == list(names)
    coco = COCO(str(out / "annotations.json"))
    assert [kind["name"] for kind in coco.loadCats(coco.getCatIds())] == list(names)
    for image in coco.loadImgs(coco.getImgIds()):
        labels = truth[image["file_name"]]
        stem = Path(image["file_name"]).with_suffix("")
        with Image.open(out / "labels" / f"{stem}.png") as shown:
            assert shown.mode == "P" and np.array_equal(np.asarray(shown), labels)
        for label, name in enumerate(names, start=1):
            with Image.open(out / "masks" / name / f"{stem}.png") as shown:
                assert np.array_equal(np.asarray(shown) == 255, labels == label)
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(out / "parts-00000.parquet").to_pylist()
    assert {row["image"] for row in rows} == set(truth)
    tasks = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
    for task in tasks:
        labels = truth[task["data"]["image"].partition("?d=")[2]]
        found = {one["value"]["brushlabels"][0]: one["value"]["rle"] for one in task["predictions"][0]["result"]}
        for label, name in enumerate(names, start=1):
            mask = mask_of_brush(found[name], *labels.shape) if name in found else np.zeros_like(labels, bool)
            assert np.array_equal(mask, labels == label)
    assert "train: images" in (out / "data.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["coco", "coco-polygons"])
def test_a_coco_file_trains_again(learned, folder, tmp_path, kind: str) -> None:
    """What is written is read back as labelled images; run lengths exactly, polygons nearly."""
    out = tmp_path / "out"
    run(learned, folder, out, kind)
    for file in folder.rglob("*.png"):
        target = out / "images" / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    found = read_annotations(str(out / "annotations.json"))
    assert found.names == learned[1].names and len(found.images) >= 4
    for image in found.images:
        labels, truth = image.labels(), expected(learned, folder / image.name)
        assert np.array_equal(labels, truth) if kind == "coco" else (labels == truth).mean() > 0.97
        assert image.pixels().shape[:2] == labels.shape
    example = found.images[0].example(found.names)
    assert example.names == found.names


def test_supervision_reads_what_is_written(learned, folder, tmp_path) -> None:
    """COCO's run lengths exactly, polygons of COCO and YOLO nearly; supervision draws the outline as well."""
    supervision = pytest.importorskip("supervision")
    (folder / "deep" / "4.png").rename(folder / "4.png")
    (folder / "broken.jpg").unlink()
    for kind in ("coco", "coco-polygons", "yolo"):
        out = tmp_path / kind
        run(learned, folder, out, kind)
        places = {"images_directory_path": str(folder)}
        if kind == "yolo":
            places |= {"annotations_directory_path": str(out / "labels"), "data_yaml_path": str(out / "data.yaml")}
            theirs = supervision.DetectionDataset.from_yolo(**places, force_masks=True)
        else:
            places |= {"annotations_path": str(out / "annotations.json")}
            theirs = supervision.DetectionDataset.from_coco(**places, force_masks=True)
        assert tuple(theirs.classes) == learned[1].names and len(theirs) == 5
        for file in (out / "labels").rglob("*.txt"):
            points = [
                float(value) for line in file.read_text(encoding="utf-8").splitlines() for value in line.split()[1:]
            ]
            assert all(0 <= value <= 1 for value in points)
        for path, _, found in theirs:
            truth = expected(learned, Path(path))
            labels = np.zeros_like(truth)
            for mask, label in zip(found.mask, found.class_id, strict=True):
                labels[mask] = label + 1
            assert (labels == truth).mean() > (0.999 if kind == "coco" else 0.93), kind


def test_a_stopped_run_goes_on(learned, folder, tmp_path, monkeypatch) -> None:
    """Nothing twice, nothing lost, a torn line is taken away, and other embeddings do not mix in."""
    whole = run(learned, folder, tmp_path / "whole", "label-map", "coco")
    out = tmp_path / "out"
    backbone, embeddings = learned
    engine, log = Engine(Segmenter(backbone, embeddings, SegmentSettings(batch_size=1))), RunLog(out, ABOUT)
    found, finds = engine.segment, []
    monkeypatch.setattr(engine_module, "HELD", 0)  # noted at once

    def until_two(loaded):
        if len(finds) == 2:
            raise KeyboardInterrupt
        finds.append(loaded)
        return found(loaded)

    monkeypatch.setattr(engine, "segment", until_two)
    with pytest.raises(KeyboardInterrupt):
        segment_images(engine, source_images(str(folder)), [FORMATS["label-map"](out, embeddings, "v1")], log, 1)
    assert len((out / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    with (out / "records.jsonl").open("a") as book:
        book.write('{"name":"torn","hei')
    again = run(learned, folder, out, "label-map", "coco")
    assert [record.line() for record in sorted(again.records(), key=lambda one: one.name)] == [
        record.line() for record in sorted(whole.records(), key=lambda one: one.name)
    ]
    for file in (tmp_path / "whole" / "labels").rglob("*.png"):
        assert file.read_bytes() == (out / file.relative_to(tmp_path / "whole")).read_bytes()
    assert failures(again) == 1, "the broken picture is noted once"
    with pytest.raises(SlimeError, match="made with other settings: embeddings"):
        RunLog(out, ABOUT | {"embeddings": "other"})


def test_a_picture_the_model_cannot_take_costs_no_other(learned, folder, tmp_path, monkeypatch) -> None:
    backbone, embeddings = learned
    engine = Engine(Segmenter(backbone, embeddings, SegmentSettings(batch_size=4)))
    log = RunLog(tmp_path / "out", ABOUT)
    found = engine.segment

    def find(loaded):
        if any(one.name == "1.png" for one in loaded):
            raise SlimeError("values that are no numbers")
        return found(loaded)

    monkeypatch.setattr(engine, "segment", find)
    segment_images(engine, source_images(str(folder)), [], log)
    assert {record.name for record in log.records()} == {"0.png", "2.png", "3.png", "deep/4.png"}
    assert "no numbers" in (tmp_path / "out" / "errors.jsonl").read_text(encoding="utf-8") and failures(log) == 2


def test_an_actor_loses_only_the_image_that_cannot_be_finished(learned, monkeypatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from slime.data.ray_engine import SegmentActor

    actor = object.__new__(SegmentActor)  # its constructor loads a model
    actor.engine, actor.names = Engine(Segmenter(*learned)), learned[1].names
    find = actor.engine.segment

    def broken() -> None:
        raise SlimeError("out of memory at full size")

    def segment(loaded):
        return [broken if image.name == "b" else done for image, done in zip(loaded, find(loaded), strict=True)]

    monkeypatch.setattr(actor.engine, "segment", segment)
    picture = png(np.zeros((40, 40, 3), np.uint8))
    rows = actor(pyarrow.table({"path": ["a", "b", "c"], "bytes": [picture] * 3})).to_pylist()
    assert {row["path"]: row["error"] or "" for row in rows} == {"a": "", "b": "out of memory at full size", "c": ""}


def test_shares_of_a_set_make_one_result(learned, folder, tmp_path) -> None:
    backbone, embeddings = learned
    for index in range(2):
        log = RunLog(tmp_path / "out", ABOUT, (index, 2))
        engine = Engine(Segmenter(backbone, embeddings, SegmentSettings(batch_size=1)))
        segment_images(engine, source_images(str(folder), (index, 2)), [], log)
        log.close()
    whole = run(learned, folder, tmp_path / "whole")
    assert {r.line() for r in log.records()} == {r.line() for r in whole.records()} and failures(log) == 1


CLASHING = (
    "a.png",
    "a.jpg",
    "A.png",
    "shot.0001",
    "shot.0002",
    "x?y.png",
    "x\\y.png",
    "~con/aux.png",
    "n" * 300 + ".png",
)


def test_each_image_has_a_file_of_its_own(learned, tmp_path) -> None:
    """Names that differ in suffix, case or forbidden characters; one that leads out costs itself alone."""
    backbone, embeddings = learned
    data = png((toy_example(0).image.numpy() * 255).astype(np.uint8))
    names = [*CLASHING, "../b.png", "C:/b.png"]
    source = [SourceImage(name, partial(bytes, data)) for name in names]
    out, file_names = tmp_path / "out", FileNames(names)
    log, engine = RunLog(out, ABOUT), Engine(Segmenter(backbone, embeddings, SegmentSettings(batch_size=1)))
    segment_images(engine, source, [FORMATS["label-map"](out, embeddings, "v1", file_names)], log)
    assert {record.name for record in log.records()} == set(CLASHING) and failures(log) == 2
    assert not (tmp_path / "b.png").exists()
    files = [file.relative_to(out / "labels").as_posix() for file in (out / "labels").rglob("*.png")]
    assert len({file.lower() for file in files}) == len(CLASHING) and "shot.0001.png" in files
    write_table(out, changed_names(CLASHING, file_names, ["wheel", "con", "Wheel"]))
    rows = list(csv.reader((out / "file_names.csv").read_text(encoding="utf-8").splitlines()))
    assert {row[1] for row in rows[1:] if row[0] == "image"} == set(CLASHING) - {"shot.0001", "shot.0002"}
    assert all(f"{row[2]}.png" in files for row in rows[1:] if row[0] == "image")
    assert len({row[2].lower() for row in rows if row[0] == "part"}) == 3


@given(names=st.lists(st.text(min_size=1, max_size=8), max_size=8), long=st.text(max_size=300))
def test_file_names_are_unique_and_safe(names, long) -> None:
    given = [name for name in dict.fromkeys([*names, *(name.swapcase() for name in names), long]) if name]
    files = [FileNames(given)(name) for name in given if not leads_outside(name)]
    assert len({file.casefold() for file in files}) == len(files)
    for file in [*files, *folders_of(given).values()]:
        assert all(0 < len(part.encode()) <= 120 and part.rstrip(". ") == part for part in file.split("/"))
        assert not re.search(r'[<>:"|?*\\#%~\x00-\x1f]', file)
    assert len({folder.casefold() for folder in folders_of(given).values()}) == len(given)


def test_names_of_files_written_before_stay() -> None:
    """A folder that grows, a name that looks like a hashed one, and names of lists beside the labels."""
    first = FileNames(["a.jpg"])
    grown = FileNames(["a.jpg", "a.png"], {"a.jpg": first("a.jpg")})
    assert grown("a.jpg") == "a" and grown("a.png").startswith("a-")
    hashed = FileNames(["a.jpg", "a.png"])("a.jpg")
    names = FileNames(["a.jpg", "a.png", f"{hashed}.png"])
    assert len({names("a.jpg"), names("a.png"), names(f"{hashed}.png")}) == 3
    assert names("x/Names.png") != "x/Names" and FileNames(["a.png/b.jpg"])("a.png/b.jpg") == "a_png/b"


def test_sources_that_name_one_file_twice(tmp_path, caplog) -> None:
    """Lists of whole paths, of paths that go up, and archives whose members have the same names."""
    data = png(np.zeros((16, 16, 3), np.uint8))
    for name in ("x/a.png", "y/a.png", "photo[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    lines = [str(tmp_path / "x" / "a.png"), str(tmp_path / "y" / "a.png"), "..\\y\\a.png", "../y/a.png", "n" * 400]
    (tmp_path / "x" / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    names = [image.name for image in source_images(str(tmp_path / "x" / "list.txt"))]
    assert names[0] == "a.png" and names[1].endswith("y/a.png") and names[2:] == ["n" * 400]
    assert caplog.text.count("is listed twice") == 2
    assert not any(map(leads_outside, names))
    for shard in ("s0", "s1"):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            archive.add(tmp_path / "x" / "a.png", "000.png")
    assert [image.name for image in source_images(str(tmp_path / "s*.tar"))] == ["s0/000.png", "s1/000.png"]
    assert [image.name for image in source_images(str(tmp_path / "photo[1].png"))] == ["photo[1].png"]
    for broken in ("cut.tar", "cut.parquet"):
        (tmp_path / broken).write_bytes(b"<html>")
        with pytest.raises(SlimeError, match="or is cut off"):
            list(source_images(str(tmp_path / broken)))


def test_a_source_that_was_away_is_tried_again(learned, folder, tmp_path) -> None:
    backbone, embeddings = learned
    engine = Engine(Segmenter(backbone, embeddings, SegmentSettings(batch_size=1)))
    log = RunLog(tmp_path / "out", ABOUT)

    def away() -> bytes:
        raise OSError(5, "Input/output error")

    broken = list(source_images(str(folder)))
    segment_images(engine, [image._replace(read=away) if image.name == "0.png" else image for image in broken], [], log)
    assert failures(log) == 2 and "0.png" not in log.done
    log = RunLog(tmp_path / "out", ABOUT)
    segment_images(engine, source_images(str(folder)), [], log)
    assert "0.png" in log.done and failures(log) == 1, "the broken one stays"


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"version": 3}', encoding="utf-8")


def foreign_log(folder: Path) -> None:
    folder.mkdir()
    (folder / "errors.jsonl").write_bytes(b"no line")


def shared_out(folder: Path) -> None:
    RunLog(folder, ABOUT, (0, 2)).close()


def foreign_labels(folder: Path) -> None:
    folder.mkdir()
    (folder / "annotations.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (foreign, "not written by SLiMe"),
        (foreign_log, "SLiMe did not write"),
        (shared_out, "a different number of shards"),
        (foreign_labels, "SLiMe did not write"),
        (Path.touch, "cannot be created"),
    ],
)
def test_what_others_left_is_not_written_over(tmp_path, make, words) -> None:
    make(tmp_path / "out")
    before = [(file, file.stat().st_size) for file in tmp_path.rglob("*")]
    with pytest.raises(SlimeError, match=words):
        RunLog(tmp_path / "out", ABOUT)
    assert [(file, file.stat().st_size) for file in tmp_path.rglob("*")] == before


def test_closeups_are_not_for_large_sets(learned) -> None:
    with pytest.raises(SlimeError, match="not for large sets"):
        Engine(Segmenter(learned[0], learned[1], SegmentSettings(closeups=1)))


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def model(monkeypatch) -> str:
    """The toy in place of a loaded model."""
    monkeypatch.setattr(command, "load_model", lambda *_: ToyUNet())
    monkeypatch.setattr(command, "fingerprint", lambda path: Path(path).name)
    return "toy"


def labelled_folder(place: Path, indexed: bool = False) -> Path:
    place.mkdir()
    for index in range(2):
        example = toy_example(index)
        (place / f"{index}.jpg").write_bytes(
            saved(Image.fromarray((example.image.numpy() * 255).astype(np.uint8)), "JPEG", quality=97)
        )
        labels = example.labels.numpy().astype(np.uint8)
        if indexed:
            (place / f"{index}.png").write_bytes(png(labels))
        else:
            np.save(place / f"{index}.npy", labels)
    (place / "names.txt").write_text("\n".join(toy_example(0).names) + "\n", encoding="utf-8")
    return place


@pytest.mark.parametrize("indexed", [False, True], ids=["npy", "png"])
def test_the_command_from_training_to_evaluation(model, folder, tmp_path, capsys, indexed: bool) -> None:
    labelled, out, file = (
        labelled_folder(tmp_path / "examples", indexed),
        tmp_path / "out",
        tmp_path / "learned.safetensors",
    )
    common = ["--model", model]
    learn = ["train", *common, "--examples", str(labelled), "--output", str(file), "--set", "views=4", "flip=False"]
    assert command.run(learn) == 0
    find = ["segment", *common, "--embeddings", str(file), str(folder), "--output", str(out)]
    more = ["--format", "coco", "label-map", "--order", "uncertain", "--review", "2"]
    assert command.run([*find, *more]) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"] == {"images": 5, "errors": 1} and manifest["made_by"]["model"] == "toy"
    assert manifest["versions"]["torch"]
    order = (out / "order.txt").read_text(encoding="utf-8").split()
    sure = {
        r["name"]: r["confidence"]
        for r in map(json.loads, (out / "records.jsonl").read_text(encoding="utf-8").splitlines())
    }
    assert order == sorted(sure, key=lambda name: (sure[name], name))
    page = (out / "review.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 2 and all(name in page for name in order[:2]) and "data:image/jpeg" in page
    capsys.readouterr()
    assert command.run(["evaluate", *common, "--embeddings", str(file), str(labelled)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 2 and 0.3 < figures["part_miou"] <= 1
    assert command.run(["info", str(file)]) == 0 and toy_example(0).names[0] in capsys.readouterr().out
    assert command.run([*find, "--format", "yolo"]) == 1
    assert "made with other settings: formats" in capsys.readouterr().err


def test_what_coco_says_scores_as_segmenting_does(model, tmp_path, capsys) -> None:
    """IoU of the written COCO file against the truth is that of the model's own label maps."""
    labelled, file = labelled_folder(tmp_path / "examples"), tmp_path / "learned.safetensors"
    toy = ToyUNet()
    save_embeddings(train(toy, [toy_example(0)], InstantSettings(views=4)), file)
    out = tmp_path / "out"
    arguments = ["--model", model, "--embeddings", str(file)]
    assert command.run(["segment", *arguments, str(labelled), "--output", str(out), "--format", "coco"]) == 0
    for image in labelled.glob("*.jpg"):
        (out / image.name).write_bytes(image.read_bytes())
    capsys.readouterr()
    assert command.run(["evaluate", "--labels", str(out / "annotations.json"), str(labelled)]) == 0
    written = json.loads(capsys.readouterr().out)
    assert command.run(["evaluate", *arguments, str(labelled)]) == 0
    assert written == json.loads(capsys.readouterr().out)


def test_a_part_that_was_never_found_counts_as_missed(tmp_path, capsys) -> None:
    """A COCO file names the parts it holds alone; those of the truth count. A part that no truth holds does not."""
    truth, found = tmp_path / "truth", tmp_path / "found"
    for place, labels in ((truth, {1: 8, 2: 8}), (found, {1: 8})):
        place.mkdir()
        (place / "names.txt").write_text("one\ntwo\nthree\n" if place == truth else "one\nfour\n", encoding="utf-8")
        (place / "a.jpg").write_bytes(saved(Image.new("RGB", (32, 32)), "JPEG"))
        drawn = np.zeros((32, 32), np.uint8)
        for label, side in labels.items():
            drawn[10 * label : 10 * label + side] = label
        np.save(place / "a.npy", drawn)
    assert command.run(["evaluate", "--labels", str(found), str(truth)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["iou"] == {"one": 1.0, "two": 0.0, "three": None} and figures["part_miou"] == 0.5


def test_one_bad_image_does_not_end_an_evaluation(tmp_path, capsys) -> None:
    """It is told; images whose labels have another size are, too; with --strict that is an error."""
    for index in range(4):
        pixels = (toy_example(index).image.numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"{index}.npy", toy_example(index).labels.numpy().astype(np.uint8))
    (tmp_path / "names.txt").write_text("red\nblue\n", encoding="utf-8")
    labels = tmp_path / "labels_of_a_model"
    shutil.copytree(tmp_path, labels, ignore=lambda *_: [labels.name])
    (tmp_path / "1.npy").write_bytes(b"nothing")
    np.save(labels / "2.npy", np.ones((8, 8), np.uint8))
    assert command.run(["evaluate", str(tmp_path), "--labels", str(labels)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["images"] == 2 and json.loads(said.out)["miou"] == 1
    assert (
        "Skipped 2: " in said.err and "1.npy" in said.err and "2.png: the labels to evaluate are of 8 x 8" in said.err
    )
    assert command.run(["evaluate", str(tmp_path), "--labels", str(labels), "--strict"]) == 1


def test_a_models_fingerprint_is_of_its_weights(tmp_path) -> None:
    for folder, weight in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / folder / "unet").mkdir(parents=True)
        (tmp_path / folder / "unet" / "model.safetensors").write_bytes(weight)
    a, b, c = (fingerprint(str(tmp_path / folder)) for folder in "abc")
    assert a == c != b and fingerprint(str(tmp_path / "a" / "unet" / "model.safetensors")) not in (a, b)


def test_a_line_that_another_share_is_writing_is_left_out(learned, folder, tmp_path) -> None:
    log = run(learned, folder, tmp_path / "out")
    count = sum(1 for _ in log.records())
    (tmp_path / "out" / "records-00001-of-00002.jsonl").write_text('{"name":"b","hei', encoding="utf-8")
    assert sum(1 for _ in log.records()) == count > 0


def test_checkpoints_are_loaded_by_comfyui(extension, tmp_path) -> None:
    """``--comfyui FOLDER``: the same model as the nodes get."""
    from demo.pack.tiny_config import register
    from testing.inprocess import load_backbone
    from testing.server import MODEL

    register()
    found, known = load_model(str(MODEL), comfyui=os.environ["COMFYUI_DIR"]), load_backbone(MODEL)
    assert type(found) is type(known) and found.info == known.info
    image = toy_example(0).image[None]
    with torch.inference_mode():
        assert torch.equal(found.encode_images(image), known.encode_images(image))
    with pytest.raises(SlimeError, match="not ComfyUI's folder"):
        load_model(str(MODEL), comfyui=str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "said"), [("none", "no model at"), ("empty", "neither|has neither"), ("broken", "cannot be read")]
)
def test_what_is_no_model_is_told(tmp_path, kind: str, said: str) -> None:
    place = tmp_path / "model"
    if kind == "empty":
        place.mkdir()
    if kind == "broken":
        place = tmp_path / "model.safetensors"
        place.write_bytes(b"no checkpoint")
    with pytest.raises(SlimeError, match=said):
        load_model(str(place), "cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "none.safetensors"], "There is no file"),
        (["evaluate", "none"], "Give --labels"),
        (["train", "--model", "none", "--examples", "none", "--output", "x"], "There is nothing at none"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], said: str, capsys) -> None:
    assert command.run(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith("slime: ") and said in told and "Traceback" not in told


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; set CHROMIUM to its path")
def test_the_review_page_shows_its_pictures_in_a_browser(learned, folder, tmp_path) -> None:
    """Opened as a file, without a server: every picture is there, nothing is wider than the window."""
    from playwright.sync_api import sync_playwright

    backbone, embeddings = learned
    log = run(learned, folder, tmp_path / "out")
    least = least_confident(log.records(), 4)
    pixels = {one.name: decode(one.read()) for one in source_images(str(folder)) if one.name != "broken.jpg"}
    page_file = tmp_path / "review.html"
    page_file.write_text(review_page(least, pixels.__getitem__, embeddings.names, embeddings.palette), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.goto(page_file.as_uri())
        widths = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
        assert len(widths) == 4 and all(widths)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        captions = page.locator("figcaption").all_inner_texts()
        assert [text.split("\n")[0] for text in captions] == [record.name for record in least]
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "review.png")
        browser.close()


# --------------------------------------------------------------------------------------------------------------- nodes


@pytest.fixture
def nodes(extension, tmp_path, monkeypatch):
    """The two nodes, with folders of their own."""
    import folder_paths
    from comfy_api.latest import io as comfy_io
    from slime_extension.nodes import common, labels

    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    monkeypatch.setattr(labels, "examples_result", lambda cls, examples: comfy_io.NodeOutput(examples))
    return labels.SLiMeExportLabels, labels.SLiMeLoadAnnotations, common.Parts


@pytest.mark.parametrize("kind", ["coco", "label-map", "masks", "label-studio", "coco-polygons", "yolo"])
def test_nodes_export_and_load_labels(nodes, learned, tmp_path, kind: str) -> None:
    export, load, made = nodes
    images = torch.stack([toy_example(index).image for index in range(3)])
    maps = segment(learned[0], images, learned[1])[0]
    place = Path(export.execute(made(maps, images), kind, "set", "a.jpg\nb.jpg\nc.jpg").args[0])
    assert place == tmp_path / "output" / "set" and sorted(f.name for f in (place / "images").iterdir()) == [
        "a.png",
        "b.png",
        "c.png",
    ]
    before = (place / "records.jsonl").read_text(encoding="utf-8")
    again = segment(learned[0], images[:1], learned[1])[0]
    export.execute(made(again, images[:1]), kind, "set", "a.jpg")
    assert (place / "records.jsonl").read_text(encoding="utf-8") == before, "what is there stays"
    export.execute(made(again, images[:1]), kind, "set")
    export.execute(made(again, images[:1]), kind, "set")
    assert len((place / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 4, "named by its pixels, once"
    file = {"coco": "set/annotations.json", "coco-polygons": "set/annotations.json", "label-studio": "set/tasks.json"}
    examples = load.execute(file.get(kind, "set"), "", 4).args[0]
    assert len(examples) == 3 and set(examples[0].names) <= set(learned[1].names)
    if kind not in ("coco-polygons", "yolo"):
        assert any(torch.equal(example.labels > 0, maps.label_map[0] > 0) for example in examples)
    one = load.execute(file.get(kind, "set"), learned[1].names[0], 1).args[0]
    assert one[0].names == learned[1].names[:1]
    with pytest.raises(SlimeError, match="SLiMe Export Labels: .*made with other settings: formats"):
        export.execute(made(maps, images), "masks" if kind != "masks" else "coco", "set")


class Areas(Format):
    """A toy format: one text file per image with the area of each part."""

    def write(self, record: Record, labels: np.ndarray) -> None:
        text = "".join(f"{name} {(labels == label).sum()}\n" for label, name in enumerate(self.names, start=1))
        write_whole(self.place("areas", record.name, ".txt"), text.encode())


def test_an_export_format_is_one_class_and_one_line(nodes, learned, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(FORMATS, "areas", Areas)
    export, _, made = nodes
    images = toy_example(0).image[None]
    maps = segment(learned[0], images, learned[1])[0]
    export.execute(made(maps, images), "areas", "set", "a.jpg")
    text = (tmp_path / "output" / "set" / "areas" / "a.txt").read_text(encoding="utf-8")
    assert text.splitlines() == [f"{n} {(maps.label_map == i).sum()}" for i, n in enumerate(maps.names, start=1)]


def test_nodes_stay_in_their_folders_and_count_names(nodes, learned, tmp_path, monkeypatch) -> None:
    from slime_extension.nodes import labels

    export, load, made = nodes
    images = toy_example(0).image[None]
    maps = segment(learned[0], images, learned[1])[0]
    for folder in ("", "..", "../other", "/tmp/other", "."):
        with pytest.raises(SlimeError, match="not a folder inside"):
            export.execute(made(maps, images), "coco", folder)
    with pytest.raises(SlimeError, match="2 names for 1 images"):
        export.execute(made(maps, images), "coco", "set", "a\nb")
    with pytest.raises(SlimeError, match="outside"):
        export.execute(made(maps, images), "coco", "set", "../../a")
    with pytest.raises(SlimeError, match=r"has a\.png twice"):
        both = torch.cat([images, images])
        export.execute(made(segment(learned[0], both, learned[1])[0], both), "coco", "set", "a.jpg\na.png")
    text = [
        export.execute(made(maps, images), "masks", "odd", name).ui.as_dict()["text"][0] for name in ("A?", "a_", "A?")
    ]
    assert "1 under another name" in text[0] and "already" in text[2] and "2 in all" in text[2]
    assert len(list((tmp_path / "output" / "odd" / "images").iterdir())) == 2

    def full(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(labels, "write_whole", full)
        with pytest.raises(SlimeError, match="SLiMe Export Labels: .*cannot be written .Permission denied"):
            export.execute(made(maps, images), "coco", "held", "b")
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    for path in ("../secret.json", str(tmp_path / "secret.json"), "none.json"):
        with pytest.raises(SlimeError, match="There is no"):
            load.execute(path, "", 1)
    held = replace(maps, source=DenseMaps(maps.probabilities))
    export.execute(made(held, images), "coco", "held", "a")
    assert (tmp_path / "output" / "held" / "annotations.json").is_file(), "parts that are held at full size"
