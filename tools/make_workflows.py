"""Write example_workflows/*.json from the node schemas of a running server, so that the two always agree.

    python dev.py workflows [--pictures]

With ``--pictures`` the bundled images are rendered, every workflow is run on the tiny model, and its result becomes the
thumbnail beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from testing.server import ComfyServer
from testing.workflows import FOLDER, SUBGRAPHS, Box, Prompt, blueprint, definition, to_editor

from .run_workflows import results, thumbnail
from .samples import CLIP, FIND, FIND_TOO, TESTED, WHEELS, painted_sample, painting, write_samples

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
FLUX, DINO = "flux1-dev-fp8.safetensors", "dinov2-large.safetensors"
# Download address of each file that a workflow names, and the folder of ComfyUI's models that it belongs to.
HUB = "https://huggingface.co/"
SD15 = "Comfy-Org/stable-diffusion-v1-5-archive"
DOWNLOADS = {
    CHECKPOINT: (f"{HUB}{SD15}/resolve/main/{CHECKPOINT}?download=true", "checkpoints"),
    FLUX: (f"{HUB}Comfy-Org/flux1-dev/resolve/main/{FLUX}?download=true", "checkpoints"),
    DINO: (f"{HUB}facebook/dinov2-large/resolve/main/model.safetensors?download=true", "clip_vision"),
}
GAP, TITLE = 50, 40
# Width, height, and the height that a node needs with its images after a run, in the classic canvas and in Nodes 2.0.
SIZES = {
    "CheckpointLoaderSimple": (320, 100, 130),
    "CLIPVisionLoader": (320, 60, 90),
    "LoadImage": (320, 330, 390),
    "LoadVideo": (320, 110, 520),
    "GetVideoComponents": (300, 70, 100),
    "ImageBatch": (300, 50, 80),
    "SLiMePartPainter": (440, 600, 640),
    "SLiMeExample": (320, 340, 480),
    "SLiMeTrain": (340, 430, 540),
    "SLiMeSaveEmbeddings": (340, 220, 330),
    "SLiMeLoadEmbeddings": (340, 220, 330),
    "SLiMeSegment": (340, 510, 660),
    "SLiMePartMask": (340, 480, 620),
    "SLiMeSteadyParts": (340, 330, 480),
    "SLiMeOverlay": (340, 330, 480),
    "SLiMePickLeastSure": (340, 330, 480),
    "SLiMeEvaluate": (400, 330, 480),
    "SLiMeExportLabels": (400, 380, 430),
    "SLiMePartPrompt": (320, 190, 290),
    "SLiMePartGuider": (320, 290, 400),
    "SLiMeGuiderMasks": (320, 330, 440),
    "SLiMePartDetailer": (340, 830, 1100),
    "SLiMePartSegs": (320, 130, 200),
    "DetailerForEach": (340, 640, 900),
    "CLIPTextEncode": (320, 120, 190),
    "RandomNoise": (320, 90, 130),
    "KSamplerSelect": (320, 60, 100),
    "BasicScheduler": (320, 110, 170),
    "EmptyLatentImage": (320, 110, 170),
    "SamplerCustomAdvanced": (280, 110, 160),
    "VAEDecode": (280, 50, 80),
    "CreateVideo": (320, 80, 110),
    "SaveVideo": (340, 330, 420),
    "SaveImage": (400, 440, 520),
}
SUBGRAPH = (340, 300, 360)
Link = list[Any]


class Page:
    """A workflow being written: columns of nodes from left to right, each as wide as its widest node."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}
        self.layout: dict[str, Box] = {}
        self.notes: list[tuple[str, Box]] = []
        self.titles: dict[str, str] = {}
        self.groups: list[tuple[str, tuple[int, int]]] = []
        self.subgraphs: dict[str, dict[str, Any]] = {}
        self.app: tuple[list[tuple[str, str]], list[str]] | None = None  # widgets and results of its app mode
        self._x = self._width = self._y = self.lowest = 0

    def column(self, title: str = "") -> None:
        """Begin a column for the nodes that are added from now on; with a title it also begins a group."""
        if self._width:
            self._x += self._width + GAP
        self._width = self._y = 0
        if title:
            self.groups.append((title, (self._x, 0)))

    def _place(self, width: int, height: int, room: int) -> Box:
        box = (self._x, self._y, width, height)
        self._y += room + TITLE + GAP
        self._width = max(self._width, width)
        self.lowest = max(self.lowest, self._y - GAP)
        return box

    def add(self, kind: str, title: str = "", **inputs: Any) -> str:
        """Add a node; widgets that are not named keep the node's defaults."""
        node = str(len(self.prompt) + 1)
        self.prompt[node] = {"class_type": kind, "inputs": inputs}
        self.layout[node] = self._place(*SIZES.get(kind, SUBGRAPH))
        if title:
            self.titles[node] = title
        return node

    def note(self, text: str, height: int, width: int = 0) -> None:
        width = width or self._width or 320
        self.notes.append((text, self._place(width, height, height)))

    def boxes(self) -> list[tuple[str, Box]]:
        """Return the groups with the boxes around their columns."""
        ends = [x for _, (x, _) in self.groups[1:]] + [self._x + self._width + GAP]
        return [
            (title, (x - 15, -90, end - x - GAP + 30, self.lowest + 105))
            for (title, (x, _)), end in zip(self.groups, ends, strict=True)
        ]

    # ------------------------------------------------------------------------------------- groups that recur

    def checkpoint(self, file: str = CHECKPOINT) -> str:
        return self.add("CheckpointLoaderSimple", ckpt_name=file)

    def image(self, title: str = "", file: str = FIND) -> str:
        return self.add("LoadImage", title, image=file)

    def train(self, model: str, examples: Link) -> str:
        return self.add(
            "SLiMeTrain",
            model=[model, 0],
            vae=[model, 2],
            clip=[model, 1],
            examples=examples,
            preset="instant",
        )

    def save(self, train: str) -> str:
        return self.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename="my_parts", overwrite=False)

    def load(self) -> str:
        return self.add("SLiMeLoadEmbeddings", filename="my_parts.safetensors")

    def segment(self, model: str, embeddings: str, image: Link) -> str:
        return self.add("SLiMeSegment", model=[model, 0], vae=[model, 2], embeddings=[embeddings, 0], image=image)

    def mask(self, parts: str, names: str = "", title: str = "", **more: Any) -> str:
        return self.add("SLiMePartMask", title, parts=[parts, 0], names=names, **more)

    def repaint(self, model: str, image: Link, mask: str, text: str, **sampling: Any) -> str:
        """Add the subgraph that repaints the inside of a mask."""
        kind = f"{REPAINT} {len(self.subgraphs) + 1}"  # each has values of its own
        self.subgraphs[kind] = repaint_part(text, **sampling) | {"key": kind}
        inputs: dict[str, Any] = {
            "model": [model, 0],
            "clip": [model, 1],
            "vae": [model, 2],
            "image": image,
            "mask": [mask, 0],
        }
        return self.add(kind, **inputs)


