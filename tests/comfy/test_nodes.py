"""Nodes called in this process: masks, names, and errors that name the node, the value and the cure."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slime import SlimeError, preset, segment, to_text, train
from slime.edit import describe
from testing.toy import ToyUNet, all_vectors, toy_example


@pytest.fixture(scope="module")
def nodes(extension):
    import slime_extension.nodes.extension as module

    return module


@pytest.fixture(autouse=True)
def silent_previews(nodes, monkeypatch):
    """Previews write files into a running server's folders; here there is none."""
    from comfy_api.latest import ui

    for kind in ("PreviewImage", "PreviewMask"):
        monkeypatch.setattr(ui, kind, lambda *a, **k: SimpleNamespace(as_dict=lambda: {"images": []}))


def parts(labels: torch.Tensor, count: int = 2):
    from slime_extension.nodes.common import Parts

    from slime.parts.maps import DenseMaps, PartMaps
    from slime.parts.palette import default_palette

    one_hot = torch.nn.functional.one_hot(labels, count + 1).movedim(-1, 1).float()
    names = ("wheel", "window", "door")[:count]
    probabilities = one_hot * 0.8 + 0.2 / (count + 1)
    maps = PartMaps(DenseMaps(probabilities), names, default_palette(count), probabilities[:, 1:].amax((2, 3)))
    return Parts(maps, torch.rand(*labels.shape, 3))


def square(size: int = 32) -> torch.Tensor:
    labels = torch.zeros(2, size, size, dtype=torch.int64)
    labels[0, 8:20, 8:20] = 1
    labels[0, 24:28, 24:28] = 2
    return labels


def mask_of(nodes, labels=None, **options) -> torch.Tensor:
    return nodes.SLiMePartMask.execute(parts(square() if labels is None else labels), **options).args[0]


def test_mask_contract(nodes) -> None:
    """[B, H, W] float32, exactly 0 or 1, and zeros, never zero-length, where nothing is found."""
    for options in ({}, {"mode": "threshold"}, {"grow": 3}, {"names": "wheel", "fill_holes": True, "minimum_area": 5}):
        mask = mask_of(nodes, **options)
        assert mask.shape == (2, 32, 32) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert not mask[1].any() and mask[0].any()
    empty = mask_of(nodes, labels=torch.zeros(1, 32, 32, dtype=torch.int64), names="window", grow=5, feather=3)
    assert empty.shape == (1, 32, 32) and not empty.any()
    full = mask_of(nodes, labels=torch.ones(1, 32, 32, dtype=torch.int64), grow=-2)
    assert full.all(), "shrinking has no border to shrink from where everything is inside"


def test_names_select_parts(nodes) -> None:
    labels = square()
    assert torch.equal(mask_of(nodes, names="wheel").bool(), labels == 1)
    assert torch.equal(mask_of(nodes, names="wheel, window").bool(), labels > 0)
    assert torch.equal(mask_of(nodes, names="").bool(), labels > 0)
    assert torch.equal(mask_of(nodes, names="background").bool(), labels == 0)
    assert torch.equal(mask_of(nodes, names="window", invert=True).bool(), labels != 2)


def test_grow_is_a_disc_and_shrink_its_inverse(nodes) -> None:
    grown = mask_of(nodes, names="wheel", grow=4)[0].bool()
    y, x = np.mgrid[0:32, 0:32]
    outside = np.hypot(np.maximum(0, np.maximum(8 - y, y - 19)), np.maximum(0, np.maximum(8 - x, x - 19)))
    assert np.array_equal(grown.numpy(), outside <= 4)
    shrunk = mask_of(nodes, names="wheel", grow=-3)[0]
    assert shrunk.sum() == 6 * 6 and shrunk[11:17, 11:17].all()


