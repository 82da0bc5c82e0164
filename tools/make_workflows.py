"""Write example_workflows/*.json from the node schemas of a running server, so that they cannot disagree.

    python dev.py workflows [--pictures]

With ``--pictures`` every workflow is run on the demo model as well, and its result becomes the thumbnail beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from testing.server import ComfyServer
from testing.workflows import FOLDER, SUBGRAPHS, Prompt, blueprint, to_editor

from .run_workflows import results, thumbnail

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
PICTURE = "example.png"
Box = tuple[int, int, int, int]
Link = list[Any]


class Page:
    """A workflow being written: nodes with their boxes (x, y, width, height), notes and titles."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}
        self.layout: dict[str, Box] = {}
        self.notes: list[tuple[str, Box]] = []
        self.titles: dict[str, str] = {}

    def add(self, kind: str, box: Box, title: str = "", **inputs: Any) -> str:
        """Widgets that are not named keep the node's defaults."""
        node = str(len(self.prompt) + 1)
        self.prompt[node] = {"class_type": kind, "inputs": inputs}
        self.layout[node] = box
        if title:
            self.titles[node] = title
        return node

    def note(self, text: str, box: Box) -> None:
        self.notes.append((text, box))

    # ------------------------------------------------------------------------------------- groups that recur

    def checkpoint(self) -> str:
        return self.add("CheckpointLoaderSimple", (0, 0, 330, 110), ckpt_name=CHECKPOINT)

    def image(self, box: Box, title: str = "") -> str:
        return self.add("LoadImage", box, title, image=PICTURE)

    def train(self, model: str, examples: Link, x: int) -> str:
        """Train and save; returns the node that gives embeddings."""
        train = self.add(
            "SLiMeTrain",
            (x, 0, 340, 560),
            model=[model, 0],
            vae=[model, 2],
            clip=[model, 1],
            examples=examples,
            preset="instant",
        )
        return self.add(
            "SLiMeSaveEmbeddings", (x + 380, 0, 300, 110), embeddings=[train, 0], filename="my_parts", overwrite=False
        )

    def load(self, y: int) -> str:
        return self.add("SLiMeLoadEmbeddings", (0, y, 330, 80), filename="my_parts.safetensors")

    def segment(self, model: str, embeddings: str, image: Link, box: Box) -> str:
        return self.add("SLiMeSegment", box, model=[model, 0], vae=[model, 2], embeddings=[embeddings, 0], image=image)

    def overlay(self, parts: str, x: int, y: int) -> None:
        overlay = self.add("SLiMeOverlay", (x, y, 280, 300), parts=[parts, 0])
        self.add("PreviewImage", (x + 310, y, 330, 300), images=[overlay, 0])

    def mask_preview(self, mask: str, x: int, y: int) -> None:
        self.add("MaskPreview", (x, y, 330, 300), mask=[mask, 0])

    def repaint(self, model: str, image: Link, mask: str, text: str, x: int) -> str:
        """Inpaint inside a mask with the same checkpoint; returns the node that gives the image."""
        positive = self.add("CLIPTextEncode", (x, 460, 300, 120), clip=[model, 1], text=text)
        negative = self.add("CLIPTextEncode", (x, 630, 300, 120), clip=[model, 1], text="")
        encoded = self.add("VAEEncode", (x, 800, 200, 60), pixels=image, vae=[model, 2])
        masked = self.add("SetLatentNoiseMask", (x, 910, 220, 60), samples=[encoded, 0], mask=[mask, 0])
        sampler = self.add(
            "KSampler",
            (x + 340, 460, 300, 280),
            model=[model, 0],
            positive=[positive, 0],
            negative=[negative, 0],
            latent_image=[masked, 0],
            seed=1,
            steps=20,
            cfg=6.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            denoise=0.9,
        )
        decoded = self.add("VAEDecode", (x + 340, 800, 200, 60), samples=[sampler, 0], vae=[model, 2])
        return self.add(
            "ImageCompositeMasked",
            (x + 340, 910, 260, 160),
            destination=image,
            source=[decoded, 0],
            x=0,
            y=0,
            resize_source=False,
            mask=[mask, 0],
        )


def learn_and_segment() -> Page:
    page = Page()
    model = page.checkpoint()
    image = page.image((0, 170, 330, 340), "Load Image: the example, with its mask")
    example = page.add("SLiMeExample", (370, 170, 300, 330), image=[image, 0], mask=[image, 1], names="part")
    embeddings = page.train(model, [example, 0], 710)
    other = page.image((1090, 170, 330, 340), "Load Image: where to look")
    parts = page.segment(model, embeddings, [other, 0], (1460, 0, 300, 400))
    page.overlay(parts, 1800, 0)
    mask = page.add("SLiMePartMask", (1800, 350, 280, 380), parts=[parts, 0], names="")
    page.mask_preview(mask, 2110, 350)
    page.note(
        "## 1. Teach\n\nLoad an image, right-click it, **Open in MaskEditor**, paint the part, save, name it.\n\n"
        "More parts of the same image, or more images: chain further *SLiMe Example* nodes through *previous*.",
        (0, 560, 330, 190),
    )
    page.note(
        "## 2. Learn\n\n*instant* takes seconds. The file goes to `models/slime` and can be shared: it fits every "
        "checkpoint of the same family (SD1.x, SD2.x or SDXL).",
        (710, 610, 340, 150),
    )
    page.note(
        "## 3. Find\n\nLoad any other image and queue. *SLiMe Part Mask* gives a mask for inpainting.",
        (1090, 560, 330, 120),
    )
    return page


