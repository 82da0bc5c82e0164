"""Annotations as other tools write them: what can be read is read, what cannot is named, nothing else is raised."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slime import SlimeError
from slime.data.annotations import read_annotations, read_examples
from slime.data.formats import AnnotatedSet
from slime.data.formats.label_studio import brush_rle, mask_of_brush
from slime.data.shapes import coco_rle, fill_polygons

SQUARE = [[4, 6, 14, 6, 14, 14, 4, 14]]
WIDTH, HEIGHT = 48, 40
LABELS = np.zeros((HEIGHT, WIDTH), np.uint8)
LABELS[5:20, 5:20], LABELS[25:35, 25:40] = 1, 2


def put_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **saving: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **saving)
    return path


def coco(*annotations: dict[str, Any], file: Any = "a.png", categories: Any = None, **image: Any) -> dict[str, Any]:
    """Return a COCO body with one image; an annotation is of category 1 if it says nothing else."""
    known = [{"id": 1, "name": "wheel"}, {"id": 2, "name": "window"}] if categories is None else categories
    usual = {"image_id": 7, "category_id": 1, "bbox": [4, 6, 10, 8], "area": 80, "iscrowd": 0}
    return {
        "images": [{"id": 7, "file_name": file, "width": WIDTH, "height": HEIGHT} | image],
        "categories": known,
        "annotations": [{"id": index} | usual | annotation for index, annotation in enumerate(annotations)],
    }


def write(folder: Path, body: Any, encode: Callable[[str], bytes] = str.encode) -> str:
    put_image(folder / "a.png")
    (folder / "file.json").write_bytes(encode(json.dumps(body)))
    return str(folder / "file.json")


def labels_of(annotated: AnnotatedSet, index: int = 0) -> np.ndarray:
    annotated.images[index].example(annotated.names)
    return annotated.images[index].labels()


GOOD = {"segmentation": SQUARE, "category_id": 2}
BESIDE_GOOD = {
    "a box alone": {"segmentation": []},
    "no segmentation": {},
    "two points": {"segmentation": [[4, 6, 30, 20]]},
    "an unknown form": {"segmentation": 3},
    "numbers as words": {"segmentation": [["a"] * 6]},
    "not finite": {"segmentation": [[float("nan")] * 6]},
    "an image that is not listed": {"segmentation": SQUARE, "image_id": 99},
    "a category that is not listed": {"segmentation": SQUARE, "category_id": 99},
    "run lengths of another size": {"segmentation": {"counts": [0, 100, 1100], "size": [30, 40]}},
    "run lengths that do not fit": {"segmentation": {"counts": [0, 100], "size": [HEIGHT, WIDTH]}},
    "run lengths that are cut": {
        "segmentation": {"counts": coco_rle(LABELS > 0)[:-3], "size": [HEIGHT, WIDTH]}
    },
}  # fmt: skip


@pytest.mark.parametrize("bad", BESIDE_GOOD.values(), ids=BESIDE_GOOD)
def test_a_bad_annotation_is_named_and_the_good_one_is_read(tmp_path, bad) -> None:
    annotated = read_annotations(write(tmp_path, coco(bad, GOOD)))
    label_map = annotated.images[0].labels()
    assert (label_map == annotated.names.index("window") + 1).sum() == 80 == (label_map > 0).sum()
    assert len(annotated.skipped) == 1 and "annotation 0: " in annotated.skipped[0]


FORMS = {
    "a flat polygon": {"segmentation": SQUARE[0]},
    "a piece of two points beside a polygon": {"segmentation": [[4, 6, 30, 20], SQUARE[0]]},
    "the image's id as text": {"segmentation": SQUARE, "image_id": "7"},
    "the image's id as a float": {"segmentation": SQUARE, "image_id": 7.0},
    "compressed run lengths": {"segmentation": {"counts": coco_rle(LABELS == 1), "size": [HEIGHT, WIDTH]}},
    "run lengths": {"segmentation": {"counts": [40 * 10, 40 * 2, 40 * 36], "size": [HEIGHT, WIDTH]}},
}


@pytest.mark.parametrize("annotation", FORMS.values(), ids=FORMS)
def test_forms_of_segmentations(tmp_path, annotation) -> None:
    annotated = read_annotations(write(tmp_path, coco(annotation)))
    assert (labels_of(annotated) == 1).sum() in (80, 225) and not annotated.skipped


ADDRESSES = [
    "..\\..\\media\\upload\\4\\a.png",
    "sub/deep/a.png",
    "A.PNG",
    "a.png?t=1",
    "1a2b3c4d-a.png",
    "C:\\x\\a.png",
]


@pytest.mark.parametrize("file", ADDRESSES)
def test_an_image_is_found_under_the_names_that_tools_write(tmp_path, file) -> None:
    assert (labels_of(read_annotations(write(tmp_path, coco(GOOD, file=file)))) > 0).sum() == 80


def test_parts_are_chosen_among_more_than_fit(tmp_path) -> None:
    many = [{"id": number, "name": f"c{number}"} for number in range(1, 121)]
    body = coco(*({"segmentation": SQUARE, "category_id": number} for number in range(1, 121)), categories=many)
    annotated = read_annotations(write(tmp_path, body), ["c80", "c3"])
    assert annotated.names == ("c80", "c3") and (annotated.images[0].labels() == 1).sum() == 80
    with pytest.raises(SlimeError, match="name the parts that you want"):
        read_annotations(str(tmp_path / "file.json"))


def test_names_of_other_tools(tmp_path) -> None:
    """A background is none of the parts, commas become slashes, twins are refused by their name."""
    kinds = [{"id": 1, "name": "Background"}, {"id": 2, "name": "door, double  door"}]
    annotated = read_annotations(write(tmp_path, coco({"segmentation": SQUARE}, GOOD, categories=kinds)))
    assert annotated.names == ("door / double door",)
    twins = [{"id": 1, "name": "leg"}, {"id": 2, "name": "leg"}]
    with pytest.raises(SlimeError, match="several categories named leg"):
        read_annotations(write(tmp_path, coco({"segmentation": SQUARE}, GOOD, categories=twins)))


def utf16(text: str) -> bytes:
    return text.encode("utf-16")


REFUSED: dict[str, tuple[Any, Callable[[str], bytes], str]] = {
    "not JSON": ({}, lambda text: b"{ not json", "cut off or not JSON"),
    "cut": (coco(GOOD), lambda text: text[:-40].encode(), "cut off or not JSON"),
    "UTF-16": (coco(GOOD), utf16, "file.json is saved as UTF-16"),
    "no categories": ({"images": [], "annotations": []}, str.encode, "no list categories"),
    "no image that can be used": (coco(GOOD, height=None), str.encode, "image a.png: it has no width and height"),
    "text": ("x", str.encode, "neither a COCO file nor"),
    "JSON-MIN": ([{"image": "a.png", "label": []}], str.encode, "Export it as JSON"),
    "no labels": ([{"data": {"image": "a.png"}, "annotations": []}], str.encode, "no brush, polygon, ellipse"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_hold_nothing_say_why(tmp_path, case) -> None:
    body, encode, message = REFUSED[case]
    with pytest.raises(SlimeError, match=message):
        read_annotations(write(tmp_path, body, encode))


def test_a_byte_order_mark_does_no_harm(tmp_path) -> None:
    path = write(tmp_path, coco(GOOD), lambda text: b"\xef\xbb\xbf" + text.encode())
    assert (labels_of(read_annotations(path)) > 0).sum() == 80


def test_a_missing_or_broken_image_is_named(tmp_path) -> None:
    annotated = read_annotations(write(tmp_path, coco(GOOD, file="gone.png")))
    with pytest.raises(SlimeError, match="gone.png cannot be opened"):
        labels_of(annotated)
    path = write(tmp_path, coco(GOOD))
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(SlimeError, match="a.png: Pillow cannot read"):
        labels_of(read_annotations(path))


@pytest.mark.parametrize("upright", [True, False])
def test_labels_turn_with_their_image(tmp_path, upright) -> None:
    """Some tools label the image as it is shown, others as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: 40 x 48
    body = coco(GOOD, file="b.jpg", **({"width": HEIGHT, "height": WIDTH} if upright else {}))
    path = write(tmp_path, body)
    put_image(tmp_path / "b.jpg", exif=exif)
    label_map = labels_of(read_annotations(path))
    assert label_map.shape == (WIDTH, HEIGHT)
    rows, columns = np.nonzero(label_map)
    assert (rows.min(), columns.min()) == ((6, 4) if upright else (4, HEIGHT - 14))


