"""Images and a clip of the bundled workflows: example_workflows/pictures, copied to ComfyUI's input folder."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from slime.parts.draw import overlay
from slime.parts.palette import default_palette
from slime.parts.runs import encode_runs
from testing import scenes, splits
from testing.clips import clip
from testing.workflows import FOLDER

PICTURES = FOLDER / "pictures"
SIDE, DOMAIN = 512, "car"
PAINTED = ("wheel", "window", "body")
EXAMPLE, FIND, FIND_TOO = "slime_example.jpg", "slime_find.jpg", "slime_find_2.jpg"
WHEELS = ("slime_wheels_1.webp", "slime_wheels_2.webp")
TESTED = "slime_test.webp"
CLIP, FRAMES = "slime_car.mp4", 12
SCENES = {EXAMPLE: 57, FIND: 53, FIND_TOO: 50, WHEELS[0]: 57, WHEELS[1]: 59, TESTED: 55}


def sample(file: str) -> scenes.Scene:
    return scenes.render(DOMAIN, splits.EXAMPLES + SCENES[file], size=SIDE)


def write_samples() -> None:
    """Write the images: JPEG as they are, WebP with the wheels as mask, transparent as Load Image reads masks."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    write_clip()
    for file in SCENES:
        scene = sample(file)
        if file.endswith(".jpg"):
            Image.fromarray(scene.image).save(PICTURES / file, quality=88)
        else:
            wheels = scene.labels == 1 + scenes.PARTS[DOMAIN].index("wheel")
            alpha = np.where(wheels, 0, 255).astype(np.uint8)[..., None]
            Image.fromarray(np.concatenate([scene.image, alpha], -1)).save(PICTURES / file, quality=85, exact=True)


def write_clip() -> None:
    """Write a short clip of a moving scene."""
    import av

    with av.open(str(PICTURES / CLIP), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "26"})
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for frame in (clip(DOMAIN, 0, FRAMES)[0] * 255).byte().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def painted_labels() -> np.ndarray:
    """Return the label map of the first image, with the parts that are painted."""
    scene = sample(EXAMPLE)
    labels = np.zeros_like(scene.labels)
    for label, name in enumerate(PAINTED, start=1):
        labels[scene.labels == 1 + scenes.PARTS[DOMAIN].index(name)] = label
    return labels


def painted_sample() -> Image.Image:
    """Return the first image as the painter shows it."""
    tinted = overlay(sample(EXAMPLE).image, painted_labels(), default_palette(len(PAINTED)), PAINTED)
    return Image.fromarray(tinted)


def painting() -> str:
    """Return the text that SLiMe Part Painter saves when the parts of the first image are painted."""
    labels = painted_labels()
    colors = default_palette(len(PAINTED))
    saved = {
        "version": 1,
        "image": {"name": EXAMPLE, "subfolder": "", "type": "input"},
        "parts": [{"name": n, "color": "#" + bytes(c).hex()} for n, c in zip(PAINTED, colors, strict=True)],
        "width": SIDE,
        "height": SIDE,
        "runs": encode_runs(labels),
    }
    return json.dumps(saved)