def several_parts() -> Page:
    page = Page()
    model = page.checkpoint()
    painter = page.add("SLiMePartPainter", (0, 170, 440, 560), painting="")
    embeddings = page.train(model, [painter, 0], 480)
    other = page.image((860, 170, 330, 340), "Load Image: where to look")
    parts = page.segment(model, embeddings, [other, 0], (1230, 0, 300, 400))
    page.overlay(parts, 1570, 0)
    page.note(
        "## Several parts at once\n\n1. Drop an image on the painter.\n2. Name the first part, paint it; **+** adds "
        "another.\n3. Load an image to look in, and queue.\n\nB brush, E eraser, F fill, [ and ] brush size, Ctrl+Z "
        "undo. Outline a part and fill it: that is fastest.",
        (0, 790, 440, 220),
    )
    return page


def few_shot() -> Page:
    page = Page()
    model = page.checkpoint()
    previous: dict[str, Any] = {}
    for index in range(3):
        image = page.image((380 * index, 170, 330, 340), f"Load Image: example {index + 1}, with its mask")
        example = page.add(
            "SLiMeExample", (380 * index, 560, 330, 330), image=[image, 0], mask=[image, 1], names="part", **previous
        )
        previous = {"previous": [example, 0]}
    embeddings = page.train(model, [example, 0], 1160)
    other = page.image((1540, 170, 330, 340), "Load Image: where to look")
    parts = page.segment(model, embeddings, [other, 0], (1910, 0, 300, 400))
    page.overlay(parts, 2250, 0)
    page.note(
        "## More examples\n\nEvery example is another image with the **same part name**. On the demo scenes part IoU "
        "went from .54 with one example to .64 with five. Choose images that differ: other colours, poses, sizes.",
        (0, 940, 330, 190),
    )
    return page


def segment_batch() -> Page:
    page = Page()
    model = page.checkpoint()
    embeddings = page.load(170)
    first, second = page.image((0, 310, 330, 340)), page.image((370, 310, 330, 340))
    batch = page.add("ImageBatch", (740, 310, 220, 60), image1=[first, 0], image2=[second, 0])
    parts = page.segment(model, embeddings, [batch, 0], (740, 0, 300, 260))
    page.overlay(parts, 1080, 0)
    mask = page.add("SLiMePartMask", (1080, 350, 280, 380), parts=[parts, 0], names="")
    page.mask_preview(mask, 1390, 350)
    page.note(
        "## Many images\n\nAny batch will do, also the frames of a video or a folder loaded by another pack. The masks "
        "come out in the same order. *SLiMe Part List* gives one mask a part instead.",
        (0, 700, 330, 170),
    )
    return page


def part_inpaint() -> Page:
    page = Page()
    model = page.checkpoint()
    embeddings = page.load(170)
    image = page.image((0, 310, 330, 340))
    parts = page.segment(model, embeddings, [image, 0], (370, 0, 300, 400))
    mask = page.add("SLiMePartMask", (710, 0, 280, 400), parts=[parts, 0], names="", grow=6)
    result = page.repaint(model, [image, 0], mask, "a photo, red", 370)
    page.add("SaveImage", (1050, 460, 380, 420), images=[result, 0], filename_prefix="slime_inpaint")
    page.note(
        "## Change one part\n\nRun *Learn and segment* first, then press R so that the file appears here.\n\n"
        "Name the part in *SLiMe Part Mask* (empty takes all parts), write what it shall become, and queue.",
        (0, 700, 330, 180),
    )
    return page


def edit_two_parts() -> Page:
    page = Page()
    model = page.checkpoint()
    embeddings = page.load(170)
    image = page.image((0, 310, 330, 340))
    parts = page.segment(model, embeddings, [image, 0], (370, 0, 300, 400))
    first = page.add("SLiMePartMask", (710, 0, 280, 400), "Mask of the first part", parts=[parts, 0], names="wheel")
    second = page.add("SLiMePartMask", (1390, 0, 280, 400), "Mask of the second part", parts=[parts, 0], names="window")
    once = page.repaint(model, [image, 0], first, "a photo, golden", 370)
    twice = page.repaint(model, [once, 0], second, "a photo, blue", 1050)
    page.add("SaveImage", (1730, 460, 380, 420), images=[twice, 0], filename_prefix="slime_two_parts")
    page.note(
        "## Two parts, two prompts\n\nThe image is looked at once; each *SLiMe Part Mask* takes one part of the "
        "result. Write the parts' names as you gave them when you taught them; *Embeddings Info* lists them.",
        (0, 700, 330, 200),
    )
    return page