def test_polygons_are_filled_as_pycocotools_does() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(30):
        angles, radii = np.sort(rng.random(7)) * 2 * np.pi, rng.uniform(5, 25, 7)
        points = [24, 20] + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
        theirs = mask.decode(mask.merge(mask.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH))) > 0
        ours = fill_polygons([points], HEIGHT, WIDTH)
        assert (ours & theirs).sum() >= 0.93 * (ours | theirs).sum()


def test_a_bad_first_image_does_not_lose_the_others(tmp_path) -> None:
    body = coco(GOOD, {"segmentation": SQUARE, "image_id": 8}, file="gone.png")
    body["images"].append({"id": 8, "file_name": "a.png", "width": WIDTH, "height": HEIGHT})
    annotated = read_annotations(write(tmp_path, body))
    assert len(read_examples(annotated)) == len(read_examples(annotated, 1)) == 1
    assert "gone.png cannot be opened" in annotated.skipped[0]


# ---------------------------------------------------------------------------------------------------- Label Studio


SIZE = {"original_width": WIDTH, "original_height": HEIGHT}
REGIONS: dict[str, tuple[dict[str, Any], float]] = {
    "rectangle": ({"x": 25, "y": 25, "width": 25, "height": 50, "rectanglelabels": ["wheel"]}, 240),
    "turned rectangle": (
        {"x": 50, "y": 25, "width": 25, "height": 25, "rotation": 90, "rectanglelabels": ["wheel"]}, 120
    ),
    "ellipse": ({"x": 50, "y": 50, "radiusX": 25, "radiusY": 25, "ellipselabels": ["wheel"]}, np.pi * 120),
    "polygon": ({"points": [[50, 50], [100, 50], [100, 100], [50, 100]], "polygonlabels": ["wheel"]}, 480),
    "brush": ({"format": "rle", "rle": brush_rle(LABELS == 1), "brushlabels": ["wheel"]}, 225),
}  # fmt: skip