def test_feather_holes_and_specks(nodes) -> None:
    labels = square()
    labels[0, 12:14, 12:14] = 0
    assert mask_of(nodes, labels, names="wheel")[0, 13, 13] == 0
    assert mask_of(nodes, labels, names="wheel", fill_holes=True)[0, 13, 13] == 1
    assert mask_of(nodes, labels, minimum_area=17)[0, 25, 25] == 0
    soft = mask_of(nodes, feather=4)
    assert 0 < float(soft[0, 8, 14]) < 1 and float(soft.max()) <= 1
    probability = mask_of(nodes, mode="soft", names="wheel")
    assert probability[0, 10, 10] == pytest.approx(0.8 + 0.2 / 3)
    filled = mask_of(nodes, labels, mode="soft", names="wheel", fill_holes=True)
    assert filled[0, 13, 13] == 1 and filled[0, 10, 10] == pytest.approx(0.8 + 0.2 / 3), (
        "a hole is filled, the rest kept"
    )


def test_unknown_part_names_what_there_is(nodes) -> None:
    with pytest.raises(ValueError, match="Part Mask: There is no part tail. The trained parts are: wheel, window"):
        mask_of(nodes, names="tail")


IMAGE = torch.rand(1, 40, 48, 3)
GOOD = torch.zeros(1, 40, 48)
GOOD[:, 5:20, 5:20] = 1


@pytest.mark.parametrize(
    ("image", "mask", "names", "message"),
    [
        (IMAGE, torch.zeros(1, 64, 64), "wheel", "Nothing is painted"),
        (IMAGE, torch.ones(1, 64, 64), "wheel", "64x64 but the image is 48x40"),
        (IMAGE, GOOD, " , ", "No part names"),
        (IMAGE, GOOD, "wheel, window", "1 masks for 2 names"),
        (IMAGE, GOOD.repeat(2, 1, 1), "wheel, wheel", "more than once: wheel"),
        (IMAGE.repeat(3, 1, 1, 1), GOOD, "wheel", "3 images, 1 masks and 1 names"),
        (IMAGE.repeat(2, 1, 1, 1), GOOD.repeat(2, 1, 1), "wheel, window", "2 images, 2 masks and 2 names"),
        (GOOD, GOOD, "wheel", "A mask is connected to an image input"),
        (torch.rand(1, 1, 1, 3), torch.ones(1, 1, 1), "wheel", "1x1"),
        (torch.full((1, 40, 48, 3), torch.nan), GOOD, "wheel", "NaN"),
    ],
)
def test_bad_examples_name_node_value_and_cure(nodes, image, mask, names, message) -> None:
    with pytest.raises(ValueError, match=f"^SLiMe Example: .*{message}"):
        nodes.SLiMeExample.execute(image, mask, names)


def test_example_takes_what_other_nodes_hand_over(nodes) -> None:
    for image, mask in (
        (torch.rand(1, 40, 48, 4), GOOD),
        (IMAGE[0], GOOD[0]),
        (IMAGE, GOOD[:, None]),
        (IMAGE.half(), GOOD.half()),
    ):
        examples, preview = nodes.SLiMeExample.execute(image, mask, "wheel").args
        assert examples[0].names == ("wheel",) and preview.shape == (1, 40, 48, 3)


def test_a_mask_of_the_same_proportions_is_resized_and_told(nodes, monkeypatch) -> None:
    from slime_extension.nodes import example

    said: list[str] = []
    monkeypatch.setattr(example, "show_text", lambda _, text: said.append(text))
    mask = torch.zeros(1, 20, 24)
    mask[:, 5:10, 5:10] = 1
    examples = nodes.SLiMeExample.execute(IMAGE, mask, "wheel").args[0]
    assert int((examples[0].labels == 1).sum()) == 100 and said == [
        "The mask of 24 x 20 was resized to the image's 48 x 40."
    ]


def test_a_batch_of_images_with_a_mask_each_is_as_many_examples(nodes) -> None:
    images, masks = torch.rand(3, 40, 48, 3), GOOD.repeat(3, 1, 1)
    examples, preview = nodes.SLiMeExample.execute(images, masks, "wheel").args
    assert len(examples) == 3 and preview.shape == (1, 40, 48, 3)
    assert all(torch.equal(example.image, image) for example, image in zip(examples, images, strict=True))


