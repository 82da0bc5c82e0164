"""Write example_workflows/*.json from the node schemas of a running server, so that they cannot disagree.

COMFYUI_DIR=... python -m demo.make_workflows
"""

from __future__ import annotations

import json
from typing import Any

from .server import ComfyServer
from .workflows import FOLDER, to_editor

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


def learn_and_segment() -> tuple[dict[str, Any], ...]:
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "3": {"class_type": "SLiMeExample", "inputs": {"image": ["2", 0], "mask": ["2", 1], "names": "part"}},
        "4": {
            "class_type": "SLiMeTrain",
            "inputs": {
                "model": ["1", 0],
                "vae": ["1", 2],
                "clip": ["1", 1],
                "examples": ["3", 0],
                "preset": "instant",
                "steps": 0,
                "learning_rate": 0.0,
                "seed": 0,
            },
        },
        "5": {
            "class_type": "SLiMeSaveEmbeddings",
            "inputs": {"embeddings": ["4", 0], "filename": "my_parts", "overwrite": False},
        },
        "6": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "7": {
            "class_type": "SLiMeSegment",
            "inputs": {
                "model": ["1", 0],
                "vae": ["1", 2],
                "embeddings": ["5", 0],
                "image": ["6", 0],
                "refine": "fast",
                "seed": 0,
            },
        },
        "8": {"class_type": "SLiMeOverlay", "inputs": {"parts": ["7", 0], "opacity": 0.55, "legend": True}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
        "10": {
            "class_type": "SLiMePartMask",
            "inputs": {
                "parts": ["7", 0],
                "names": "",
                "mode": "argmax",
                "threshold": 0.5,
                "grow": 0,
                "feather": 0,
                "invert": False,
            },
        },
        "11": {"class_type": "MaskToImage", "inputs": {"mask": ["10", 0]}},
        "12": {"class_type": "PreviewImage", "inputs": {"images": ["11", 0]}},
    }
    layout = {
        "1": (0, 0, 330, 110),
        "2": (0, 170, 330, 340),
        "3": (370, 170, 300, 330),
        "4": (710, 0, 340, 560),
        "5": (1090, 0, 300, 110),
        "6": (1090, 170, 330, 340),
        "7": (1460, 0, 300, 400),
        "8": (1800, 0, 280, 300),
        "9": (2110, 0, 330, 300),
        "10": (1800, 350, 280, 380),
        "11": (2110, 350, 200, 40),
        "12": (2110, 440, 330, 300),
    }
    notes = [
        (
            "## 1. Teach\n\nLoad an image, right-click it, **Open in MaskEditor**, paint the part, save, name it.\n\n"
            "More parts of the same image, or more images: chain further *SLiMe Example* nodes through *previous*.",
            (0, 560, 330, 190),
        ),
        (
            "## 2. Learn\n\n*instant* takes seconds. The file goes to `models/slime` and can be shared: it fits every "
            "checkpoint of the same family (SD1.x, SD2.x or SDXL).",
            (710, 610, 340, 150),
        ),
        (
            "## 3. Find\n\nLoad any other image and queue. *SLiMe Part Mask* gives a mask for inpainting.",
            (1090, 560, 330, 120),
        ),
    ]
    titles = {"2": "Load Image: the example, with its mask", "6": "Load Image: where to look"}
    return prompt, layout, notes, titles  # type: ignore[return-value]


def part_inpaint() -> tuple[dict[str, Any], ...]:
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "SLiMeLoadEmbeddings", "inputs": {"filename": "my_parts.safetensors"}},
        "3": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "4": {
            "class_type": "SLiMeSegment",
            "inputs": {
                "model": ["1", 0],
                "vae": ["1", 2],
                "embeddings": ["2", 0],
                "image": ["3", 0],
                "refine": "fast",
                "seed": 0,
            },
        },
        "5": {
            "class_type": "SLiMePartMask",
            "inputs": {
                "parts": ["4", 0],
                "names": "",
                "mode": "argmax",
                "threshold": 0.5,
                "grow": 6,
                "feather": 0,
                "invert": False,
            },
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo, red"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "8": {"class_type": "VAEEncode", "inputs": {"pixels": ["3", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["8", 0], "mask": ["5", 0]}},
        "10": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["9", 0],
                "seed": 1,
                "steps": 20,
                "cfg": 6.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 0.9,
            },
        },
        "11": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["1", 2]}},
        "12": {
            "class_type": "ImageCompositeMasked",
            "inputs": {
                "destination": ["3", 0],
                "source": ["11", 0],
                "x": 0,
                "y": 0,
                "resize_source": False,
                "mask": ["5", 0],
            },
        },
        "13": {"class_type": "SaveImage", "inputs": {"images": ["12", 0], "filename_prefix": "slime_inpaint"}},
    }
    layout = {
        "1": (0, 0, 330, 110),
        "2": (0, 170, 330, 80),
        "3": (0, 310, 330, 340),
        "4": (370, 0, 300, 400),
        "5": (710, 0, 280, 400),
        "6": (370, 460, 300, 120),
        "7": (370, 630, 300, 120),
        "8": (710, 460, 200, 60),
        "9": (1030, 0, 220, 60),
        "10": (1030, 120, 300, 280),
        "11": (1370, 0, 200, 60),
        "12": (1370, 120, 260, 160),
        "13": (1670, 0, 380, 420),
    }
    notes = [
        (
            "## Change one part\n\nRun *Learn and segment* first, then press R so that the file appears here.\n\n"
            "Name the part in *SLiMe Part Mask* (empty takes all parts), write what it shall become, and queue.",
            (0, 700, 330, 180),
        ),
    ]
    return prompt, layout, notes, {}  # type: ignore[return-value]


WORKFLOWS = {"slime_learn_and_segment": learn_and_segment, "slime_part_inpaint": part_inpaint}


def main() -> None:
    with ComfyServer() as server:
        info = server.get("/object_info")
    FOLDER.mkdir(exist_ok=True)
    for name, make in WORKFLOWS.items():
        prompt, layout, notes, titles = make()
        workflow = to_editor(prompt, layout, info, notes, titles)  # type: ignore[arg-type]
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