@pytest.mark.parametrize("kind", REGIONS)
def test_regions_of_label_studio(tmp_path, kind) -> None:
    value, area = REGIONS[kind]
    results = [
        {"id": "k", **SIZE, "value": {"x": 1, "y": 1, "width": 1, "keypointlabels": ["nose"]}},
        {"id": "r", **SIZE, "value": value},
        {"id": "c", "value": {"choices": ["good"]}},
    ]
    tasks = [
        {"id": 1, "data": {"text": "a car", "picture": "/data/local-files/?d=set%2Fa.png"},
         "annotations": [{"result": results}, {"was_cancelled": True, "result": results[:1]}]},
        {"id": 2, "data": {"image": "b.png"}, "annotations": [{"was_cancelled": True, "result": results}]},
    ]  # fmt: skip
    annotated = read_annotations(write(tmp_path, tasks))
    assert annotated.names == ("wheel",) and len(annotated.images) == 1 and not annotated.skipped
    assert abs(labels_of(annotated).sum() - area) <= 0.06 * area


def test_a_region_and_its_label_in_two_results(tmp_path) -> None:
    """As <Labels> beside <Polygon> gives them; predictions count where nothing was annotated."""
    value = {"points": REGIONS["polygon"][0]["points"]}
    results = [{"id": "r", **SIZE, "value": value}, {"id": "r", "value": {"labels": ["wheel"]}}]
    tasks = [{"data": {"image": "a.png"}, "predictions": [{"result": results}]}]
    assert (labels_of(read_annotations(write(tmp_path, tasks))) == 1).sum() == 480


