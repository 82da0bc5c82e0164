"""Run the bundled workflows on the tiny model, each prepared as a user would, and collect their images."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from safetensors.torch import save_file

from testing.server import MODEL, ComfyServer
from testing.tiny.weights import flow_checkpoint
from testing.workflows import Prompt, PromptBuilder, find, load_workflow, to_api

from .samples import PICTURES, painted_sample

DOMAIN = "car"
FIRST = "1 Paint parts and find them"
EMBEDDINGS = "my_parts.safetensors"
SIDE = 256  # side of the images that the tiny model samples
THUMBNAIL = 480


def prepare(server: ComfyServer, name: str, steps: int = 4) -> Prompt:
    """Return a bundled workflow with the tiny model's checkpoint, a clip, and sampling for a few steps."""
    prompt = to_api(load_workflow(name), server.get("/object_info"))
    for node in prompt.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "CheckpointLoaderSimple":
                inputs["ckpt_name"] = put_flow(server) if "flux" in inputs["ckpt_name"] else MODEL.name
            case "SLiMeSaveEmbeddings":
                inputs["overwrite"] = True
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


def results(server: ComfyServer, names: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Run every workflow and return its images, one per node: the examples, the images to segment, the results."""
    learn_parts(server)
    found: dict[str, list[Image.Image]] = {}
    for name in names:
        prompt = prepare(server, name, steps=20)
        for node in prompt.values():
            if node["class_type"] == "SLiMeSaveEmbeddings":
                node["inputs"]["filename"] = "for_the_picture"
        before = [painted_sample(), *without_prompts(server, prompt)] if find_all(prompt, "SLiMePartPrompt") else []
        outputs = server.run(prompt, 1800)
        taught = {tuple(n["inputs"]["image"]) for n in prompt.values() if n["class_type"] == "SLiMeExample"}
        found[name] = before
        for node_id, node in prompt.items():
            shown = pictures(server, outputs.get(node_id, {}))[:1]
            if node["class_type"] == "SLiMePartPainter" and node["inputs"]["painting"]:
                shown = [painted_sample()]
            if node["class_type"] == "LoadImage" and (node_id, 0) not in taught:
                shown = [Image.open(PICTURES / node["inputs"]["image"]).convert("RGB")]
            found[name] += shown
    return found


def without_prompts(server: ComfyServer, prompt: Prompt) -> list[Image.Image]:
    """Return the images that are sampled if no part has a prompt of its own."""
    plain = copy.deepcopy(prompt)
    for node in find_all(plain, "SLiMePartPrompt"):
        plain[node]["inputs"]["strength"] = 0.0
    outputs = server.run(plain, 1800)
    return [image for node in find_all(plain, "SaveImage") for image in pictures(server, outputs[node])]


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
    page = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (24, 24, 28))
    for index, image in enumerate(shown):
        alone = index == len(shown) - 1 and index % 2 == 0
        size = (THUMBNAIL if alone else half - 2, half - 2 if len(shown) > 2 else THUMBNAIL)
        page.paste(
            ImageOps.fit(image, size, Image.Resampling.LANCZOS), (index % 2 * (half + 2), index // 2 * (half + 2))
        )
    return page
