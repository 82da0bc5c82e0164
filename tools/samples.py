"""Images and a clip of the bundled workflows: example_workflows/pictures, copied to ComfyUI's input folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from slime.mesh.glb import read_glb
from slime.mesh.views import Camera, MeshViews, render_views
from slime.parts.draw import draw_legend, overlay
from slime.parts.palette import default_palette
from slime.parts.runs import encode_runs
from testing import glb, meshes, scenes, splits
from testing.clips import clip
from testing.workflows import FOLDER

PICTURES = FOLDER / "pictures"
SIDE, DOMAIN = 512, "car"
PAINTED = ("wheel", "window", "body")
EXAMPLE, FIND, FIND_TOO = "slime_example.jpg", "slime_find.jpg", "slime_find_2.jpg"
WHEELS = ("slime_wheels_1.webp", "slime_wheels_2.webp")
TESTED = "slime_test.webp"
CLIP, FRAMES = "slime_car.mp4", 12
MESH, MESH_SEED, MESH_VIEW = "3d/slime_car.glb", 6, "slime_car_view.jpg"
MESH_CAMERA = Camera(azimuth=30.0, elevation=30.0)
SCENES = {EXAMPLE: 57, FIND: 53, FIND_TOO: 50, WHEELS[0]: 57, WHEELS[1]: 59, TESTED: 55}


def sample(file: str) -> scenes.Scene:
    return scenes.render(DOMAIN, splits.EXAMPLES + SCENES[file], size=SIDE)


def write_samples() -> None:
    """Write the images: JPEG as they are, WebP with the wheels as mask, transparent as Load Image reads masks."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    write_clip()
    (PICTURES / MESH).parent.mkdir(exist_ok=True)
    (PICTURES / MESH).write_bytes(glb.colored(meshes.build(DOMAIN, MESH_SEED)[0]))
    Image.fromarray((mesh_view().images[0] * 255).byte().numpy()).save(PICTURES / MESH_VIEW, quality=88)
    for file in SCENES:
        scene = sample(file)
        if file.endswith(".jpg"):
            Image.fromarray(scene.image).save(PICTURES / file, quality=88)
        else:
            wheels = scene.labels == 1 + scenes.PARTS[DOMAIN].index("wheel")
            alpha = np.where(wheels, 0, 255).astype(np.uint8)[..., None]
            Image.fromarray(np.concatenate([scene.image, alpha], -1)).save(PICTURES / file, quality=85, exact=True)


def write_clip(path: Path = PICTURES / CLIP, frames: int = FRAMES) -> None:
    """Write a short clip of a moving scene."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "26"})
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for frame in (clip(DOMAIN, 0, frames)[0] * 255).byte().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def mesh_view() -> MeshViews:
    """Return the mesh as SLiMe Mesh Views shows it first."""
    return render_views(read_glb((PICTURES / MESH).read_bytes()), [MESH_CAMERA], SIDE)


def painted_labels() -> np.ndarray:
    """Return the label map of the first image, with the parts that are painted."""
    scene = sample(EXAMPLE)
    labels = np.zeros_like(scene.labels)
    for label, name in enumerate(PAINTED, start=1):
        labels[scene.labels == 1 + scenes.PARTS[DOMAIN].index(name)] = label
    return labels


def painted_sample() -> Image.Image:
    """Return the first image as the painter shows it."""
    return _with_legend(sample(EXAMPLE).image, painted_labels(), PAINTED)


def _with_legend(image: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    palette = default_palette(len(names))
    picture = Image.fromarray(overlay(image, labels, palette))
    draw_legend(picture, names, palette)
    return picture


def painting() -> str:
    """Return the text that SLiMe Part Painter saves when the parts of the first image are painted."""
    return _saved(EXAMPLE, PAINTED, painted_labels())


def mesh_labels() -> np.ndarray:
    """Return the label map of the mesh's first view."""
    faces = mesh_view().faces[0].long()
    labels = meshes.build(DOMAIN, MESH_SEED)[1][faces.clamp(min=0)]
    return torch.where(faces >= 0, labels, 0).byte().numpy()


def painted_mesh() -> Image.Image:
    """Return the mesh's first view as the painter shows it."""
    names, image = meshes.PARTS[DOMAIN], (mesh_view().images[0] * 255).byte().numpy()
    return _with_legend(image, mesh_labels(), names)


def mesh_painting() -> str:
    """Return the text that SLiMe Part Painter saves when the parts of the mesh's first view are painted."""
    return _saved(MESH_VIEW, meshes.PARTS[DOMAIN], mesh_labels())


def _saved(image: str, names: Sequence[str], labels: np.ndarray) -> str:
    colors = default_palette(len(names))
    saved = {
        "version": 1,
        "image": {"name": image, "subfolder": "", "type": "input"},
        "parts": [{"name": n, "color": "#" + bytes(c).hex()} for n, c in zip(names, colors, strict=True)],
        "width": SIDE,
        "height": SIDE,
        "runs": encode_runs(labels),
    }
    return json.dumps(saved)