# ---------------------------------------------------------------------------------------------------------- folders


def put_labels(folder: Path, labels: np.ndarray, mode: str = "L", file: str = "a.png") -> str:
    put_image(folder / "a.jpg")
    (folder / "names.txt").write_text("wheel\r\nwindow\r\n", encoding="utf-8-sig")
    (folder / file).parent.mkdir(exist_ok=True)
    image = Image.fromarray(labels)
    (image if mode == "as it is" else image.convert(mode)).save(folder / file)
    return str(folder)


@pytest.mark.parametrize("file", ["a.png", "a.PNG", "labels/a.png"])
def test_label_maps_are_found(tmp_path, file) -> None:
    annotated = read_annotations(put_labels(tmp_path, LABELS, file=file))
    assert annotated.names == ("wheel", "window") and np.array_equal(labels_of(annotated), LABELS)


@pytest.mark.parametrize("labels", [LABELS.astype(np.uint16), LABELS > 0])
def test_label_maps_of_other_depths(tmp_path, labels) -> None:
    annotated = read_annotations(put_labels(tmp_path, labels, "as it is"))
    assert np.array_equal(labels_of(annotated), labels.astype(np.uint8))


@pytest.mark.parametrize(
    ("labels", "mode", "message"),
    [
        (np.where(LABELS > 0, 255, 0).astype(np.uint8), "L", "0 and 255 only, and 255 means"),
        (LABELS, "RGB", "a.png is in colours"),
        ((LABELS.astype(np.uint16) * 300), "as it is", "whole numbers from 0 to 255"),
    ],
)
def test_label_maps_that_are_none_say_why(tmp_path, labels, mode, message) -> None:
    with pytest.raises(SlimeError, match=message):
        labels_of(read_annotations(put_labels(tmp_path, labels, mode)))


def test_two_images_of_one_stem_share_a_label_map(tmp_path) -> None:
    path = put_labels(tmp_path, LABELS, file="labels/a.png")
    put_image(tmp_path / "a.png")
    annotated = read_annotations(path)
    assert [image.labels().max() for image in annotated.images] == [2, 2]


def polygon(x: float, part: str = "wheel", **more: Any) -> dict[str, Any]:
    points = [[x, 0], [x + 25, 0], [x + 25, 50], [x, 50]]  # 12 x 20 pixels
    return {"id": f"p{x}", **SIZE, "value": {"points": points, "polygonlabels": [part]}} | more


def studio(*results: Any, **task: Any) -> list[dict[str, Any]]:
    return [{"id": 3, "data": {"image": "a.png"}, "annotations": [{"result": list(results)}]} | task]


