"""Run the bundled workflows on the tiny model, each prepared as a user would, and collect their images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from safetensors.torch import save_file

from testing.browser import CHROMIUM, FLAGS, Canvas
from testing.server import MODEL, ComfyServer
from testing.tiny.weights import flow_checkpoint
from testing.workflows import Prompt, PromptBuilder, find, load_workflow, to_api

from .samples import FIND, MESH_CAMERA, MESH_VIEW, PICTURES, painted_mesh, painted_sample, write_clip

DOMAIN = "car"
FIRST = "1 Paint parts and find them"
CORRECTION = "3 Correct and train again"
EMBEDDINGS = "my_parts.safetensors"
SIDE = 256  # side of the images that the tiny model samples
THUMBNAIL = 480
DARK = (24, 24, 28)


def prepare(server: ComfyServer, name: str, steps: int = 4, short: bool = False) -> Prompt:
    """Return a bundled workflow with the tiny model's checkpoint, and sampling for a few steps.

    With ``short`` its image and clip are smaller ones, for tests.
    """
    prompt = to_api(load_workflow(name), server.get("/object_info"))
    learns = bool(find_all(prompt, "SLiMeLearnSam3Concept"))
    for node in prompt.values():
        inputs = node["inputs"]
        if "sam3" in str(inputs.get("ckpt_name")):
            node["class_type"], node["inputs"] = "LoadTinySam3", {"tracker": not learns}
            continue
        if node["class_type"] == "SLiMeLearnSam3Concept":
            del inputs["clip"]  # the tiny SAM3 has none
            inputs["instances"] = False
        match node["class_type"]:
            case "CheckpointLoaderSimple":
                inputs["ckpt_name"] = put_flow(server) if "flux" in inputs["ckpt_name"] else MODEL.name
            case "SAM3_Detect":  # scores of the tiny SAM3 are lower, and its mask decoder is untrained
                inputs["threshold"], inputs["refine_iterations"] = 0.3, 0
            case "SLiMeSaveEmbeddings":
                inputs["overwrite"] = True
            case "LoadVideo" if short:
                inputs["file"] = "short.mp4"
                write_clip(server.base / "input" / "short.mp4", 8 if "SLiMeSegmentVideo" in str(prompt) else 3)
            case "LoadImage" if short and inputs["image"] == FIND:
                inputs["image"] = f"small_{FIND}"
                with Image.open(server.base / "input" / FIND) as image:
                    image.resize((SIDE, SIDE)).save(server.base / "input" / f"small_{FIND}")
            case "KSampler" | "BasicScheduler":
                inputs["steps"] = steps
            case "EmptyLatentImage":
                inputs["width"] = inputs["height"] = SIDE
            case "SLiMePartDetailer":
                inputs["steps"], inputs["size"] = steps, SIDE
    return prompt


def put_flow(server: ComfyServer) -> str:
    """Write the tiny flow transformer as a whole checkpoint, with the tiny model's VAE and text encoder."""
    path = server.base / "models" / "checkpoints" / "tiny_flow_checkpoint.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flow_checkpoint(), str(path))
    return path.name


def learn_parts(server: ComfyServer, **settings: Any) -> Path:
    """Train the parts of the first workflow and save them as my_parts, for the workflows that load a file."""
    prompt = prepare(server, FIRST)
    train = find(prompt, "SLiMeTrain")
    builder = PromptBuilder({k: v for k, v in prompt.items() if int(k) <= int(train)})
    builder.set_training(train, "instant", **settings)
    builder.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename=Path(EMBEDDINGS).stem, overwrite=True)
    server.run(builder.prompt, 1800)
    return server.base / "models" / "slime" / EMBEDDINGS


# Where the tiny model cannot show what an edit does, the nodes that do it are shown instead.
SHOWN_AS_NODES = {
    "5 Repaint a part": ["Repaint part"],
    "6 Prompt a part while sampling": ["PartPrompt", "PartGuider"],
    "11 Learn a SAM3 concept": ["LearnSam3Concept", "Sam3Prompt"],
    "12 Refine parts with SAM3": ["Sam3Refine"],
    "13 Follow parts with SAM3": ["TrackSeeds", "TracksToParts"],
}
# The tiny SAM3 finds parts roughly, and its mask decoder is untrained.
NOT_RUN = ("11 Learn a SAM3 concept", "12 Refine parts with SAM3", "13 Follow parts with SAM3")