REPAINT = "Repaint part"


def repaint_part(text: str = "", **sampling: Any) -> dict[str, Any]:
    """Describe a subgraph that inpaints inside a mask with the same checkpoint; outside of it no pixel changes.

    ``sampling`` are widgets of KSampler; the defaults suit Stable Diffusion.
    """
    prompt = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": text}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
        "3": {"class_type": "VAEEncode", "inputs": {}},
        "4": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["3", 0]}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "positive": ["1", 0],
                "negative": ["2", 0],
                "latent_image": ["4", 0],
                "seed": 1,
                "steps": 20,
                "cfg": 6.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 0.9,
            }
            | sampling,
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0]}},
        "7": {
            "class_type": "ImageCompositeMasked",
            "inputs": {"source": ["6", 0], "x": 0, "y": 0, "resize_source": False},
        },
    }
    layout = {
        "1": (0, 0, 320, 120),
        "2": (0, 190, 320, 120),
        "3": (0, 380, 240, 60),
        "4": (0, 510, 240, 60),
        "5": (400, 0, 320, 280),
        "6": (800, 0, 240, 60),
        "7": (800, 130, 280, 160),
    }
    return {
        "name": REPAINT,
        "prompt": prompt,
        "layout": layout,
        "inputs": {
            "model": [("5", "model")],
            "clip": [("1", "clip"), ("2", "clip")],
            "vae": [("3", "vae"), ("6", "vae")],
            "image": [("3", "pixels"), ("7", "destination")],
            "mask": [("4", "mask"), ("7", "mask")],
        },
        "outputs": {"image": ("7", 0)},
        "widgets": [("1", "text"), ("5", "denoise"), ("5", "seed")],
    }


