"""The bundled workflows on the demo model: what a user would do to each before queueing it, and what comes out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from demo.run import put_image
from slime.parts.palette import default_palette
from testing import scenes, splits
from testing.clips import clip
from testing.server import MODEL, ComfyServer
from testing.workflows import Prompt, load_workflow, to_api

DOMAIN, PART, SECOND_PART = "car", "wheel", "window"
EMBEDDINGS = "my_parts.safetensors"
FRAMES = 6
THUMBNAIL = (480, 320)


def prepare(server: ComfyServer, name: str, steps: int = 4) -> Prompt:
    """A bundled workflow with the demo's checkpoint, pictures and part names, sampling for a few steps."""
    prompt = to_api(load_workflow(name), server.get("/object_info"))
    # What is evaluated must not be what was taught.
    pictures = iter(_pictures(server, prompt, splits.TEST if "evaluate" in name else splits.TEACH))
    for node in prompt.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "CheckpointLoaderSimple":
                inputs["ckpt_name"] = MODEL.name
            case "LoadImage":
                inputs["image"] = next(pictures)
            case "LoadVideo":
                inputs["file"] = put_video(server)
            case "SLiMeLoadEmbeddings":
                inputs["filename"] = EMBEDDINGS
            case "SLiMePartPainter":
                inputs["painting"] = painting(server)
            case "SLiMeSaveEmbeddings":
                inputs["overwrite"] = True
            case "KSampler":
                inputs["steps"] = steps
            case "SLiMeExample" | "SLiMeEvaluate":
                inputs["names"] = PART
            case "SLiMePartMask" if inputs["names"] not in (PART, SECOND_PART):
                inputs["names"] = "" if name != "slime_part_inpaint" else PART
    return prompt


def _pictures(server: ComfyServer, prompt: Prompt, painted_seed: int) -> list[str]:
    """Painted scenes for the Load Image nodes whose masks are used, test scenes for the others."""
    used = {tuple(value) for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)}
    found = []
    for index, node_id in enumerate(i for i, node in prompt.items() if node["class_type"] == "LoadImage"):
        painted = (node_id, 1) in used
        scene = scenes.render(DOMAIN, (painted_seed if painted else splits.TEST) + index)
        mask = scene.labels == 1 + scenes.PARTS[DOMAIN].index(PART)
        alpha = np.where(mask, 0, 255).astype(np.uint8)[..., None]
        pixels = np.concatenate([scene.image, alpha], -1) if painted else scene.image
        found.append(
            put_image(server, f"workflow_{'painted' if painted else 'plain'}_{painted_seed}_{index}.png", pixels)
        )
    return found


def painting(server: ComfyServer) -> str:
    """What SLiMe Part Painter saves when all parts of a scene are painted."""
    scene = scenes.render(DOMAIN, splits.TEACH)
    file = put_image(server, "workflow_painting.png", scene.image)
    colors = default_palette(len(scenes.PARTS[DOMAIN]))
    named = zip(scenes.PARTS[DOMAIN], colors, strict=True)
    parts = [{"name": name, "color": "#" + bytes(color).hex()} for name, color in named]
    height, width = scene.labels.shape
    saved = {
        "version": 1,
        "image": {"name": file, "subfolder": "", "type": "input"},
        "parts": parts,
        "width": width,
        "height": height,
        "runs": encode_runs(scene.labels),
    }
    return json.dumps(saved)


def encode_runs(labels: np.ndarray) -> str:
    """LabelMap.encode of web/painter/label_map.js."""
    flat = labels.ravel()
    starts = [*np.flatnonzero(np.diff(flat.astype(int), prepend=-1)).tolist(), len(flat)]
    data = bytearray()
    for start, end in zip(starts, starts[1:], strict=False):
        data.append(int(flat[start]))
        count = end - start
        while count > 127:
            data.append(count & 127 | 128)
            count >>= 7
        data.append(count)
    return base64.b64encode(bytes(data)).decode()


def put_video(server: ComfyServer) -> str:
    """A short clip of a moving scene in the server's input folder."""
    import av

    path = server.base / "input" / "workflow.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for frame in (clip(DOMAIN, 0, FRAMES)[0] * 255).byte().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return path.name


def results(server: ComfyServer, names: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Pictures that the workflows show or save, in the order of their nodes; what others load is learned first."""
    found = {}
    for name in sorted(names, key=lambda name: name != "slime_several_parts"):
        prompt = prepare(server, name, steps=20)
        for node in prompt.values():
            if node["class_type"] == "SLiMeSaveEmbeddings" and name != "slime_several_parts":
                node["inputs"]["filename"] = name
        outputs = server.run(prompt, 1800)
        found[name] = [picture for node in sorted(outputs, key=int) for picture in pictures(server, outputs[node])]
    return found


def pictures(server: ComfyServer, output: dict[str, Any]) -> list[Image.Image]:
    """Images among a node's outputs; the first frame of a video."""
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


def thumbnail(images: Sequence[Image.Image]) -> Image.Image:
    """The first and the last picture side by side."""
    width, height = THUMBNAIL
    page = Image.new("RGB", THUMBNAIL, (24, 24, 28))
    shown = [images[0], images[-1]] if len(images) > 1 else [images[0]]
    for index, image in enumerate(shown):
        scale = min(width / len(shown) / image.width, height / image.height)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left = round(width * (index + 0.5) / len(shown) - small.width / 2)
        page.paste(small, (left, (height - small.height) // 2))
    return page