def results(server: ComfyServer, names: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Run every workflow and return its images: the examples, the images to segment, the results."""
    learn_parts(server)
    found: dict[str, list[Image.Image]] = {}
    for name in names:
        if name in NOT_RUN:
            found[name] = [painted_sample()]
            continue
        prompt = prepare(server, name, steps=20)
        for node in prompt.values():
            if node["class_type"] == "SLiMeSaveEmbeddings":
                node["inputs"]["filename"] = "for_the_picture"
        for mesh in find_all(prompt, "SLiMePartsToMesh"):  # shown from four sides
            around = {"mesh": [mesh, 0], "views": 4, "size": SIDE, **MESH_CAMERA._asdict()}
            prompt["900"] = {"class_type": "SLiMeMeshViews", "inputs": around}
            prompt["901"] = {"class_type": "PreviewImage", "inputs": {"images": ["900", 0]}}
        outputs = server.run(prompt, 1800)
        labelled = {tuple(n["inputs"]["image"]) for n in prompt.values() if n["class_type"] == "SLiMeExample"}
        batch = "ImageBatch" in {node["class_type"] for node in prompt.values()}
        loads = ("LoadImage", "LoadVideo", "Load3DAdvanced")
        found[name] = [] if any(find_all(prompt, kind) for kind in loads) else [painted_sample()]
        for node_id, node in prompt.items():
            shown = pictures(server, outputs.get(node_id, {}))[: 2 if batch else 1]
            if name in SHOWN_AS_NODES and node["class_type"] == "SaveImage" or batch and "Mask" in node["class_type"]:
                shown = []
            if node["class_type"] == "SLiMePartPainter" and node["inputs"]["painting"]:
                shown = [painted_mesh() if MESH_VIEW in node["inputs"]["painting"] else painted_sample()]
            if node_id == "901" or node["class_type"] == "SLiMeVideoMasks":
                shown = pictures(server, outputs[node_id])[:2]
            if node["class_type"] == "LoadImage" and (node_id, 0) not in labelled:
                shown = [Image.open(PICTURES / node["inputs"]["image"]).convert("RGB")]
            found[name] += shown
    for name, nodes in node_pictures(server, [name for name in names if name in SHOWN_AS_NODES]).items():
        found[name] += nodes
    return found


def node_pictures(server: ComfyServer, names: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Return pictures of workflows' nodes of SHOWN_AS_NODES, as the classic canvas draws them."""
    from playwright.sync_api import sync_playwright

    server.post("/settings/Comfy.TutorialCompleted", True)
    server.post("/settings/Comfy.VueNodes.Enabled", False)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        canvas = Canvas(browser.new_page(viewport={"width": 1500, "height": 1000}), server, "classic").open()
        found = {name: [node_picture(canvas, name, kind) for kind in SHOWN_AS_NODES[name]] for name in names}
        browser.close()
    return found


def node_picture(canvas: Canvas, name: str, kind: str) -> Image.Image:
    """Return a picture of the first node whose type or title ends with ``kind``."""
    canvas.load(load_workflow(name))
    canvas.page.wait_for_timeout(1000)
    canvas.page.keyboard.press("Escape")  # the offer to download the checkpoint
    x, y, width, height = canvas.js(
        """kind => {
            const node = app.graph.nodes.find(node => node.type.endsWith(kind) || node.title.endsWith(kind));
            app.canvas.ds.scale = 1.2;
            app.canvas.ds.offset = [300 - node.pos[0], 200 - node.pos[1]];
            app.graph.nodes.filter(other => other !== node).forEach(other => (other.pos = [5000, 5000]));
            app.graph.links.clear?.();
            app.graph.groups.length = 0;
            app.canvas.setDirty(true, true);
            const [left, top] = app.canvas.convertOffsetToCanvas([node.pos[0] - 10, node.pos[1] - 40]);
            return [left, top, 1.2 * (node.size[0] + 20), 1.2 * (node.size[1] + 50)];
        }""",
        kind,
    )
    canvas.page.wait_for_timeout(500)
    data = canvas.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
    return Image.open(io.BytesIO(data)).convert("RGB")


def find_all(prompt: Prompt, kind: str) -> list[str]:
    return [number for number, node in prompt.items() if node["class_type"] == kind]


def pictures(server: ComfyServer, output: dict[str, Any]) -> list[Image.Image]:
    """Return the images among a node's outputs; of a video the first frame."""
    found = []
    for item in output.get("images", []):
        data = server.output_image(item)
        if item["filename"].endswith((".png", ".jpg", ".webp")):
            found.append(Image.open(io.BytesIO(data)).convert("RGB"))
        else:
            import av

            with av.open(io.BytesIO(data), "r") as file:
                found.append(next(file.decode(video=0)).to_image())
    return found


def thumbnail(story: Sequence[Image.Image]) -> Image.Image:
    """Return the last four images as a square, row by row; of three, the last is as wide as two."""
    shown, half = list(story)[-4:], THUMBNAIL // 2
    page = Image.new("RGB", (THUMBNAIL, THUMBNAIL), DARK)
    for index, image in enumerate(shown):
        alone = index == len(shown) - 1 and index % 2 == 0
        size = (THUMBNAIL if alone else half - 2, half - 2 if len(shown) > 2 else THUMBNAIL)
        # Pictures are cut to the cell; tables and nodes are shown whole.
        square = 0.9 < image.width / image.height < 1.1
        fitted = ImageOps.fit(image, size) if square else ImageOps.pad(image, size, color=DARK)
        page.paste(fitted, (index % 2 * (half + 2), index // 2 * (half + 2)))
    return page