def paint_and_find() -> Page:
    page = Page()
    page.column("1  Example")
    model = page.checkpoint()
    painter = page.add("SLiMePartPainter", painting=painting())
    page.column("2  Train")
    train = page.train(model, [painter, 0])
    page.note(
        "**Choose a checkpoint and press Run.** Three parts are painted already.\n\nThen drop an image of your own on "
        "the painter, name the parts, outline and fill them. The other templates load what is saved here as my_parts.",
        200,
    )
    page.column("3  Segment")
    other = page.image("Load Image: the image to segment")
    parts = page.segment(model, train, [other, 0])
    page.column("4  Use")
    mask = page.mask(parts, "wheel")
    page.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename="my_parts", overwrite=True)
    page.app = (
        [(model, "ckpt_name"), (painter, "painting"), (other, "image"), (mask, "names")],
        [parts, mask],
    )
    return page


def load_image_masks() -> Page:
    page = Page()
    page.column("1  Example")
    model = page.checkpoint()
    image = page.image("Load Image: the example, with its mask", WHEELS[0])
    example = page.add("SLiMeExample", image=[image, 0], mask=[image, 1], names="wheel")
    page.note(
        "Load an image, right-click it, **Open in MaskEditor**, paint the part, save, and name it in *SLiMe Example*.",
        130,
    )
    page.column("2  Train")
    train = page.train(model, [example, 0])
    saved = page.save(train)
    page.note(
        "The file goes to models/slime and can be shared: it fits every checkpoint of the same family (SD1.x, SD2.x or "
        "SDXL).",
        130,
    )
    page.column("3  Segment")
    other = page.image("Load Image: the image to segment")
    parts = page.segment(model, saved, [other, 0])
    page.column("4  Use")
    page.mask(parts, "wheel")
    return page


def several_examples() -> Page:
    page = Page()
    previous: dict[str, Any] = {}
    for index, file in enumerate(WHEELS):
        page.column("1  Examples" if index == 0 else "")
        if index == 0:
            model = page.checkpoint()
        else:
            page.note(
                "Every example is another image with the **same part name**. Choose images that differ: other colours, "
                "poses, sizes."
                if index == 1
                else "On the demo's scenes part IoU went from .56 with one example to .67 with ten.",
                120,
                320,
            )
        image = page.image(f"Load Image: example {index + 1}, with its mask", file)
        example = page.add("SLiMeExample", image=[image, 0], mask=[image, 1], names="wheel", **previous)
        previous = {"previous": [example, 0]}
    page.column("2  Train")
    train = page.train(model, [example, 0])
    saved = page.save(train)
    page.column("3  Segment")
    other = page.image("Load Image: the image to segment")
    page.segment(model, saved, [other, 0])
    return page


def correct_and_teach_again() -> Page:
    page = Page()
    page.column("1  Example")
    model = page.checkpoint()
    painter = page.add("SLiMePartPainter", painting=painting())
    page.column("2  Train")
    train = page.train(model, [painter, 0])
    page.note(
        "Press Run twice. The first run segments the batch, and puts the image with the lowest confidence into the "
        "second painter, with its masks. **Correct them there**, and run again: now both examples train.",
        190,
    )
    page.column("3  Segment")
    first, second = page.image(), page.image(file=FIND_TOO)
    page.column()
    batch = page.add("ImageBatch", image1=[first, 0], image2=[second, 0])
    parts = page.segment(model, train, [batch, 0])
    picked = page.add("SLiMePickLeastSure", parts=[parts, 0], rank=1)
    page.column("4  Correct")
    corrected = page.add(
        "SLiMePartPainter",
        "SLiMe Part Painter: correct the masks",
        painting="",
        initial_masks=[picked, 0],
        previous=[painter, 0],
    )
    page.column("5  Train again")
    again = page.train(model, [corrected, 0])
    page.column("6  Segment again")
    page.segment(model, again, [batch, 0])
    return page


def find_in_two(page: Page) -> tuple[str, str, str, str, str]:
    """Add nodes that segment a batch of two images with saved embeddings.

    Returns:
        The nodes of the model, the embeddings, both images and the parts.
    """
    page.column("1  Load")
    model, embeddings = page.checkpoint(), page.load()
    first, second = page.image(), page.image(file=FIND_TOO)
    page.column("2  Segment")
    batch = page.add("ImageBatch", image1=[first, 0], image2=[second, 0])
    parts = page.segment(model, embeddings, [batch, 0])
    return model, embeddings, first, second, parts


