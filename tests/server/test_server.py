"""The real ComfyUI server, the bundled workflows and the tiny model."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from demo.run import Shot, build_prompt, put_example, put_image, read_labels
from slime import load_embeddings, save_embeddings
from slime.parts.metrics import evaluate
from slime.parts.palette import default_palette
from testing import scenes, splits
from testing.baselines import color_neighbours, mean_mask
from testing.browser import CHROMIUM
from testing.server import MODEL, WorkflowFailed
from testing.workflows import FOLDER, SUBGRAPHS, PromptBuilder, blueprint, find, load_workflow, to_api
from tools.make_workflows import BLUEPRINTS, MOST, NEWER_WORKFLOWS, WORKFLOWS, workflows_for, written
from tools.run_workflows import EMBEDDINGS, pictures, prepare

pytestmark = pytest.mark.long
DOMAIN, NAMES = "car", scenes.PARTS["car"]
SHOTS, TESTS = 4, 6
PINNED, WITH_SAM3 = "0.3.75", "0.33.0"  # the ComfyUIs that write the templates
WITH_MASKS = "2 Train on masks of several images"


@pytest.fixture(scope="module")
def template(server):
    return to_api(load_workflow(WITH_MASKS), server.get("/object_info"))


@pytest.fixture(scope="module")
def shots(server) -> list[Shot]:
    return [put_example(server, f"example_{i}", splits.example(DOMAIN, splits.EXAMPLES + i)) for i in range(SHOTS)]


@pytest.fixture(scope="module")
def tests_scenes(server):
    found = [scenes.render(DOMAIN, splits.TEST + i) for i in range(TESTS)]
    return found, [put_image(server, f"test_{i}.png", scene.image) for i, scene in enumerate(found)]


@pytest.fixture(scope="module")
def learned(server, template, shots, tests_scenes):
    """One run of the bundled workflow: its prompt, outputs and label maps."""
    few = {"views": 12}  # half of the default, to save time
    prompt, nodes = build_prompt(template, MODEL.name, shots, tests_scenes[1], "learned", train_settings=few)
    outputs = server.run(prompt)
    palette = default_palette(len(NAMES))
    labels = [read_labels(server.output_image(outputs[node]["images"][0]), palette) for _, node in nodes]
    return prompt, nodes, outputs, labels


def small_train(shots, preset: str = "instant", seed: int = 0, **settings):
    """A prompt that trains on the first example and saves; returns builder and the Train node's id."""
    builder = PromptBuilder.of_checkpoint(MODEL.name)
    examples = builder.add_examples(shots[0].image, {"window": shots[0].masks["window"]})
    values = {"model": ["1", 0], "vae": ["1", 2], "clip": ["1", 1], "examples": examples, "seed": seed}
    train = builder.add("SLiMeTrain", **values)
    builder.set_training(train, preset, **({"views": 2} | settings))
    builder.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename="small", overwrite=True)
    return builder, train


LENGTHS = itertools.count(1)


def sampler_prompt():
    builder = PromptBuilder.of_checkpoint(MODEL.name)
    latent = builder.add("EmptyLatentImage", width=256, height=256, batch_size=1)
    # The same latent under another number, so that nothing is taken from the server's cache.
    latent = builder.add("LatentFromBatch", samples=[latent, 0], batch_index=0, length=next(LENGTHS))
    sampler = builder.add_sampling("a red car with blue windows on sand", "", latent, seed=3, steps=4)
    decoded = builder.add("VAEDecode", samples=[sampler, 0], vae=["1", 2])
    return builder.prompt, builder.add("SaveImage", images=[decoded, 0], filename_prefix="sample")


def sample(server) -> np.ndarray:
    """Pixels of a KSampler run that nothing was cached for."""
    prompt, node = sampler_prompt()
    outputs = server.run(prompt)
    return np.asarray(Image.open(io.BytesIO(server.output_image(outputs[node]["images"][0]))))


def test_the_pack_is_imported_without_an_error(server) -> None:
    assert not [line for line in server.log().splitlines() if "IMPORT FAILED" in line or "Error while calling" in line]


def test_bundled_workflow_beats_the_baselines(learned, tests_scenes) -> None:
    truths = [scene.labels for scene in tests_scenes[0]]
    examples = [splits.example(DOMAIN, splits.EXAMPLES + i) for i in range(SHOTS)]
    ours = evaluate(learned[3], truths, len(NAMES) + 1).part_miou
    mean = evaluate([mean_mask(examples)] * TESTS, truths, len(NAMES) + 1).part_miou
    color = evaluate(color_neighbours(examples, [s.image for s in tests_scenes[0]]), truths, len(NAMES) + 1).part_miou
    assert ours > 1.3 * max(mean, color), (ours, mean, color)