STUDIO: dict[str, tuple[Any, int, str]] = {  # tasks, pixels of the first image, what is told
    "a task without data": ([{"id": 1}, *studio(polygon(0))], 240, "task 1: it has no data"),
    "a region of another size first": (studio(polygon(0, original_width=100), polygon(25), polygon(50)), 720, ""),
    "later choices alone": (
        studio(annotations=[{"result": [polygon(0)]}, {"result": [{"id": "c", "value": {"choices": ["good"]}}]}]),
        240, "",
    ),
    "a region without label": (
        studio(polygon(0), {"id": "r", **SIZE, "value": {"points": [[0, 0]] * 3}}), 240, "no label"
    ),
    "a bitmask": (
        studio(polygon(0), {"id": "r", **SIZE, "value": {"imageDataURL": "data:", "bitmasklabels": ["wheel"]}}),
        240, "bitmask",
    ),
    "a region outside": (studio(polygon(0), polygon(200)), 240, "covers no pixel"),
    "a further image of a list": (studio(polygon(0), polygon(25, item_index=1)), 240, "further image"),
    "two image tags": (
        studio(polygon(0, to_name="left"), polygon(25, to_name="right"), data={"left": "a.png", "right": "b.png"}),
        240, "",
    ),
    "an image inside the file": (studio(polygon(0)) + studio(polygon(0), data={"image": f"data:{'A' * 400}"}), 240, ""),
    "brackets of an address": (studio(polygon(0), data={"image": "/data/upload/1/1a2b3c4d-a;b#c.png"}), 240, ""),
    "a plus in local storage": (studio(polygon(0), data={"image": "/data/local-files/?d=x/a+b.png"}), 240, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", STUDIO)
def test_exports_of_label_studio(tmp_path, kind) -> None:
    tasks, pixels, told = STUDIO[kind]
    for name in ("b.png", "a;b#c.png", "a+b.png"):
        put_image(tmp_path / name)
    annotated = read_annotations(write(tmp_path, tasks))
    assert (labels_of(annotated) == 1).sum() == pixels
    assert told in " ".join(annotated.skipped) and bool(told) == bool(annotated.skipped)
    assert len(annotated.images) == (2 if "two" in kind or "inside" in kind else 1)


def test_large_brushes_are_decoded_at_once() -> None:
    noise = np.random.default_rng(0).random((600, 600)) > 0.5
    assert np.array_equal(mask_of_brush(brush_rle(noise), 600, 600), noise)


def test_ids_that_stand_for_two_things_are_told(tmp_path) -> None:
    """As in files that were merged by hand; an image that another one could stand for is missed."""
    body = coco(GOOD, {"segmentation": SQUARE, "image_id": 8}, {"segmentation": SQUARE, "category_id": 3})
    body["images"] += [{"id": 8, "file_name": name, "width": WIDTH, "height": HEIGHT} for name in ("b.png", "c.png")]
    body["categories"] += [{"id": 3, "name": "x"}, {"id": 3, "name": "y"}, {"id": 4, "name": None}]
    annotated = read_annotations(write(tmp_path, body))
    assert [image.name for image in annotated.images] == ["a.png"] and annotated.names == ("window",)
    assert "image id 8 stands for b.png and for c.png" in annotated.skipped[1]
    assert "category id 3 stands for x and for y" in annotated.skipped[0]
    for name in ("left-a.png", "x/A.png"):
        body = coco(GOOD, file=name)
        body["images"].append({"id": 9, "file_name": "y/a.png", "width": WIDTH, "height": HEIGHT})
        with pytest.raises(SlimeError, match="cannot be opened"):
            labels_of(read_annotations(write(tmp_path, body)))


NUMBERS = [[10**400] * 6, [[10**400] * 6], {"size": [HEIGHT, WIDTH], "counts": [2**63 - 1, 2**63 - 1, 1922]}]


@pytest.mark.parametrize("shape", NUMBERS)
def test_numbers_out_of_reach_are_told(tmp_path, shape) -> None:
    annotated = read_annotations(write(tmp_path, coco({"segmentation": shape}, GOOD)))
    assert (labels_of(annotated) > 0).sum() == 80 and len(annotated.skipped) == 1


# ------------------------------------------------------------------------------------------------------ YOLO and VOC

BOX = "0 0.25 0.25 0.5 0.25 0.5 0.5 0.25 0.5"  # 12 x 10 pixels
CAR = "names:\n  0: wheel\n  1: window\n"


def put_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        if name.endswith((".png", ".jpg")):
            put_image(folder / name)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


YOLO_FOLDERS = {
    "Ultralytics": {"data.yaml": f"path: /gone\ntrain: images/train\n{CAR}", "images/train/a.jpg": "",
                    "labels/train/a.txt": BOX},
    "Roboflow": {"data.yaml": "train: ../train/images\nnc: 2\nnames: ['wheel', 'window']\n",
                 "train/images/a.jpg": "", "train/labels/a.txt": BOX},
    "CVAT": {"data.yaml": f"path: .\ntrain: train.txt\n{CAR}", "train.txt": "data/images/train/a.jpg\n",
             "images/train/a.jpg": "", "labels/train/a.txt": BOX},
    "Label Studio": {"classes.txt": "wheel\r\nwindow\r\n", "images/1a2b-a.jpg": "", "labels/1a2b-a.txt": BOX},
    "darknet": {"obj.names": "wheel\nwindow\n", "a.jpg": "", "a.txt": BOX},
    "with confidence": {"classes.txt": "wheel\n", "a.jpg": "", "a.txt": f"{BOX} 0.97\n\n"},
    "without labels beside": {"classes.txt": "wheel\n", "a.jpg": "", "a.txt": BOX, "b.jpg": "",
                              "c.jpg": "", "c.txt": ""},
    "bad lines beside": {"classes.txt": "wheel\n", "a.jpg": "",
                         "a.txt": "\n".join([BOX, "0 .5 .5 .1 .1", "7 .1 .1 .2 .2 .3 .3", "x y", "0 nan 1 1 1 1 1",
                                            "0 90 90 99 99 9 9"])},
}  # fmt: skip


@pytest.mark.parametrize("kind", YOLO_FOLDERS)
def test_folders_of_yolo(tmp_path, kind) -> None:
    annotated = read_annotations(str(put_files(tmp_path, YOLO_FOLDERS[kind])))
    assert annotated.names == ("wheel",) and len(annotated.images) == 1
    assert (labels_of(annotated) == 1).sum() == 120
    assert len(annotated.skipped) == (5 if "bad" in kind else 0)
    assert all("a.txt, line " in line for line in annotated.skipped)


def voc_mask(mode: str) -> Image.Image:
    """The square of label 1 and the rectangle of label 2, with a border to ignore."""
    labels = LABELS.copy()
    labels[0] = 255
    image = Image.fromarray(labels).convert("P")
    levels = np.zeros((256, 3), np.uint8)
    levels[[1, 2, 255]] = (128, 0, 0), (0, 128, 0), (224, 224, 192)
    image.putpalette(levels.ravel().tolist())
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_folders_of_pascal_voc(tmp_path, mode) -> None:
    """CVAT's segmentation masks are in colours that labelmap.txt explains."""
    lines = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nwheel:128,0,0::\nwindow:0,128,0::\n"
    put_files(tmp_path, {"labelmap.txt": lines, "JPEGImages/a.jpg": "", "SegmentationClass/.keep": ""})
    voc_mask(mode).save(tmp_path / "SegmentationClass" / "a.png")
    voc_mask(mode).save(tmp_path / "SegmentationClass" / "b.png")
    annotated = read_annotations(str(tmp_path), ["window", "wheel"])
    label_map = labels_of(annotated)
    assert len(annotated.skipped) == 1 and "b.png: there is no image" in annotated.skipped[0]
    assert (label_map[0] == 255).all() and np.array_equal(label_map[1:] == 2, LABELS[1:] == 1)
    assert np.array_equal(label_map[1:] == 1, LABELS[1:] == 2)


def test_masks_of_roboflow_and_voc_without_a_list(tmp_path) -> None:
    put_files(
        tmp_path / "robo", {"_classes.csv": "Pixel Value, Class\n0, background\n1, wheel\n2, window\n", "a.jpg": ""}
    )
    Image.fromarray(LABELS).save(tmp_path / "robo" / "a_mask.png")
    assert np.array_equal(labels_of(read_annotations(str(tmp_path / "robo"))), LABELS)
    put_files(tmp_path / "voc", {"JPEGImages/a.jpg": "", "SegmentationClass/.keep": ""})
    voc_mask("P").save(tmp_path / "voc" / "SegmentationClass" / "a.png")
    annotated = read_annotations(str(tmp_path / "voc"), ["bicycle"])
    assert (labels_of(annotated) == 1).sum() == (LABELS == 2).sum()


@pytest.mark.parametrize(
    ("annotations", "image"),
    [
        ("train/_annotations.coco.json", "train/a.png"),
        ("annotations/instances_default.json", "images/a.png"),
        ("annotations/instances_val.json", "images/val/a.png"),
        ("annotations/instances_val2017.json", "val2017/a.png"),
    ],
)
def test_coco_as_roboflow_cvat_and_coco_lay_it_out(tmp_path, annotations, image) -> None:
    """A folder with one such file is enough."""
    kinds = [{"id": 0, "name": "parts"}, {"id": 1, "name": "wheel"}, {"id": 2, "name": "window"}]
    put_files(tmp_path, {annotations: json.dumps(coco(GOOD, categories=kinds)), image: ""})
    folder = tmp_path / "train" if image.startswith("train") else tmp_path
    for source in (tmp_path / annotations, folder):
        annotated = read_annotations(str(source))
        assert annotated.names == ("window",) and (labels_of(annotated) == 1).sum() == 80


OTHERS = {
    "several JSON files": ({"train/x.json": "{}", "test/y.json": "{}"}, "", "Give one of them"),
    "nothing": ({"a.png": ""}, "", "For label maps, write names.txt"),
    "an XML": ({"a.xml": "<annotation/>"}, "a.xml", "XML of CVAT or Pascal VOC. Export it as COCO"),
    "an archive": ({"a.zip": ""}, "a.zip", "Unpack it"),
    "LabelMe": ({"a.json": '{"shapes": [], "imagePath": "a.png"}'}, "a.json", "file of LabelMe or X-AnyLabeling"),
    "a broken YAML": ({"data.yaml": "names: [a\n: b"}, "data.yaml", "not valid YAML"),
    "a YAML without names": ({"data.yaml": "path: ."}, "data.yaml", "no list of names"),
    "YOLO's boxes": ({"classes.txt": "wheel", "a.png": "", "a.txt": "0 .5 .5 .1 .1"}, "", "a box, not an outline"),
    "a list of colours": ({"labelmap.txt": "wheel:1,2::\n", "SegmentationClass/x": ""}, "", "name:red,green,blue"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_say_what_to_give(tmp_path, kind) -> None:
    files, source, words = OTHERS[kind]
    with pytest.raises(SlimeError, match=words):
        read_annotations(str(put_files(tmp_path, files) / source))


# -------------------------------------------------------------------------------------------------------------- fuzz


def sources() -> list[Any]:
    results = [{"id": kind, **SIZE, "value": value} for kind, (value, _) in REGIONS.items()]
    task = {"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": results}]}
    return [coco(*FORMS.values(), GOOD), [task]]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.builds(list), st.builds(dict)
)


def paths_in(body: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: Any = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    return [path, *(found for key, value in inner for found in paths_in(value, (*path, key)))]


@pytest.mark.parametrize("kind", [0, 1])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_changed_in_a_file_only_our_error_is_raised(tmp_path_factory, kind, data) -> None:
    body = copy.deepcopy(sources()[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from([path for path in paths_in(body) if path]))
        place = body
        for key in above:
            place = place[key]
        place[last] = data.draw(ODD)
    try:
        annotated = read_annotations(write(tmp_path_factory.mktemp("fuzz"), body))
        for image in annotated.images:
            image.example(annotated.names)
    except SlimeError:
        pass


LINES = st.text("0123456789.:, -\naex#", max_size=40)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lines=LINES, names=LINES)
def test_whatever_stands_in_a_text_file_only_our_error_is_raised(tmp_path_factory, lines, names) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    files = {"a.png": "", "a.txt": f"0 .1 .1 .5 .1 .5 .5\n{lines}", "data.yaml": f"names: [a, b]\n{names}"}
    files |= {"voc/labelmap.txt": lines, "voc/JPEGImages/a.jpg": "", "voc/SegmentationClass/a.png": ""}
    files |= {"robo/_classes.csv": f"{names}\n1, a", "robo/a.jpg": "", "robo/a_mask.png": ""}
    for source in (put_files(folder, files), folder / "voc", folder / "robo"):
        try:
            annotated = read_annotations(str(source))
            for image in annotated.images:
                image.example(annotated.names)
        except SlimeError:
            pass