def find_in_one(page: Page, text: str, height: int) -> tuple[str, str, str]:
    """Add nodes that segment an image with saved embeddings, and a note of that height.

    Returns:
        The nodes of the model, the image and the parts.
    """
    page.column("1  Load")
    model, embeddings = page.checkpoint(), page.load()
    image = page.image()
    page.note(text, height)
    page.column("2  Segment")
    return model, image, page.segment(model, embeddings, [image, 0])


def many_images() -> Page:
    page = Page()
    model, embeddings, first, second, parts = find_in_two(page)
    page.note(
        "Any batch will do, also the frames of a video or a folder loaded by another pack. The masks come out in the "
        "same order. *SLiMe Part List* gives one mask a part instead.\n\nTemplate 1 makes the file my_parts.",
        200,
    )
    page.column("3  Use")
    mask = page.mask(parts, "wheel")
    page.app = (
        [(model, "ckpt_name"), (embeddings, "filename"), (first, "image"), (second, "image"), (mask, "names")],
        [parts, mask],
    )
    return page


def label_images() -> Page:
    page = Page()
    parts = find_in_two(page)[-1]
    page.note(
        "In place of the two images: *Load Image Dataset from Folder*, or any batch. For more pictures than memory "
        "holds there is a command line, see the README.\n\nTemplate 1 makes the file my_parts.",
        200,
    )
    page.column("3  Label")
    page.add("SLiMeExportLabels", parts=[parts, 0], format="coco", folder="labels")
    page.note(
        "Images and annotations.json appear in output/labels; *format* says for which tool. Run again with others: "
        "they are added.\n\n*SLiMe Load Annotations* takes a corrected set back as examples.",
        200,
    )
    return page


def repaint_one_part() -> Page:
    page = Page()
    model, image, parts = find_in_one(
        page,
        "Template 1 makes the file my_parts; press R so that it appears here.\n\nName the part in *SLiMe Part Mask* "
        "(empty takes all parts), and write in *Repaint part* what it shall become.",
        200,
    )
    page.column("3  Repaint")
    mask = page.mask(parts, "wheel", grow=6, minimum_area=64)
    page.column()
    result = page.repaint(model, [image, 0], mask, "an orange car with blue wheels")
    page.add("SaveImage", images=[result, 0], filename_prefix="slime_inpaint")
    return page


def repaint_two_parts() -> Page:
    page = Page()
    model, image, parts = find_in_one(
        page,
        "The image is segmented once; each *SLiMe Part Mask* takes one part of the result.\n\nThe file my_parts must "
        "hold both: template 1, with *Save SLiMe Embeddings* behind *SLiMe Train*.",
        190,
    )
    page.column("3  The first part")
    first = page.mask(parts, "wheel", "Mask of the first part", grow=4, minimum_area=64)
    once = page.repaint(model, [image, 0], first, "an orange car with blue wheels")
    page.column("4  The second part")
    second = page.mask(parts, "window", "Mask of the second part", grow=4, minimum_area=64)
    twice = page.repaint(model, [once, 0], second, "an orange car with green windows")
    page.column("5  Result")
    page.add("SaveImage", images=[twice, 0], filename_prefix="slime_two_parts")
    return page


def video() -> Page:
    page = Page()
    page.column("1  Load")
    model, embeddings = page.checkpoint(), page.load()
    clip = page.add("LoadVideo", file=CLIP)
    frames = page.add("GetVideoComponents", video=[clip, 0])
    page.column("2  Segment")
    parts = page.segment(model, embeddings, [frames, 0])
    steady = page.add("SLiMeSteadyParts", parts=[parts, 0])
    page.note(
        "All frames share the noise, and *SLiMe Smooth Video Parts* averages neighbouring frames where nothing "
        "moves. *SLiMe Part Mask* behind it gives a mask for each frame.",
        160,
    )
    page.column("3  See")
    overlay = page.add("SLiMeOverlay", parts=[steady, 0])
    made = page.add("CreateVideo", images=[overlay, 0], fps=[frames, 2])
    page.column()
    page.add("SaveVideo", video=[made, 0], filename_prefix="video/slime")
    return page