def test_overlay_and_label_map(nodes) -> None:
    item = parts(square())
    tinted, colored = nodes.SLiMeOverlay.execute(item, 0.5, False).args
    assert tinted.shape == colored.shape == (2, 32, 32, 3)
    assert torch.equal((colored[0, 10, 10] * 255).round().int(), torch.tensor(item.maps.palette[0]).int())


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "C:x", "", "...", "a\x00b"])
def test_file_names_cannot_leave_the_folder(nodes, tmp_path, monkeypatch, name) -> None:
    from slime_extension.nodes import files

    monkeypatch.setattr(files, "_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="file"):
        files.save_path(name, overwrite=False)


def test_saving_adds_a_number_instead_of_overwriting(nodes, tmp_path, monkeypatch) -> None:
    from slime_extension.nodes import files

    monkeypatch.setattr(files, "_folder", lambda: tmp_path)
    assert files.save_path("car.safetensors", False).name == "car.safetensors"
    (tmp_path / "car.safetensors").touch()
    assert files.save_path("car", False).name == "car_2.safetensors"
    assert files.save_path("car", True).name == "car.safetensors"


def test_wrong_models_are_refused(extension) -> None:
    from slime_extension.nodes.comfy_unet import ComfyUNet

    from testing.models import comfy_patcher

    with pytest.raises(ValueError, match="another kind of model"):
        model = SimpleNamespace(diffusion_model=torch.nn.Identity())
        ComfyUNet(SimpleNamespace(model=model, object_patches={}, object_patches_backup={}))
    patcher = comfy_patcher("sd1")
    first = patcher.model.diffusion_model.input_blocks[0][0]
    with torch.inference_mode():
        first.weight = torch.nn.Parameter(torch.zeros(32, 9, 3, 3), requires_grad=False)
    with pytest.raises(ValueError, match="9 input channels.*text-to-image checkpoint"):
        ComfyUNet(patcher)
    clip = SimpleNamespace(
        tokenize=lambda t: t, encode_from_tokens=lambda t, return_pooled: (torch.zeros(1, 77, 1024), None)
    )
    with pytest.raises(ValueError, match="1024 wide, but the model needs 768"):
        ComfyUNet(comfy_patcher("sd1"), None, clip).condition("x")


def test_a_node_is_one_file_and_one_line(nodes, monkeypatch) -> None:
    from comfy_api.latest import io
    from slime_extension.nodes.common import schema

    class Upper(io.ComfyNode):  # type: ignore[misc]
        @classmethod
        def define_schema(cls) -> io.Schema:
            return schema(
                node_id="SLiMeUpper",
                display_name="Upper",
                inputs=[io.String.Input("text")],
                outputs=[io.String.Output()],
            )

        @classmethod
        def execute(cls, text: str) -> io.NodeOutput:
            return io.NodeOutput(text.upper())

    from slime_extension.nodes import extension

    monkeypatch.setattr(extension, "NODES", [*extension.NODES, Upper])
    listed = asyncio.run(extension.SlimeExtension().get_node_list())
    assert listed[-1].GET_SCHEMA().category.startswith("SLiMe") and listed[-1].execute("a").args == ("A",)


def test_import_is_light(extension, comfy_path) -> None:
    """Users of scipy.ndimage aside, importing the entry point loads no diffusers and touches no GPU."""
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    code = (
        f"import importlib.util, sys; s = importlib.util.spec_from_file_location('p', r'{root}/__init__.py', "
        f"submodule_search_locations=[r'{root}']); m = importlib.util.module_from_spec(s); sys.modules['p'] = m; "
        "s.loader.exec_module(m); print([n for n in ('torch', 'kornia', 'diffusers') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_part_list_gives_every_part_with_its_name(nodes) -> None:
    item = parts(square(), 3)
    masks, names, batch = nodes.SLiMePartList.execute(item).args
    assert names == ["wheel", "window", "door"] and [m.shape for m in masks] == [(2, 32, 32)] * 3
    assert masks[0].sum() == 144 and masks[1].sum() == 16 and not masks[2].any()
    assert batch.shape == (6, 32, 32) and set(batch.unique().tolist()) == {0.0, 1.0}
    assert nodes.SLiMePartList.execute(item, skip_empty=True).args[1] == ["wheel", "window"]
    soft = nodes.SLiMePartList.execute(item, mode="soft").args[0][0]
    assert 0 < float(soft.min()) < 0.1 < 0.8 < float(soft.max()) < 1
    nothing = nodes.SLiMePartList.execute(parts(torch.zeros(1, 8, 8, dtype=torch.int64)), skip_empty=True).args
    assert nothing[1] == [""] and nothing[0][0].shape == (1, 8, 8) and not nothing[0][0].any()


def test_boxes_have_cores_form(nodes) -> None:
    labels = square()
    labels[0, 0:3, 28:31] = 1
    boxes, text = nodes.SLiMePartBoxes.execute(parts(labels), True, 4).args
    assert boxes[1] == [] and [b["label"] for b in boxes[0]] == ["wheel", "wheel", "window"]
    wheels = [(b["x"], b["y"], b["width"], b["height"]) for b in boxes[0][:2]]
    assert sorted(wheels) == [(8, 8, 12, 12), (28, 0, 3, 3)]
    assert all(0.8 < box["score"] <= 1 for box in boxes[0]) and json.loads(text) == boxes
    together = nodes.SLiMePartBoxes.execute(parts(labels), False, 4).args[0][0]
    assert [(b["x"], b["y"], b["width"], b["height"]) for b in together][0] == (8, 0, 23, 20)
    assert len(nodes.SLiMePartBoxes.execute(parts(labels), True, 100).args[0][0]) == 1


def test_segs_have_the_impact_packs_form(nodes) -> None:
    """((H, W), [SEG]) with the fields of its namedtuple; the mask lies inside the crop where the part is."""
    item = parts(square())
    (size, segs) = nodes.SLiMePartSegs.execute(item, True, 4, 2.0).args[0]
    assert size == (32, 32) and [seg.label for seg in segs] == ["wheel", "window"]
    fields = ("cropped_image", "cropped_mask", "confidence", "crop_region", "bbox", "label", "control_net_wrapper")
    assert type(segs[0])._fields == fields
    for seg, label in zip(segs, (1, 2), strict=True):
        x1, y1, x2, y2 = seg.crop_region
        assert 0 <= x1 < x2 <= 32 and 0 <= y1 < y2 <= 32 and seg.control_net_wrapper is None
        assert seg.cropped_mask.dtype == np.float32 and seg.cropped_mask.shape == (y2 - y1, x2 - x1)
        assert np.array_equal(seg.cropped_mask > 0, (square()[0] == label).numpy()[y1:y2, x1:x2])
        assert torch.equal(seg.cropped_image, item.images[:1, y1:y2, x1:x2]) and 0.8 < seg.confidence <= 1
    assert segs[0].bbox == (8, 8, 20, 20) and segs[0].crop_region == (2, 2, 26, 26)
    assert nodes.SLiMePartSegs.execute(parts(torch.zeros(1, 8, 8, dtype=torch.int64))).args[0] == ((8, 8), [])


def test_evaluate_scores_named_parts(nodes) -> None:
    item, truth = parts(square()), (square() == 1).float()
    mean, table, picture = nodes.SLiMeEvaluate.execute(item, truth, "wheel").args
    assert mean == 1.0 and "| wheel | 1.000 | 1.000 |" in table and picture.shape[-1] == 3
    half = truth.clone()
    half[0, 8:14] = 0
    both = torch.cat([half, torch.zeros(2, 32, 32)])
    mean, table, _ = nodes.SLiMeEvaluate.execute(item, both, "wheel, window").args
    assert mean == pytest.approx(0.5) and "| window | absent | absent |" in table
    with pytest.raises(ValueError, match="SLiMe Evaluate: 4 masks of 32x32 are needed.*ground_truth has 2 of 32x32"):
        nodes.SLiMeEvaluate.execute(item, truth, "wheel, window")
    with pytest.raises(ValueError, match="There is no part door"):
        nodes.SLiMeEvaluate.execute(item, truth, "door")
    with pytest.raises(ValueError, match="SLiMe Evaluate: ground_truth is empty"):
        nodes.SLiMeEvaluate.execute(item, torch.zeros_like(truth), "wheel")


def test_label_maps_train(nodes) -> None:
    image = torch.rand(1, 20, 24, 3)
    colored = torch.zeros(1, 20, 24, 3)
    colored[0, 2:8, 2:8] = torch.tensor([230, 25, 75]) / 255
    colored[0, 10:14, 10:20] = torch.tensor([60, 180, 75]) / 255
    text = "wheel = #e6194b\n\nwindow=#3CB44B"
    examples, preview = nodes.SLiMeExampleFromLabelMap.execute(image, colored, text).args
    assert examples[0].names == ("wheel", "window") and preview.shape == (1, 20, 24, 3)
    assert (examples[0].labels == 1).sum() == 36 and (examples[0].labels == 2).sum() == 40
    for bad, message in (("wheel = red", "not a part and its colour"), ("wheel = #000001\nwheel = #ffffff", "twice"),
                         ("door = #0000ff", "No pixel has the colour of: door")):  # fmt: skip
        with pytest.raises(ValueError, match=f"SLiMe Example from Label Map: .*{message}"):
            nodes.SLiMeExampleFromLabelMap.execute(image, colored, bad)
    with pytest.raises(ValueError, match="24x10 but the image is 24x20"):
        nodes.SLiMeExampleFromLabelMap.execute(image, colored[:, :10], text)


def test_embeddings_travel_as_text_merge_and_change(nodes) -> None:
    toy = ToyUNet()
    first = train(toy, [toy_example(0)], preset("instant", views=2))
    renamed = nodes.SLiMeEmbeddingsMerge.execute(first, None, "red = tyre\nblue = #010203").args[0]
    assert renamed.names == ("tyre", "blue") and renamed.palette[1] == (1, 2, 3)
    only = nodes.SLiMeEmbeddingsMerge.execute(first, None, "red = drop").args[0]
    assert only.names == ("blue",)
    assert all(torch.equal(only.vectors[name], vector[1:]) for name, vector in first.vectors.items())
    left = nodes.SLiMeEmbeddingsMerge.execute(first, None, "blue = drop").args[0]
    merged, names = nodes.SLiMeEmbeddingsMerge.execute(left, only).args
    assert names == "red, blue" and len(set(merged.palette)) == 2
    assert torch.equal(all_vectors(merged), all_vectors(first))
    image = toy_example(4).image[None]
    expected = segment(toy, image, first)[0].probabilities
    torch.testing.assert_close(segment(toy, image, merged)[0].probabilities, expected)
    text = to_text(merged)
    again, names = nodes.SLiMeLoadEmbeddings.execute("", f"  {text}\n").args
    same = segment(toy, image, again)[0].label_map == expected.argmax(1)
    assert names == "red, blue" and same.float().mean() > 0.99
    info = describe(first)
    assert "parts (2): red, blue" in info and "instant" in info and "loss:" in info
    paper = train(toy, [toy_example(0)], preset("paper", steps=1, views=1))
    for call, message in (
        (lambda: nodes.SLiMeEmbeddingsMerge.execute(first, first), "more than once: blue, red"),
        (lambda: nodes.SLiMeEmbeddingsMerge.execute(first, paper), "preset paper"),
        (lambda: nodes.SLiMeEmbeddingsMerge.execute(paper, None, "red = drop"), "learned together in one text"),
        (lambda: nodes.SLiMeEmbeddingsMerge.execute(first, None, "c = tyre"), "no part c"),
        (lambda: nodes.SLiMeEmbeddingsMerge.execute(first, None, "red tyre"), "is not a change"),
        (lambda: nodes.SLiMeEmbeddingsMerge.execute(only, None, "blue = drop"), "All parts are dropped"),
        (lambda: nodes.SLiMeLoadEmbeddings.execute("", text[:-20]), "cut off or changed"),
    ):
        with pytest.raises(ValueError, match=f"^(SLiMe Embeddings Merge|Load SLiMe Embeddings): .*{message}"):
            call()
    other = train(toy, [toy_example(0)], preset("instant", views=2, timestep=50))
    with pytest.raises(ValueError, match="other settings"):
        nodes.SLiMeEmbeddingsMerge.execute(only, nodes.SLiMeEmbeddingsMerge.execute(other, None, "blue = c").args[0])


def test_names_are_separated_by_the_commas_of_any_script(extension) -> None:
    from slime_extension.nodes.common import split_names

    assert split_names("a, b;c\nd") == ["a", "b", "c", "d"]
    for comma in "\u060c\u061b\u3001\uff0c\uff1b":
        assert split_names(f"a{comma} b") == ["a", "b"]


def test_progress_says_what_is_left(extension) -> None:
    from slime_extension.nodes.train import done_share, progress_text

    from slime.training.progress import StepReport

    def said(stage: str, step: int, elapsed: float, losses=None) -> str:
        report = StepReport(stage, step, 200, losses or {})
        return progress_text(report, done_share({stage: step / report.steps}, "paper"), elapsed)

    assert said("views", 100, 4.0) == "Encoding view 100/200, about 2 min left"
    assert said("train", 100, 58.0, {"loss": 0.4321}) == "Training, step 100/200, loss 0.4321, about 42 s left"
    assert said("train", 200, 100.0, {"loss": 2.0}) == "Training, step 200/200, loss 2"


def test_the_bar_spans_the_whole_training(extension) -> None:
    from slime_extension.nodes.train import BAR, STAGE_SHARES, STAGES, TrainingProgress

    from slime.training.progress import StepReport

    for chosen, last, probed in (("instant", "fit", False), ("instant", "fit", True), ("paper", "train", False)):
        stages = (*(("layers",) if probed else ()), *STAGE_SHARES[chosen], last)
        # The check of colours extracts views in two rounds, so that stages come again.
        rounds = [(stage, n, 8) for some in ((1, 5), (5, 9)) for stage in stages[:-1] for n in range(*some)]
        progress, shares = TrainingProgress(None, chosen), []
        progress._bar.update_absolute = lambda value, *_, to=shares: to.append(value / BAR)
        # A fit may end before its last step.
        for stage, n, count in [*rounds, *((last, n, 9) for n in range(1, 5)), ("done", 9, 9)]:
            progress(StepReport(stage, n, count))
        assert shares == sorted(shares) and 0 < shares[0] < 0.2 and shares[-2] < 1 == shares[-1]
        assert set(stages) <= set(STAGES)


@pytest.mark.parametrize(("node", "chosen"), [("SLiMeInstantSettings", "instant"), ("SLiMePaperSettings", "paper")])
def test_settings_nodes_begin_with_the_presets_numbers_and_say_each_of_them(extension, node, chosen) -> None:
    from slime_extension.nodes import train_settings

    toy, kind = ToyUNet(), getattr(train_settings, node)
    values = {item.id: item.default for item in kind.define_schema().inputs}
    settings = kind.execute(**values).args[0]
    same = preset(chosen, seed=3)
    assert preset(chosen, toy.info, seed=3, **settings.for_preset(chosen)) == same
    assert kind.execute().args[0].for_preset(chosen).keys() <= settings.for_preset(chosen).keys()
    for name, value in {
        "views": 5,
        "smallest_crop": 0.9,
        "rotation": 0.0,
        "flip": "off",
        "read_layers": "auto",
    }.items():
        changed = preset(chosen, toy.info, seed=3, **kind.execute(**values | {name: value}).args[0].for_preset(chosen))
        assert changed == dataclasses.replace(same, **{name: False if name == "flip" else value})
    with pytest.raises(SlimeError, match=f"connected settings are for {chosen}"):
        settings.for_preset("other")


def test_how_it_was_installed_is_told(extension, caplog) -> None:
    from slime_extension.nodes.installation import check_installation

    check_installation(Path("/x/SLiMe"), {})
    assert not caplog.text
    check_installation(Path("/x/my slime"), {})
    assert "serves no scripts" in caplog.text and "two copies" not in caplog.text
    other = type("Other", (), {"RELATIVE_PYTHON_MODULE": "custom_nodes.other"})
    check_installation(Path("/x/SLiMe"), {"SLiMeTrain": other})
    assert "two copies of this extension, custom_nodes.other and SLiMe" in caplog.text