def test_embeddings_file_is_small_and_listed(server, learned) -> None:
    path = server.base / "models" / "slime" / "learned.safetensors"
    assert load_embeddings(path).names == NAMES and path.stat().st_size < 300_000
    assert "learned.safetensors" in server.get("/models/slime")
    spec = server.get("/object_info/SLiMeLoadEmbeddings")["SLiMeLoadEmbeddings"]["input"]["required"]["filename"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    assert "learned.safetensors" in options


def cached_nodes(server, prompt) -> list[str]:
    entry = server.wait(server.queue(prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]
    return next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")


def test_changing_the_mask_widgets_runs_no_training_and_no_segmentation(server, learned) -> None:
    """Runs before other prompts: ComfyUI keeps the outputs of the last one."""
    builder = PromptBuilder(learned[0])
    segment = find(builder.prompt, "SLiMeSegment")
    values = {"mode": "argmax", "threshold": 0.5, "grow": 0, "feather": 3, "invert": False}
    mask = builder.add("SLiMePartMask", parts=[segment, 0], names="wheel", **values)
    builder.add("MaskPreview", mask=[mask, 0])
    assert {find(builder.prompt, "SLiMeTrain"), segment} <= set(cached_nodes(server, builder.prompt))


@pytest.mark.parametrize("by_link", [False, True], ids=["widget", "link"])
def test_files_are_read_again_when_they_have_changed_only(server, learned, shots, by_link) -> None:
    """A data set in a folder with label maps, and an embeddings file; their names by a widget or by a link."""
    name = f"set_{by_link}"
    folder = server.base / "input" / name
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(server.base / "input" / shots[0].image, folder / "a.png")
    with Image.open(folder / "a.png") as image:
        labels = np.zeros((image.height, image.width), np.uint8)
    labels[10:40, 10:60] = 1
    np.save(folder / "labels" / "a.npy", labels)
    (folder / "names.txt").write_text("wheel\n", encoding="utf-8")
    saved = server.base / "models" / "slime" / f"{name}.safetensors"
    shutil.copyfile(server.base / "models" / "slime" / "learned.safetensors", saved)
    builder = PromptBuilder({})

    def text(value: str) -> object:
        return [builder.add("PrimitiveString", value=value), 0] if by_link else value

    load = builder.add("SLiMeLoadAnnotations", path=text(name), parts="", max_images=1)
    shown = builder.add("PreviewImage", images=[load, 1])
    embeddings = builder.add("SLiMeLoadEmbeddings", filename=saved.name)  # the core takes no link for a list of files
    builder.add("PreviewAny", source=[embeddings, 1])
    assert not {load, embeddings} & set(cached_nodes(server, builder.prompt))
    assert {load, embeddings, shown} <= set(cached_nodes(server, builder.prompt))
    labels[50:60] = 1
    np.save(folder / "labels" / "a.npy", labels)
    os.utime(folder / "labels" / "a.npy", ns=(1, 1))
    os.utime(saved, ns=(1, 1))
    assert not {load, embeddings} & set(cached_nodes(server, builder.prompt))
    assert {load, embeddings, shown} <= set(cached_nodes(server, builder.prompt))


def test_interrupt_autosaves_and_training_goes_on(server, shots) -> None:
    folder = server.base / "models" / "slime" / "autosave"
    before = set(folder.glob("*")) if folder.exists() else set()
    builder, train = small_train(shots, preset="paper", steps=5000, views=4, seed=77)
    prompt_id = server.queue(builder.prompt)
    some_steps = 165  # of 1000, behind the views
    assert asyncio.run(asyncio.wait_for(saw_progress(server, train, some_steps), 120))
    server.interrupt()
    entry = server.wait(prompt_id, 120)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    (autosave,) = set(folder.glob("*.safetensors")) - before
    kept = load_embeddings(autosave)
    assert kept.names == ("window",) and len(kept.losses) >= 10
    assert str(autosave) in server.log()
    builder, train = small_train(shots, preset="paper", steps=2, views=2)
    loaded = builder.add("SLiMeLoadEmbeddings", filename=f"autosave/{autosave.name}")
    builder.prompt[train]["inputs"]["init_embeddings"] = [loaded, 0]
    server.run(builder.prompt)


async def saw_progress(server, node: str, step: int, with_preview: bool = True) -> bool:
    """Follow the socket until the node reports ``step`` and a live preview has come."""
    import aiohttp

    preview = not with_preview
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.address}/ws?clientId={server.client}") as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    preview = preview or b"JFIF" in message.data[:600]
                elif message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    at = (
                        event["data"].get("value", 0)
                        if event["type"] == "progress" and event["data"]["node"] == node
                        else 0
                    )
                    if at >= step and preview:
                        return True
    return False


def test_an_interrupted_sampling_with_parts_leaves_all_as_it_was(server, file_to_load) -> None:
    """Also one that ended: the next KSampler's pixels are what they were."""
    before = sample(server)
    prompt = prepare(server, "6 Prompt a part while sampling", steps=100)
    prompt_id, sampler = server.queue(prompt), find(prompt, "SamplerCustomAdvanced")
    assert asyncio.run(asyncio.wait_for(saw_progress(server, sampler, 30, with_preview=False), 120))
    server.interrupt()
    entry = server.wait(prompt_id, 60)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert np.array_equal(sample(server), before)
    prompt = prepare(server, "6 Prompt a part while sampling", steps=6)
    builder, guider = PromptBuilder(prompt), find(prompt, "SLiMePartGuider")
    shown = builder.add("SLiMeGuiderMasks", guider=[guider, 0], latent=[find(prompt, "SamplerCustomAdvanced"), 0])
    masks = pictures(server, server.run(builder.prompt)[shown])
    assert masks and np.asarray(masks[0]).any()
    assert np.array_equal(sample(server), before)


def test_part_inpaint_workflow_changes_only_the_part(server, learned, tests_scenes) -> None:
    prompt = to_api(load_workflow("5 Repaint a part"), server.get("/object_info"))
    prompt[find(prompt, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = MODEL.name
    prompt[find(prompt, "SLiMeLoadEmbeddings")]["inputs"]["filename"] = "learned.safetensors"
    prompt[find(prompt, "LoadImage")]["inputs"]["image"] = tests_scenes[1][0]
    prompt[find(prompt, "SLiMePartMask")]["inputs"].update(names="body", grow=0)
    prompt[find(prompt, "KSampler")]["inputs"]["steps"] = 4
    builder = PromptBuilder(prompt)
    as_image = builder.add("MaskToImage", mask=[find(prompt, "SLiMePartMask"), 0])
    saved_mask = builder.add("SaveImage", images=[as_image, 0], filename_prefix="mask")
    outputs = server.run(builder.prompt)
    images = [
        Image.open(io.BytesIO(server.output_image(outputs[n]["images"][0])))
        for n in (find(prompt, "SaveImage"), saved_mask)
    ]
    result, mask = (np.asarray(image.convert("RGB")).astype(int) for image in images)
    assert set(np.unique(mask)) == {0, 255} and mask.shape == result.shape == (256, 256, 3)
    changed = np.abs(result - tests_scenes[0][0].image).max(-1)
    inside = mask[..., 0] == 255
    assert changed[~inside].max() <= 1 and changed[inside].mean() > 5


@pytest.fixture(scope="module")
def file_to_load(server, learned):
    """What the workflows that load embeddings find."""
    folder = server.base / "models" / "slime"
    shutil.copyfile(folder / "learned.safetensors", folder / EMBEDDINGS)


@pytest.mark.skipif(CHROMIUM is not None, reason="tests/browser/test_templates.py runs them in the page")
@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name != WITH_MASKS])
def test_every_bundled_workflow_runs(server, file_to_load, name) -> None:
    """From its JSON, with the demo's checkpoint, pictures and names in it; it has notes and shows a picture."""
    assert any(node["type"] == "MarkdownNote" for node in load_workflow(name)["nodes"])
    builder = PromptBuilder(prepare(server, name, short=True))
    prompt = builder.prompt
    for node_id, node in list(prompt.items()):
        if node["class_type"] == "SLiMeTrain":
            builder.set_training(node_id, "instant", views=4)
        if node["class_type"] == "SLiMeSaveEmbeddings":
            node["inputs"]["filename"] = name
    outputs = server.run(prompt)
    shown = [picture for output in outputs.values() for picture in pictures(server, output)]
    assert shown and all(np.asarray(picture).std() > 1 for picture in shown)


@pytest.mark.parametrize("name", NEWER_WORKFLOWS)
def test_the_templates_for_newer_versions_run(server, file_to_load, name) -> None:
    """With a tiny SAM3 in place of the checkpoint."""
    if "SAM3_Detect" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no SAM3, and no colours on meshes")
    builder = PromptBuilder(prepare(server, name, short=True))
    for node_id, node in list(builder.prompt.items()):
        if node["class_type"] == "SLiMeLearnSam3Concept":
            node["inputs"]["steps"] = 3
        if node["class_type"] == "SLiMeTrain":
            builder.set_training(node_id, "instant", views=4)
    outputs = server.run(builder.prompt, 900)
    assert [picture for output in outputs.values() for picture in pictures(server, output)]


def test_app_modes_name_what_is_there(server) -> None:
    info, apps = server.get("/object_info"), 0
    for name in WORKFLOWS:
        workflow = load_workflow(name)
        shown = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
        kinds = {node["id"]: info[node["type"]] for node in workflow["nodes"] if node["type"] in info}
        for node, widget in shown["inputs"]:
            assert widget in kinds[node]["input"]["required"] | kinds[node]["input"].get("optional", {})
        assert all(kinds[node]["output_node"] for node in shown["outputs"])
        apps += bool(shown["inputs"] and shown["outputs"])
    assert apps == 2


def test_workflow_files_are_what_the_schemas_give(server) -> None:
    """python dev.py workflows would change nothing; the files are made with the pinned ComfyUI's core nodes."""
    info = server.get("/object_info")
    if server.get("/system_stats")["system"]["comfyui_version"] not in (PINNED, WITH_SAM3):
        pytest.skip("another version's core nodes have other widgets")
    for name, make in workflows_for(info).items():
        assert written(make(), info) == load_workflow(name), name
        assert (FOLDER / f"{name}.jpg").stat().st_size < 60_000
        nodes = load_workflow(name)["nodes"]
        assert max(node["pos"][0] + node["size"][0] for node in nodes) <= MOST[0], name
        assert max(node["pos"][1] + node["size"][1] for node in nodes) <= MOST[1], name
    assert {path.stem for path in FOLDER.glob("*.json")} == {*WORKFLOWS, *NEWER_WORKFLOWS}
    if "SAM3_Detect" in info:
        return
    listed = {entry["name"] for entry in server.get("/global_subgraphs").values()}
    assert set(BLUEPRINTS) <= listed
    for name, describe in BLUEPRINTS.items():
        text = (SUBGRAPHS / f"{name}.json").read_text(encoding="ascii")
        assert json.loads(text) == blueprint(name, **describe(), object_info=info)


def test_batches_of_any_size_keep_their_size(server, learned) -> None:
    builder = PromptBuilder.of_checkpoint(MODEL.name)
    loaded = builder.add("SLiMeLoadEmbeddings", filename="learned.safetensors")
    batch = builder.add("EmptyImage", width=301, height=203, batch_size=3, color=12345)
    segmented = builder.add(
        "SLiMeSegment",
        model=["1", 0],
        vae=["1", 2],
        embeddings=[loaded, 0],
        image=[batch, 0],
        refine="best",
        seed=0,
        batch_size=2,
    )
    as_image = builder.add("MaskToImage", mask=[segmented, 1])
    saved = builder.add("SaveImage", images=[as_image, 0], filename_prefix="batch")
    outputs = server.run(builder.prompt)[saved]["images"]
    assert len(outputs) == 3
    assert Image.open(io.BytesIO(server.output_image(outputs[2]))).size == (301, 203)


def test_bad_files_and_names_say_so(server, shots, learned) -> None:
    folder = server.base / "models" / "slime"
    good = load_embeddings(folder / "learned.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "learned.safetensors").read_bytes()[:-50])
    condition = {"context": torch.zeros(77, 768)}
    wide = replace(good, backbone="sd1", vectors={"shared": torch.zeros(5, 768)}, condition=condition)
    save_embeddings(wide, folder / "foreign.safetensors", overwrite=True)
    for name, message in (
        ("cut", "Load SLiMe Embeddings: .*truncated"),
        ("foreign", 'SLiMe Segment: .*"sd1" model.*"tiny"'),
    ):
        builder = PromptBuilder.of_checkpoint(MODEL.name)
        loaded = builder.add("SLiMeLoadEmbeddings", filename=f"{name}.safetensors")
        image = builder.add("LoadImage", image=shots[0].image)
        segmented = builder.add(
            "SLiMeSegment", model=["1", 0], vae=["1", 2], embeddings=[loaded, 0], image=[image, 0], refine="off", seed=0
        )
        builder.add("MaskPreview", mask=[segmented, 1])
        with pytest.raises(WorkflowFailed, match=message):
            server.run(builder.prompt)
    builder, train = small_train(shots)
    builder.prompt[find(builder.prompt, "SLiMeSaveEmbeddings")]["inputs"]["filename"] = "../outside"
    with pytest.raises(WorkflowFailed, match="Save SLiMe Embeddings: .*cannot be a file name"):
        server.run(builder.prompt)
    assert not (server.base / "models" / "outside.safetensors").exists()