def check_and_share() -> Page:
    page = Page()
    page.column("1  Load")
    model, embeddings = page.checkpoint(), page.load()
    image = page.image("Load Image: a test image, with its true mask", TESTED)
    page.note(
        "Paint the true mask of a part in an image that was **not** an example; *SLiMe Evaluate* says how well it is "
        "found.\n\nTo share, send the file in models/slime, or copy the text that *Save SLiMe Embeddings* shows into "
        "the advanced input *text* of *Load SLiMe Embeddings*: then the workflow needs no file at all.",
        220,
    )
    page.column("2  Check")
    parts = page.segment(model, embeddings, [image, 0])
    page.column()
    page.add("SLiMeEvaluate", parts=[parts, 0], ground_truth=[image, 1], names="wheel")
    page.column("3  Share")
    page.add("SLiMeSaveEmbeddings", embeddings=[embeddings, 0], filename="my_parts_to_share", overwrite=True)
    return page


def flow_model() -> Page:
    page = Page()
    page.column("1  Example")
    model = page.checkpoint(FLUX)
    painter = page.add("SLiMePartPainter", painting=painting())
    page.column("2  Train")
    train = page.train(model, [painter, 0])
    page.note(
        "Flux, Chroma, SD3, Qwen-Image, Lumina 2 and Z-Image work too, with the preset **instant**. Where model, "
        "text encoder and VAE are files of their own, load them with the usual nodes.\n\nEmbeddings of one "
        "family do not fit another.",
        200,
    )
    page.column("3  Segment")
    image = page.image()
    parts = page.segment(model, train, [image, 0])
    page.column("4  Repaint")
    mask = page.mask(parts, "wheel", grow=6, minimum_area=64)
    page.column()
    text = "an orange car with blue wheels"
    result = page.repaint(model, [image, 0], mask, text, cfg=1.0, sampler_name="euler", scheduler="simple")
    page.add("SaveImage", images=[result, 0], filename_prefix="slime_flow")
    return page


def vision_encoder() -> Page:
    page = Page()
    page.column("1  Example")
    encoder = page.add("CLIPVisionLoader", clip_name=DINO)
    painter = page.add("SLiMePartPainter", painting=painting())
    page.column("2  Train")
    train = page.add("SLiMeTrain", clip_vision=[encoder, 0], examples=[painter, 0], preset="instant")
    page.note(
        "A vision encoder needs no diffusion model: DINOv2 (its file goes to models/clip_vision), DINOv3 in newer "
        "versions, SigLIP or CLIP.\n\nConnect *model*, *vae* and *clip* of a checkpoint as well, here and in *SLiMe "
        "Segment*, and the features of both are used.",
        200,
    )
    page.column("3  Segment")
    other = page.image("Load Image: the image to segment")
    parts = page.add("SLiMeSegment", clip_vision=[encoder, 0], embeddings=[train, 0], image=[other, 0])
    page.column("4  Use")
    page.mask(parts, "wheel")
    return page


def prompt_a_part() -> Page:
    page = Page()
    page.column("1  Load")
    model, embeddings = page.checkpoint(), page.load()
    page.note(
        "Template 1 makes the file my_parts; press R so that it appears here.\n\nThe wheels are segmented while the "
        "image is sampled, and from then on a prompt of their own applies to them.",
        200,
    )
    page.column("2  Prompts")
    whole = page.add(
        "CLIPTextEncode", "Prompt of the whole image", text="a red car with blue windows on grass", clip=[model, 1]
    )
    text = "a red car with blue windows, yellow wheels on grass"
    part = page.add("CLIPTextEncode", "Prompt of the part", text=text, clip=[model, 1])
    negative = page.add("CLIPTextEncode", "Negative prompt", text="", clip=[model, 1])
    page.column("3  A prompt for a part")
    prompts = page.add("SLiMePartPrompt", embeddings=[embeddings, 0], conditioning=[part, 0], names="wheel")
    guider = page.add(
        "SLiMePartGuider",
        model=[model, 0],
        positive=[whole, 0],
        negative=[negative, 0],
        part_prompts=[prompts, 0],
        cfg=6.0,
    )
    page.column("4  Sampling")
    noise = page.add("RandomNoise", noise_seed=SEED_OF_A_CAR)
    sampler = page.add("KSamplerSelect", sampler_name="dpmpp_2m")
    sigmas = page.add("BasicScheduler", model=[model, 0], scheduler="karras", steps=20, denoise=1.0)
    latent = page.add("EmptyLatentImage", width=512, height=512, batch_size=1)
    page.column()
    sampled = page.add(
        "SamplerCustomAdvanced",
        noise=[noise, 0],
        guider=[guider, 0],
        sampler=[sampler, 0],
        sigmas=[sigmas, 0],
        latent_image=[latent, 0],
    )
    image = page.add("VAEDecode", samples=[sampled, 0], vae=[model, 2])
    page.column("5  Result")
    page.add("SLiMeGuiderMasks", guider=[guider, 0], latent=[sampled, 0])
    page.add("SaveImage", images=[image, 0], filename_prefix="slime_part_prompt")
    return page


