"""The benchmarks: data sources, methods and tables."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import ablation, confidence, correction, device, extraction_cost, memory, one_part, speed
from benchmarks.accuracy import CEILING, grid_ceiling, measure, summarise
from benchmarks.feature_baselines import RULES, Bank, FeatureChoice, best_feature_choices
from benchmarks.methods import EncodeOnce, Variant, constants, encode_once, fitted, make_methods, remember
from benchmarks.reference import Reference
from benchmarks.rows import read_rows, shared, write_rows
from benchmarks.sources import OTHER, LabelledImages, Task, as_tensor, folder_task, read_folder, scene_task
from benchmarks.speed import Bench
from slime import Example, SlimeError
from slime.backbones.text import Capture, Context, add_noise
from slime.images import resize_image, soft_labels
from slime.paper import train as paper_train
from slime.paper.decoder import official_maps, token_maps
from slime.paper.losses import sd_loss
from slime.parts.metrics import evaluate
from testing import scenes
from testing.inprocess import load_flow
from testing.server import FLOW, MODEL
from testing.tiny.weights import TESTBED, checkpoint_of
from testing.toy import ToyUNet, all_vectors


def colored_squares(seed: int, side: int = 128) -> Example:
    """A red and a blue square."""
    labels = torch.zeros(side, side, dtype=torch.int64)
    for part, x in ((1, 8), (2, side // 2 + 8)):
        y = (17 * seed + 11 * part) % (side - 48)
        labels[y : y + 40, x : x + 32] = part
    colors = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.1, 0.2], [0.1, 0.8, 0.9]])
    return Example.from_label_map(colors[labels], labels, ["red", "blue"])


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


def test_rows_of_another_run_are_not_mixed(tmp_path) -> None:
    path, asked = tmp_path / "rows.json", shared(Namespace(scenes=6, checkpoint=Path("x/a")), "scenes", "checkpoint")
    assert read_rows(path, asked) == []
    write_rows(path, [{"a": 1}], asked=asked)
    assert read_rows(path, asked) == [{"a": 1}]
    with pytest.raises(SystemExit, match="another scenes; choose another file"):
        read_rows(path, asked | {"scenes": 12})
    with pytest.raises(SystemExit, match="another scenes, checkpoint"):
        read_rows(path)


def test_rows_hold_what_the_tables_need(capsys) -> None:
    task = scene_task("horse", 1, 0, 2, "validation", ["plain", "small", OTHER])
    learn = make_methods(MODEL, Variant("instant"))["colour neighbours"]
    assert [row["set"] for row in measure(task, "colour neighbours", learn, 1, 0)] == ["plain"]
    rows = measure(task, "default", learn, 1, 0)
    assert [row["set"] for row in rows] == ["plain", "small", OTHER]
    assert 0 <= rows[0]["part_miou"] <= 1 and rows[2]["part_miou"] is None and 0 <= rows[2]["false_area"] <= 1
    json.dumps(rows)
    summarise(rows)
    assert "| default |" in capsys.readouterr().out
    assert measure(task, CEILING, None, 1, 0)[0]["part_miou"] > 0.7


def test_crops_are_counted_and_whole_images_are_encoded_once() -> None:
    encode, image, crop = EncodeOnce(lambda images: images, {}), torch.rand(1, 8, 8, 3), torch.rand(1, 8, 8, 3)
    encode(image, keep=True)
    before = EncodeOnce.encoded
    encode(torch.cat([image, crop, image]))
    assert EncodeOnce.encoded - before == 1


def test_the_reference_procedure_has_our_losses_and_maps() -> None:
    """Dense official maps and losses equal ours on the same view, noise and timestep; the rows move."""
    toy, example = ToyUNet(), colored_squares(0)
    reference = Reference(toy, 2)
    image, rows = example.image[None], reference.rows.detach().clone()
    labels = soft_labels(example.labels, 3, (16, 16)).argmax(0)
    found = reference.step(image, labels)
    generator = torch.Generator().manual_seed(0)
    timestep = int(torch.randint(5, 101, [1], generator=generator))
    latents = toy.encode_images(resize_image(image, (128, 128)))
    noise = torch.randn(latents.shape, generator=generator)
    noisy = add_noise(toy, latents, noise, timestep)
    capture = Capture(reference.layers)
    context = Context(torch.cat([reference.base[:1], rows, reference.base[3:]]))
    conditional = toy.predict_noise(noisy, timestep, context, capture)
    unconditional = toy.predict_noise(noisy, timestep, toy.encode_prompt(""), None)
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 0)[None].float()
    ours = paper_train.loss_terms(paper_train.mean_scores(capture, 3, one_hot), capture, one_hot)
    ours["sd"] = paper_train.SD_WEIGHT * sd_loss(conditional, unconditional, noise)
    for name, value in ours.items():
        np.testing.assert_allclose(float(found.losses[name]), float(value.detach()), rtol=1e-3, err_msg=name)
    assert not torch.equal(reference.rows.detach(), rows) and found.labels.shape == (16, 16)


@pytest.mark.parametrize("crops", [1, 2])
def test_the_reference_inference_is_our_official_decoder(crops: int) -> None:
    toy = ToyUNet()
    reference = Reference(toy, 2, crops)
    with torch.no_grad():
        reference.rows[0] += 2
    found = reference.infer(colored_squares(0).image[None])
    assert found.shape == (16, 16) and found.unique().tolist() != [0]
    if crops == 1:
        capture, conditional = Capture(reference.layers), Context(reference.context().tokens[1].detach())
        generator = torch.Generator().manual_seed(0)
        latents = toy.encode_images(resize_image(colored_squares(0).image[None], (128, 128)))
        noise = torch.randn(latents.shape, generator=generator)
        toy.predict_noise(add_noise(toy, latents, noise, 100), 100, conditional, capture)
        maps = token_maps(list(capture.cross.values()), 3, (16, 16))
        ours = official_maps(maps, list(capture.self_.values()))[0].argmax(0)
        assert (ours == found).float().mean() > 0.98


def test_every_row_of_the_ablation_runs(capsys, monkeypatch) -> None:
    """Each change is a valid setting; those of segmentation give label maps."""
    toy, task = ToyUNet(), toy_task()

    def shortened(variant: Variant) -> Variant:
        patterns = ("read_layers", "propagate_layers")
        layers = {key: "" for key in patterns if variant.train.get(key, "auto") != "auto"}
        steps = {"steps": 2} if variant.preset == "paper" else {}
        return replace(variant, train={**variant.train, "views": 1, **steps, **layers})

    monkeypatch.setattr(ablation, "trained", lambda _path: toy)
    monkeypatch.setattr(ablation, "remember", lambda *_: None)
    options = Namespace(checkpoint=None, only=[])
    for table, variants in ablation.TABLES.items():
        monkeypatch.setitem(ablation.TABLES, table, {name: shortened(one) for name, one in variants.items()})
        rows = list(ablation.variant_rows(task, table, 0, {next(iter(variants))}, options))
        assert [row["change"] for row in rows] == list(variants)[1:] and all(0 <= row["miou"] <= 1 for row in rows)
    rows = list(ablation.refinement_rows(task, "refinement", 0, set(), options))
    assert [row["change"] for row in rows] == list(ablation.REFINEMENTS)
    ablation.summarise([{"table": "default", "change": "x", "domain": "car", "shots": 1, "seed": 0, "part_miou": 0.5,
                         "boundary_f": 0.5, "learning_s": 1.0, "image_s": 0.1}], ["default"])  # fmt: skip
    assert "| x | 0.500 |" in capsys.readouterr().out


def toy_task() -> Task:
    example = colored_squares(0, 96)
    images = (example.image.numpy() * 255).astype(np.uint8)[None]
    return Task("car", (example,), {"plain": LabelledImages(images, (example.labels.numpy(),))})


def test_constants_change_a_training_and_come_back() -> None:
    toy, example, kept = ToyUNet(), colored_squares(0), paper_train.WAS_WEIGHT
    short = {"views": 1, "steps": 1}
    first, other = (
        Variant("paper", short, constants=values).fit(toy, [example], 0).losses
        for values in ({}, {"paper.train.WAS_WEIGHT": 0.0})
    )
    assert other[0] < first[0] and paper_train.WAS_WEIGHT == kept
    with pytest.raises(AttributeError), constants({"paper.train.NO_SUCH": 1.0}):
        pass


def test_the_official_steps_are_the_official_decoder() -> None:
    toy, task = ToyUNet(), toy_task()
    variant = Variant("paper", {"views": 2, "steps": 4})
    embeddings, images = variant.fit(toy, task.examples, 0), task.tests["plain"].images
    steps = replace(variant, official={}).find(toy, embeddings, images, 0)
    assert np.array_equal(steps, variant.find(toy, embeddings, images, 0))
    bare = {"gate": 0.0, "subtract_mean": False, "rescale": False, "order": 0, "all_tokens": False}
    (labels,) = replace(variant, official=bare).find(toy, embeddings, images, 0)
    assert labels.any() and labels.shape == (96, 96)


def test_test_images_are_encoded_once_and_nothing_else_is_kept() -> None:
    toy, task = ToyUNet(), toy_task()
    embeddings = Variant("instant", {"views": 1}).fit(toy, task.examples, 0)
    plain = Variant("instant").find(toy, embeddings, task.tests["plain"].images, 0)
    encode_once(toy, latents := {})
    remember(toy, task.tests["plain"].images)
    before = toy.encoded
    found = Variant("instant").find(toy, embeddings, task.tests["plain"].images, 0)
    assert np.array_equal(found, plain) and toy.encoded == before and len(latents) == 1
    Variant("instant", {"views": 2}).fit(toy, task.examples, 0)
    assert len(latents) == 1


def test_rows_come_back_from_their_file(tmp_path) -> None:
    rows = [{"method": "default", "part_miou": 0.1234567, "per_part": {"leg": 0.5}}, {"method": "paper", "miou": None}]
    write_rows(tmp_path / "x.json", rows, device="here")
    assert read_rows(tmp_path / "x.json") == [rows[0] | {"part_miou": 0.123457}, rows[1]]
    assert len((tmp_path / "x.json").read_text().splitlines()) == 4 and read_rows(tmp_path / "none.json") == []
    write_rows(None, rows)


@pytest.mark.long
def test_memory_is_measured() -> None:
    for case, count in (("batch", 3), ("stream", 6)):  # a process's peak holds all that ran in it before
        assert -0.1 < memory.in_own_process(case, count, 64, 2) < 1
    assert memory.peak() > 0.9 * memory.resident() > 1e7  # the kernel counts them apart


@pytest.mark.long
def test_speed_rows_and_memory() -> None:
    rows = []
    bench = Bench("toy", ToyUNet(), ToyUNet(), 1, rows.append, 2)
    x = torch.ones(1000, requires_grad=True)
    with speed.memory() as used:
        y = x.exp().exp()  # both results are saved for the backward pass
        del y
        kept = x.exp().exp()
        kept.sum().backward()
    assert used.bytes is not None and 8000 <= used.bytes < 20_000
    with speed.memory() as used:
        torch.empty(0).set_(x.detach().untyped_storage())  # as weights are lent to autograd
    assert used.bytes == 0
    bench.images = torch.rand(64, 32, 32, 3)
    for task in ("step", "memory", "iou", "segment", "files", "batch"):
        getattr(bench, task)()
    tasks = [row["task"] for row in rows]
    assert "segment 64" in tasks and "training step, reference with 2 x 2 crops" in tasks
    assert all(row["ours_s"] > 0 and row["bound_s"] > 0 for row in rows if row.get("bound_s"))
    held = {row["task"]: row["ours_bytes"] for row in rows if row["task"].startswith("memory")}
    assert 0 < held["memory of a training step, checkpointing"] <= held["memory of a training step"]
    speed.summarise("here", rows)


def test_calibration_and_absence_figures(capsys) -> None:
    probability, right = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55]), np.array([1, 1, 1, 0, 1, 0])
    expected = (4 * (0.95 - 0.75) + 2 * (0.55 - 0.5)) / 6
    assert confidence.calibration_error(probability, right) == pytest.approx(expected)
    assert confidence.area_under_roc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    task = toy_task()
    empty = LabelledImages(task.tests["plain"].images, tuple(np.zeros_like(t) for t in task.tests["plain"].truths))
    row = confidence.figures(ToyUNet(), replace(task, tests={**task.tests, OTHER: empty}), 0)
    assert row["auc"] == 0.5 and row["part_miou_0.0"] > 0.8 and row["false_area_0.0"] > 0.05
    confidence.summarise([{"shots": 1} | row])
    assert "| 1 | off |" in capsys.readouterr().out


def test_the_costs_of_a_device_are_measured(comfy_path) -> None:
    """Of ``benchmark device``, on a model that takes no time."""
    rows: list = []
    device.costs("toy", ToyUNet(), rows.append)
    assert not [row for row in rows if "failed" in row]
    assert {"segment 1", "paper, a step", "paper, a step, checkpointing"} <= {row["what"] for row in rows}
    assert all(row["s"] > 0 for row in rows) and device.about()["torch"] == torch.__version__


@pytest.mark.parametrize("rule", RULES)
def test_rivals_find_what_looks_alike(rule) -> None:
    toy = ToyUNet()
    choice = best_feature_choices(toy)[rule]
    found = Bank(toy, [colored_squares(0)], [choice]).find(colored_squares(1).image[None], [(rule, choice)])[
        rule, choice
    ][0]
    assert (found == colored_squares(1).labels.numpy()).mean() > 0.9


def test_the_papers_recipe_is_that_of_its_domain_and_is_learned_once() -> None:
    assert Variant("paper").recipe(scenes.PARTS["face"], "segment") == {"tiles": 2}
    assert Variant("paper").recipe(scenes.PARTS["horse"], "train") == {"smallest_crop": 0.8}
    assert not Variant("instant").recipe(scenes.PARTS["horse"], "train")
    toy, task = ToyUNet(), toy_task()
    fit = fitted(lambda: toy, Variant("paper", {"views": 1, "steps": 1}))
    first = fit(task.examples, 0, ())
    passes = toy.passes
    assert fit(task.examples, 0, ()) is first and toy.passes == passes
    assert fit(task.examples, 1, ()) is not first


def test_a_variant_may_see_red_as_blue() -> None:
    toy, task = ToyUNet(), toy_task()
    plain, swapped = Variant("instant", {"views": 2}), Variant("instant", {"views": 2}, bgr=True)
    learned = plain.fit(toy, task.examples, 0)
    turned = [replace(one, image=one.image.flip(-1)) for one in task.examples]
    assert torch.equal(all_vectors(swapped.fit(toy, turned, 0)), all_vectors(learned))
    assert not torch.equal(all_vectors(swapped.fit(toy, task.examples, 0)), all_vectors(learned))
    images = task.tests["plain"].images
    found = plain.find(toy, learned, images, 0)
    again = swapped.find(toy, learned, images[..., ::-1], 0)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_the_test_bed_is_a_whole_checkpoint_for_whoever_loads_it() -> None:
    demo = load_file(str(MODEL))
    with checkpoint_of(MODEL) as same, checkpoint_of(TESTBED) as whole:
        found = load_file(str(whole))
        assert same == MODEL
    assert {name: weight.shape for name, weight in found.items()} == {name: w.shape for name, w in demo.items()}
    changed = {name.split(".")[0] for name, weight in found.items() if not torch.equal(weight, demo[name])}
    assert changed == {"model", "cond_stage_model"}  # the autoencoder is the demo's
    assert not whole.exists()


def test_a_part_alone_is_measured_with_both_rules(monkeypatch) -> None:
    monkeypatch.setattr("slime.training.fit.L2", 0.001)  # the toy's few features find little with more
    with torch.inference_mode():
        rows = one_part.measure(ToyUNet(), "face", ("hair",), 2, "validation")
    assert all(0 <= value <= 1 for value in rows) and rows[0] != rows[1]


@pytest.mark.long
def test_correcting_is_measured_against_chance(monkeypatch, capsys) -> None:
    monkeypatch.setattr(correction, "load_backbone", lambda _path: ToyUNet())
    monkeypatch.setattr(correction, "POOL", 3)
    options = ["correction", "--corrected", "1", "--draws", "1", "--scenes", "2", "--domains", "horse"]
    monkeypatch.setattr("sys.argv", options)
    correction.main()
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| part mIoU | 1 example | 1 lowest confidence | 1 random |" and table[2].startswith(
        "| horse | "
    )
    assert all(0 <= float(cell) <= 1 for cell in table[2].split("|")[2:5]) and "Training again" in table[-1]


@pytest.mark.long
def test_extraction_is_timed_beside_the_bare_pass(comfy_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["extraction_cost", "--repeats", "1"])
    monkeypatch.setattr(extraction_cost, "IMAGES", 1)
    extraction_cost.main()
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [row["model"] for row in rows] == ["tiny UNet", "tiny flow transformer", "both"]
    assert all(row[name] > 0 for row in rows for name in ("encode", "extract", "bare", "extract bytes", "bare bytes"))
    assert "| both | " in told


@pytest.mark.long
def test_the_flow_transformer_is_measured_as_the_unet_is(comfy_path) -> None:
    """Each of its methods, on one scene; the file, the file drawn anew, its neighbours, and both models together."""
    methods = make_methods(MODEL, Variant("instant", {"views": 4}))
    task = scene_task("horse", 1, 0, 1, "test")
    for name in ("flow", "flow, untrained", "default beside flow"):
        (found,) = methods[name](task.examples, 0)(task.tests["plain"].images)
        assert found.shape == task.tests["plain"].images.shape[1:3]
    backbone = load_flow(FLOW)
    chosen = {rule: FeatureChoice(("joint.3",), 261) for rule in RULES}
    bank, images = Bank(backbone, task.examples, list(chosen.values())), as_tensor(task.tests["plain"].images)
    assert all(maps[0].max() > 0 for maps in bank.find(images, list(chosen.items())).values())