def video() -> Page:
    page = Page()
    model = page.checkpoint()
    embeddings = page.load(170)
    clip = page.add("LoadVideo", (0, 310, 330, 120), file="video.mp4")
    frames = page.add("GetVideoComponents", (0, 480, 250, 80), video=[clip, 0])
    parts = page.segment(model, embeddings, [frames, 0], (370, 0, 300, 400))
    steady = page.add("SLiMeSteadyParts", (370, 450, 300, 120), parts=[parts, 0])
    overlay = page.add("SLiMeOverlay", (710, 0, 280, 300), parts=[steady, 0])
    made = page.add("CreateVideo", (1030, 0, 280, 110), images=[overlay, 0], fps=[frames, 2])
    page.add("SaveVideo", (1030, 160, 330, 400), video=[made, 0], filename_prefix="video/slime")
    page.note(
        "## Video\n\nAll frames share the noise, and *SLiMe Steady Parts* lets neighbouring frames vote where the "
        "picture stands still. *SLiMe Part Mask* behind it gives a mask for each frame.",
        (0, 610, 330, 160),
    )
    return page


def evaluate_and_share() -> Page:
    page = Page()
    model = page.checkpoint()
    embeddings = page.load(170)
    image = page.image((0, 310, 330, 340), "Load Image: a test image, with its true mask")
    parts = page.segment(model, embeddings, [image, 0], (370, 0, 300, 400))
    table = page.add("SLiMeEvaluate", (710, 0, 300, 200), parts=[parts, 0], truth=[image, 1], names="part")
    page.add("PreviewImage", (1050, 0, 330, 300), images=[table, 2])
    page.add("SLiMeEmbeddingsInfo", (370, 450, 300, 200), embeddings=[embeddings, 0])
    page.add("SLiMeEmbeddingsToText", (710, 450, 300, 200), embeddings=[embeddings, 0])
    page.note(
        "## Check before sharing\n\nPaint the true mask of a part in an image that was **not** an example; *SLiMe "
        "Evaluate* says how well it is found.\n\nTo share, send the file in `models/slime`, or copy the text into an "
        "*Embeddings from Text* node: then the workflow needs no file at all.",
        (0, 700, 330, 220),
    )
    return page


WORKFLOWS: dict[str, Callable[[], Page]] = {
    "slime_learn_and_segment": learn_and_segment,
    "slime_several_parts": several_parts,
    "slime_few_shot": few_shot,
    "slime_segment_batch": segment_batch,
    "slime_part_inpaint": part_inpaint,
    "slime_edit_two_parts": edit_two_parts,
    "slime_video": video,
    "slime_evaluate_and_share": evaluate_and_share,
}


def learn_blueprint() -> dict[str, Any]:
    page = Page()
    example = page.add("SLiMeExample", (0, 0, 300, 200), names="part")
    train = page.add("SLiMeTrain", (340, 0, 340, 560), examples=[example, 0], preset="instant")
    saved = page.add("SLiMeSaveEmbeddings", (720, 0, 300, 110), embeddings=[train, 0], filename="my_parts")
    return {
        "prompt": page.prompt,
        "layout": page.layout,
        "inputs": {
            "model": [(train, "model")],
            "vae": [(train, "vae")],
            "clip": [(train, "clip")],
            "image": [(example, "image")],
            "mask": [(example, "mask")],
        },
        "outputs": {"embeddings": (saved, 0), "preview": (train, 2)},
        "widgets": [(example, "names"), (train, "preset"), (saved, "filename")],
    }


def segment_blueprint() -> dict[str, Any]:
    page = Page()
    parts = page.add("SLiMeSegment", (0, 0, 300, 400))
    mask = page.add("SLiMePartMask", (340, 0, 280, 400), parts=[parts, 0], names="")
    overlay = page.add("SLiMeOverlay", (340, 450, 280, 300), parts=[parts, 0])
    return {
        "prompt": page.prompt,
        "layout": page.layout,
        "inputs": {name: [(parts, name)] for name in ("model", "vae", "embeddings", "image")},
        "outputs": {"mask": (mask, 0), "overlay": (overlay, 0), "parts": (parts, 0)},
        "widgets": [(mask, "names"), (mask, "grow"), (mask, "feather"), (parts, "refine")],
    }


BLUEPRINTS = {"SLiMe_learn_parts": learn_blueprint, "SLiMe_segment_and_mask": segment_blueprint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="run every workflow and write its thumbnail")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    SUBGRAPHS.mkdir(exist_ok=True)
    with ComfyServer() as server:
        info = server.get("/object_info")
        for name, make in WORKFLOWS.items():
            page = make()
            workflow = to_editor(page.prompt, page.layout, info, page.notes, page.titles)
            (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
        for name, describe in BLUEPRINTS.items():
            text = json.dumps(blueprint(name, **describe(), object_info=info), indent=1)
            (SUBGRAPHS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        if options.pictures:
            for name, pictures in results(server, list(WORKFLOWS)).items():
                thumbnail(pictures).save(FOLDER / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