REDRAW: dict[str, Any] = {"seed": 1, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.4}


def redraw_prompts(page: Page, model: str) -> list[str]:
    return [page.add("CLIPTextEncode", text=text, clip=[model, 1]) for text in ("an orange car with white wheels", "")]


def sharpen_small_parts() -> Page:
    page = Page()
    model, image, parts = find_in_one(
        page,
        "Template 1 makes the file my_parts; press R so that it appears here.\n\nEvery wheel is cut out, redrawn at "
        "the size the model was made for, and put back.",
        180,
    )
    page.column("3  Prompts")
    positive, negative = redraw_prompts(page, model)
    page.column("4  Redraw")
    drawn = page.add(
        "SLiMePartDetailer",
        parts=[parts, 0],
        model=[model, 0],
        vae=[model, 2],
        positive=[positive, 0],
        negative=[negative, 0],
        names="wheel",
        **REDRAW,
    )
    page.column("5  Result")
    page.add("SaveImage", images=[drawn, 0], filename_prefix="slime_detailer")
    return page


def impact_detailer() -> Page:
    page = Page()
    model, image, parts = find_in_one(
        page,
        "For users of the Impact Pack: its *Detailer (SEGS)* redraws the parts that SLiMe segments. Without that "
        "pack use template 14.\n\nTemplate 1 makes the file my_parts; press R so that it appears here.",
        180,
    )
    page.column("3  Prompts")
    segs = page.add("SLiMePartSegs", parts=[parts, 0], minimum_area=64)
    positive, negative = redraw_prompts(page, model)
    page.column("4  Redraw")
    drawn = page.add(
        DETAILER,
        image=[image, 0],
        segs=[segs, 0],
        model=[model, 0],
        clip=[model, 1],
        vae=[model, 2],
        positive=[positive, 0],
        negative=[negative, 0],
        **REDRAW,
    )
    page.column("5  Result")
    page.add("SaveImage", images=[drawn, 0], filename_prefix="slime_impact_detailer")
    return page


# The Impact Pack's node (7.10), which the server that writes these files does not have. Tested by hand with that pack.
DETAILER = "DetailerForEach"
FOREIGN = {
    DETAILER: {
        "input": {
            "required": {
                "image": ["IMAGE"],
                "segs": ["SEGS"],
                "model": ["MODEL"],
                "clip": ["CLIP"],
                "vae": ["VAE"],
                "guide_size": ["FLOAT", {"default": 512}],
                "guide_size_for": ["BOOLEAN", {"default": True}],
                "max_size": ["FLOAT", {"default": 1024}],
                "seed": ["INT", {"default": 0}],
                "steps": ["INT", {"default": 20}],
                "cfg": ["FLOAT", {"default": 8.0}],
                "sampler_name": [["euler"]],
                "scheduler": [["normal"]],
                "positive": ["CONDITIONING"],
                "negative": ["CONDITIONING"],
                "denoise": ["FLOAT", {"default": 0.5}],
                "feather": ["INT", {"default": 5}],
                "noise_mask": ["BOOLEAN", {"default": True}],
                "force_inpaint": ["BOOLEAN", {"default": True}],
                "wildcard": ["STRING", {"default": "", "multiline": True}],
                "cycle": ["INT", {"default": 1}],
            },
            "optional": {
                "detailer_hook": ["DETAILER_HOOK"],
                "inpaint_model": ["BOOLEAN", {"default": False}],
                "noise_mask_feather": ["INT", {"default": 20}],
                "scheduler_func_opt": ["SCHEDULER_FUNC"],
            },
        },
        "output": ["IMAGE"],
        "output_name": ["IMAGE"],
        "pack": "comfyui-impact-pack",
    }
}
SEED_OF_A_CAR = 4
ENCODER = "11 With DINOv2 alone"  # not run here: there are no weights
IMPACT = "15 Sharpen with the Impact Pack"  # not run here: the pack is not installed
NOT_RUN = (ENCODER, IMPACT)
WORKFLOWS: dict[str, Callable[[], Page]] = {
    "1 Paint parts and find them": paint_and_find,
    "2 Teach with masks from Load Image": load_image_masks,
    "3 Several examples": several_examples,
    "4 Correct and teach again": correct_and_teach_again,
    "5 Many images at once": many_images,
    "6 Repaint one part": repaint_one_part,
    "7 Repaint two parts": repaint_two_parts,
    "8 Video": video,
    "9 Check and share": check_and_share,
    "10 With Flux or SD3": flow_model,
    ENCODER: vision_encoder,
    "12 Label a data set": label_images,
    "13 Prompt a part while sampling": prompt_a_part,
    "14 Sharpen small parts": sharpen_small_parts,
    IMPACT: impact_detailer,
}


def learn_blueprint() -> dict[str, Any]:
    page = Page()
    page.column()
    example = page.add("SLiMeExample", names="part")
    page.column()
    train = page.add("SLiMeTrain", examples=[example, 0], preset="instant")
    page.column()
    saved = page.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename="my_parts")
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
        "description": "Train a part on one image and its mask, and save it.",
    }


def segment_blueprint() -> dict[str, Any]:
    page = Page()
    page.column()
    parts = page.add("SLiMeSegment")
    page.column()
    mask = page.add("SLiMePartMask", parts=[parts, 0], names="")
    overlay = page.add("SLiMeOverlay", parts=[parts, 0])
    return {
        "prompt": page.prompt,
        "layout": page.layout,
        "inputs": {name: [(parts, name)] for name in ("model", "vae", "embeddings", "image")},
        "outputs": {"mask": (mask, 0), "overlay": (overlay, 0), "parts": (parts, 0)},
        "widgets": [(mask, "names"), (mask, "grow"), (mask, "feather"), (parts, "refine")],
        "description": "Segment trained parts in an image, and output one of them as a mask.",
    }


def repaint_blueprint() -> dict[str, Any]:
    described = repaint_part()
    del described["name"]
    return described | {"description": "Paint inside a mask anew; everything else stays as it is, to the pixel."}


BLUEPRINTS = {
    "SLiMe One Shot Learn Parts": learn_blueprint,
    "SLiMe One Shot Find Parts": segment_blueprint,
    "SLiMe Repaint Part": repaint_blueprint,
}


def written(page: Page, info: dict[str, Any]) -> dict[str, Any]:
    """Return the page as ComfyUI saves workflows."""
    made = {name: definition(**described, object_info=info) for name, described in page.subgraphs.items()}
    info = info | FOREIGN
    workflow = to_editor(page.prompt, page.layout, info, page.notes, page.titles, page.boxes(), made)
    for node in workflow["nodes"]:
        if node["type"] in FOREIGN:
            node["properties"]["cnr_id"] = FOREIGN[node["type"]]["pack"]
        for file in set(DOWNLOADS) & {value for value in node.get("widgets_values", []) if isinstance(value, str)}:
            url, folder = DOWNLOADS[file]
            node["properties"]["models"] = [{"name": file, "url": url, "directory": folder}]
    if page.app is not None:
        widgets, outputs = page.app
        shown = {"inputs": [[int(node), name] for node, name in widgets], "outputs": [int(node) for node in outputs]}
        workflow["extra"]["linearData"] = shown
    return workflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="render the pictures, and run every workflow")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    SUBGRAPHS.mkdir(exist_ok=True)
    if options.pictures:
        write_samples()  # the server copies them to its input folder when it starts
    with ComfyServer() as server:
        info = server.get("/object_info")
        for name, make in WORKFLOWS.items():
            text = json.dumps(written(make(), info), indent=1)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for name, describe in BLUEPRINTS.items():
            text = json.dumps(blueprint(name, **describe(), object_info=info), indent=1)
            (SUBGRAPHS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        if options.pictures:
            stories = results(server, [name for name in WORKFLOWS if name not in NOT_RUN])
            stories |= dict.fromkeys(NOT_RUN, [painted_sample()])
            for name, pictures in stories.items():
                thumbnail(pictures).save(FOLDER / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
