"""Write example_workflows/*.json from the node schemas of a running server, so that the two always agree.

    python dev.py workflows [--pictures]

The templates for SAM3 and meshes are written from a ComfyUI that has these (COMFYUI_DIR), the others from one that has
not. With ``--pictures`` the bundled images are rendered, every workflow is run on the tiny model, and its result
becomes the thumbnail beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from testing.server import ComfyServer
from testing.workflows import FOLDER, SUBGRAPHS, Box, Prompt, PromptBuilder, blueprint, definition, to_editor

from .run_workflows import results, thumbnail
from .samples import CLIP, FIND, FIND_TOO, MESH, MESH_CAMERA, TESTED, WHEELS, mesh_painting, painting, write_samples

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
FLUX = "flux1-dev-fp8.safetensors"
SAM3 = "sam3.1_multiplex_fp16.safetensors"
# Download address of each file that a workflow names, and the folder of ComfyUI's models that it belongs to.
HUB = "https://huggingface.co/"
SD15 = "Comfy-Org/stable-diffusion-v1-5-archive"
DOWNLOADS = {
    CHECKPOINT: (f"{HUB}{SD15}/resolve/main/{CHECKPOINT}?download=true", "checkpoints"),
    FLUX: (f"{HUB}Comfy-Org/flux1-dev/resolve/main/{FLUX}?download=true", "checkpoints"),
    SAM3: (f"{HUB}Comfy-Org/sam3.1/resolve/main/checkpoints/{SAM3}?download=true", "checkpoints"),
}
GAP, TITLE = 30, 40
WIDTH, PAINTER = 285, 400  # of a node, and of the painter
# A window of 1280 x 720 shows a template at a zoom at which text is drawn if its nodes take at most this.
MOST = (1660, 890)
# Height when a template opens, and the height to keep free for a node with its images after a run.
SIZES = {
    "CheckpointLoaderSimple": (100, 130),
    "LoadImage": (330, 390),
    "LoadVideo": (110, 520),
    "GetVideoComponents": (70, 100),
    "ImageBatch": (50, 80),
    "SLiMePartPainter": (560, 600),
    "SLiMeExample": (150, 480),
    "SLiMeTrain": (210, 530),
    "SLiMeSaveEmbeddings": (130, 330),
    "SLiMeLoadEmbeddings": (130, 330),
    "SLiMeSegment": (280, 660),
    "SLiMePartMask": (260, 620),
    "SLiMeSteadyParts": (110, 480),
    "SLiMeSegmentVideo": (300, 330),
    "SLiMeVideoMasks": (150, 480),
    "SLiMeLearnSam3Concept": (230, 430),
    "SLiMeSam3Prompt": (110, 130),
    "SLiMeSam3Refine": (180, 560),
    "SLiMeTrackSeeds": (150, 190),
    "SLiMeTracksToParts": (90, 440),
    "SAM3_Detect": (220, 290),
    "SAM3_VideoTrack": (210, 260),
    "Load3DAdvanced": (400, 478),
    "SLiMeMeshViews": (160, 230),
    "SLiMePartsToMesh": (150, 200),
    "MeshToFile3D": (50, 60),
    "Preview3D": (400, 460),
    "MaskPreview": (90, 330),
    "SLiMeOverlay": (110, 480),
    "SLiMeEvaluate": (110, 480),
    "SLiMeExportLabels": (220, 430),
    "SLiMePartPrompt": (190, 290),
    "SLiMePartGuider": (290, 400),
    "SLiMePartDetailer": (610, 1100),
    "CLIPTextEncode": (120, 190),
    "RandomNoise": (90, 130),
    "KSamplerSelect": (60, 100),
    "BasicScheduler": (110, 170),
    "EmptyLatentImage": (110, 170),
    "SamplerCustomAdvanced": (110, 160),
    "VAEDecode": (50, 80),
    "CreateVideo": (80, 110),
    "SaveVideo": (130, 420),
    "SaveImage": (120, 520),
}
SUBGRAPH = (300, 360)
Link = list[Any]


class Page:
    """A workflow being written: columns of nodes from left to right, each as wide as its widest node."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}
        self.layout: dict[str, Box] = {}
        self.notes: list[tuple[str, Box]] = []
        self.titles: dict[str, str] = {}
        self.groups: list[tuple[str, list[Box]]] = []  # titles, and the boxes in them
        self.subgraphs: dict[str, dict[str, Any]] = {}
        self.app: tuple[list[tuple[str, str]], list[str]] | None = None  # widgets and results of its app mode
        self._x = self._width = self._y = 0

    def column(self, title: str = "") -> None:
        """Begin a column for the nodes that are added from now on; with a title it also begins a group."""
        if self._width:
            self._x += self._width + GAP
        self._width = self._y = 0
        if title:
            self.groups.append((title, []))

    def _place(self, width: int, height: int, room: int) -> Box:
        box = (self._x, self._y, width, height)
        self._y += room + TITLE + GAP
        self._width = max(self._width, width)
        if self.groups:
            self.groups[-1][1].append((self._x, box[1], width, room))
        return box

    def add(self, kind: str, title: str = "", **inputs: Any) -> str:
        """Add a node; widgets that are not named keep the node's defaults."""
        node = str(len(self.prompt) + 1)
        self.prompt[node] = {"class_type": kind, "inputs": inputs}
        self.layout[node] = self._place(PAINTER if kind == "SLiMePartPainter" else WIDTH, *SIZES.get(kind, SUBGRAPH))
        if title:
            self.titles[node] = title
        return node

    def note(self, text: str, height: int, width: int = 0) -> None:
        width = width or WIDTH
        self.notes.append((text, self._place(width, height, height)))

    def boxes(self) -> list[tuple[str, Box]]:
        """Return the groups with the boxes around their nodes."""
        found = []
        for title, inside in self.groups:
            left = min(x for x, _, _, _ in inside)
            right = max(x + width for x, _, width, _ in inside)
            bottom = max(y + height for _, y, _, height in inside)
            found.append((title, (left - 12, -90, right - left + 24, bottom + 105)))
        return found

    # ------------------------------------------------------------------------------------- groups that recur

    def checkpoint(self, file: str = CHECKPOINT) -> str:
        return self.add("CheckpointLoaderSimple", ckpt_name=file)

    def image(self, title: str = "", file: str = FIND) -> str:
        return self.add("LoadImage", title, image=file)

    def painter(self, text: str, height: int = 100) -> str:
        """Add a note, and a painter with a painting under it."""
        self.note(text, height, PAINTER)
        return self.add("SLiMePartPainter", painting=painting())

    def train(self, model: str, examples: Link) -> str:
        links: dict[str, Any] = {"model": [model, 0], "vae": [model, 2], "clip": [model, 1], "examples": examples}
        return self.add("SLiMeTrain", **links, preset="instant")

    def save(self, train: str, filename: str) -> str:
        return self.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename=filename, overwrite=True)

    def load(self) -> str:
        return self.add("SLiMeLoadEmbeddings", filename="my_parts.safetensors")

    def saved_parts(self, text: str, height: int = 130) -> tuple[str, str]:
        """Begin with a note, a checkpoint and saved embeddings; return the nodes of these two."""
        self.column("1  Load")
        self.note(text, height)
        return self.checkpoint(), self.load()

    def segment(self, model: str, embeddings: str, image: Link) -> str:
        return self.add("SLiMeSegment", model=[model, 0], vae=[model, 2], embeddings=[embeddings, 0], image=image)

    def mask(self, parts: str, names: str = "", title: str = "", **more: Any) -> str:
        return self.add("SLiMePartMask", title, parts=[parts, 0], names=names, **more)

    def repaint(self, model: str, image: Link, mask: str, text: str) -> str:
        """Add the subgraph that repaints the inside of a mask."""
        self.subgraphs[REPAINT] = repaint_part(text) | {"key": REPAINT}
        links: dict[str, Any] = {
            "model": [model, 0],
            "clip": [model, 1],
            "vae": [model, 2],
            "image": image,
            "mask": [mask, 0],
        }
        return self.add(REPAINT, **links)


# By name: those for any ComfyUI, and those written and tested on a newer one alone, with SAM3 and meshes with colours.
WORKFLOWS: dict[str, Callable[[], Page]] = {}
NEWER_WORKFLOWS: dict[str, Callable[[], Page]] = {}


def template(name: str, newer: bool = False) -> Callable[[Callable[[Page], None]], None]:
    """Register the function that fills the page of a template."""

    def register(fill: Callable[[Page], None]) -> None:
        def make() -> Page:
            page = Page()
            fill(page)
            return page

        (NEWER_WORKFLOWS if newer else WORKFLOWS)[name] = make

    return register


REPAINT = "Repaint part"


def repaint_part(text: str = "") -> dict[str, Any]:
    """Describe a subgraph that inpaints inside a mask with the same checkpoint; outside of it no pixel changes."""
    builder = PromptBuilder({})
    positive, negative = (builder.add("CLIPTextEncode", text=words) for words in (text, ""))
    encoded = builder.add("VAEEncode")
    masked = builder.add("SetLatentNoiseMask", samples=[encoded, 0])
    links = {"positive": [positive, 0], "negative": [negative, 0], "latent_image": [masked, 0]}
    values = {"seed": 1, "steps": 20, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.9}
    sampled = builder.add("KSampler", **links, **values)
    decoded = builder.add("VAEDecode", samples=[sampled, 0])
    builder.add("ImageCompositeMasked", source=[decoded, 0], x=0, y=0, resize_source=False)
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
        "prompt": builder.prompt,
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


@template("1 Paint parts and find them")
def paint_and_find(page: Page) -> None:
    page.column("1  Example")
    painter = page.painter(
        "**Choose a checkpoint and press Run:** three parts are painted already. Then drop an image of your own on the "
        "painter, press the bin, paint and name your parts, and choose one in *SLiMe Part Mask*."
    )
    page.column("2  Train")
    model = page.checkpoint()
    train = page.train(model, [painter, 0])
    page.column("3  Segment")
    other = page.image("Image to segment")
    parts = page.segment(model, train, [other, 0])
    page.column("4  Use")
    page.save(train, "my_parts")
    mask = page.mask(parts, "wheel")
    page.app = ([(model, "ckpt_name"), (painter, "painting"), (other, "image"), (mask, "names")], [parts, mask])


@template("2 Train on masks of several images")
def masks_of_several_images(page: Page) -> None:
    page.column("1  Examples")
    page.note(
        "Needs a checkpoint. For images of your own right-click *Load Image*, **Open in MaskEditor**, paint the part "
        "and save; every example is another image with the **same part name**.",
        110,
    )
    previous: dict[str, Any] = {}
    for index, file in enumerate(reversed(WHEELS)):
        if index:
            page.column()
        image = page.image(f"Example {index + 1}, with its mask", file)
        example = page.add("SLiMeExample", image=[image, 0], mask=[image, 1], names="wheel", **previous)
        previous = {"previous": [example, 0]}
    page.column("2  Train")
    model = page.checkpoint()
    train = page.train(model, [example, 0])
    page.column("3  Segment")
    other = page.image("Image to segment")
    page.segment(model, train, [other, 0])


@template("3 Correct and train again")
def correct_and_train_again(page: Page) -> None:
    page.column("1  Example")
    page.note(
        "Needs a checkpoint. Press Run: the segmented image comes into the painter. **Correct its mask there, and "
        "press Run again:** now both examples train.",
        150,
    )
    image = page.image("Example, with its mask", WHEELS[0])
    example = page.add("SLiMeExample", image=[image, 0], mask=[image, 1], names="wheel")
    page.column("2  Train")
    model = page.checkpoint()
    train = page.train(model, [example, 0])
    page.column("3  Segment")
    other = page.image("Image to correct")
    parts = page.segment(model, train, [other, 0])
    page.column("4  Correct")
    corrected = page.add(
        "SLiMePartPainter",
        "SLiMe Part Painter: correct the mask",
        painting="",
        initial_masks=[parts, 0],
        previous=[example, 0],
    )
    page.column("5  Train and segment again")
    again = page.train(model, [corrected, 0])
    page.segment(model, again, [other, 0])


NEEDS = "Needs my_parts: run template 1 first, and press R."


def find_in_one(page: Page, text: str, file: str = FIND) -> tuple[str, str, str]:
    """Add nodes that segment an image with saved embeddings, and a note.

    Returns:
        The nodes of the model, the image and the parts.
    """
    model, embeddings = page.saved_parts(text)
    page.column("2  Segment")
    image = page.image(file=file)
    return model, image, page.segment(model, embeddings, [image, 0])


@template("4 Segment and label many images")
def many_images(page: Page) -> None:
    model, embeddings = page.saved_parts(
        f"{NEEDS} In place of the two images: *Load Image Dataset from Folder* or any batch; thousands of images go "
        "through the command line."
    )
    page.column()
    first, second = page.image(), page.image(file=FIND_TOO)
    page.column("2  Segment")
    batch = page.add("ImageBatch", image1=[first, 0], image2=[second, 0])
    parts = page.segment(model, embeddings, [batch, 0])
    page.column("3  Use")
    page.add("SLiMeExportLabels", parts=[parts, 0], format="coco", folder="labels")
    mask = page.mask(parts, "wheel")
    page.app = (
        [(model, "ckpt_name"), (embeddings, "filename"), (first, "image"), (second, "image"), (mask, "names")],
        [parts, mask],
    )


@template("5 Repaint a part")
def repaint_a_part(page: Page) -> None:
    model, image, parts = find_in_one(
        page, f"{NEEDS} Name the part in *SLiMe Part Mask*, and write in *Repaint part* what to paint instead."
    )
    page.column("3  Repaint")
    mask = page.mask(parts, "wheel", grow=6, minimum_area=64)
    page.column()
    result = page.repaint(model, [image, 0], mask, "an orange car with blue wheels")
    page.add("SaveImage", images=[result, 0], filename_prefix="slime_inpaint")


@template("8 Video")
def video(page: Page) -> None:
    model, embeddings = page.saved_parts(
        f"{NEEDS} For a mask per frame, connect *SLiMe Part Mask* to *parts* of *SLiMe Smooth Video Parts*."
    )
    page.column()
    clip = page.add("LoadVideo", file=CLIP)
    frames = page.add("GetVideoComponents", video=[clip, 0])
    page.column("2  Segment")
    parts = page.segment(model, embeddings, [frames, 0])
    page.column("3  Smooth and draw")
    steady = page.add("SLiMeSteadyParts", parts=[parts, 0])
    overlay = page.add("SLiMeOverlay", parts=[steady, 0])
    page.column("4  Save")
    made = page.add("CreateVideo", images=[overlay, 0], fps=[frames, 2])
    page.add("SaveVideo", video=[made, 0], filename_prefix="video/slime")


@template("14 Long video")
def long_video(page: Page) -> None:
    model, embeddings = page.saved_parts(
        f"{NEEDS} The video can have any length; after a cancel, Run goes on. *SLiMe Video Masks* loads some "
        "of its frames. Write one of your own parts in *SLiMe Part Mask*.",
        150,
    )
    page.column()
    clip = page.add("LoadVideo", file=CLIP)
    page.column("2  Segment")
    found = page.add(
        "SLiMeSegmentVideo", model=[model, 0], vae=[model, 2], embeddings=[embeddings, 0], video=[clip, 0], name="car"
    )
    page.add("SaveVideo", video=[found, 0], filename_prefix="video/slime")
    page.column("3  Masks of some frames")
    masks = page.add("SLiMeVideoMasks", folder=[found, 1], video=[clip, 0], start=4, count=4)
    page.column()
    page.mask(masks, "wheel")


@template("9 Measure accuracy and share")
def measure_and_share(page: Page) -> None:
    model, embeddings = page.saved_parts(
        f"{NEEDS} The mask of *Load Image* is the true one, of an image that was **not** an example. To share, send "
        "the file in models/slime, or the text of *Save SLiMe Embeddings*.",
        150,
    )
    page.column("2  Measure")
    image = page.image("Test image, with its true mask", TESTED)
    parts = page.segment(model, embeddings, [image, 0])
    page.column()
    page.add("SLiMeEvaluate", parts=[parts, 0], ground_truth=[image, 1], names="wheel")
    page.column("3  Share")
    page.save(embeddings, "my_parts_to_share")


@template("10 Flux and other models")
def flow_model(page: Page) -> None:
    page.column("1  Example")
    painter = page.painter(
        "Needs Flux, Flux.2, Chroma, SD3, Qwen-Image, Lumina 2 or Z-Image. For DINOv2 connect *Load CLIP Vision* to "
        "*clip_vision* of *SLiMe Train* and *SLiMe Segment*, and disconnect model, vae and clip.",
        110,
    )
    page.column("2  Train")
    model = page.checkpoint(FLUX)
    train = page.train(model, [painter, 0])
    page.column("3  Segment")
    image = page.image()
    parts = page.segment(model, train, [image, 0])
    page.column("4  Use")
    page.mask(parts, "wheel")


@template("6 Prompt a part while sampling")
def prompt_a_part(page: Page) -> None:
    model, embeddings = page.saved_parts(
        f"{NEEDS} The wheels are segmented while the image is sampled; from then on a prompt of their own applies to "
        "them. To see where, add *SLiMe Guider Masks*: connect *guider*, and the output of *SamplerCustomAdvanced* to "
        "*latent*.",
        150,
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
    page.add("SaveImage", images=[image, 0], filename_prefix="slime_part_prompt")


REDRAW: dict[str, Any] = {"seed": 1, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.4}


@template("7 Sharpen small parts")
def sharpen_small_parts(page: Page) -> None:
    model, _, parts = find_in_one(
        page,
        f"{NEEDS} Every wheel is cut out, redrawn at the size the model was made for, and put back. With the Impact "
        "Pack: *SLiMe Parts to SEGS* and its *Detailer*.",
    )
    page.column("3  Prompts")
    positive, negative = (
        page.add("CLIPTextEncode", text=text, clip=[model, 1]) for text in ("an orange car with white wheels", "")
    )
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


SEED_OF_A_CAR = 4


@template("11 Learn a SAM3 concept", newer=True)
def learn_a_concept(page: Page) -> None:
    page.column("1  Example")
    painter = page.painter(
        "Needs SAM3.1 and ComfyUI 0.20 or newer. SAM3 finds what a text names; here it learns what you painted, and "
        "*SLiMe SAM3 Prompt* stands in for the text. Experimental."
    )
    page.column("2  Learn")
    sam3 = page.checkpoint(SAM3)
    learned = page.add("SLiMeLearnSam3Concept", model=[sam3, 0], examples=[painter, 0], clip=[sam3, 1])
    page.column("3  Detect")
    prompt = page.add("SLiMeSam3Prompt", embeddings=[learned, 0], name="wheel")
    other = page.image("Image to search")
    found = page.add("SAM3_Detect", model=[sam3, 0], image=[other, 0], conditioning=[prompt, 0])
    page.column("4  Use")
    page.add("MaskPreview", mask=[found, 0])
    page.save(learned, "my_concepts")


@template("12 Refine parts with SAM3", newer=True)
def refine_with_sam3(page: Page) -> None:
    _, _, parts = find_in_one(
        page,
        f"{NEEDS} Needs SAM3.1 and ComfyUI 0.20 or newer. SAM3 sharpens the border of every region; what grows to the "
        "whole object is refused. Experimental.",
    )
    page.column("3  Refine")
    sam3 = page.checkpoint(SAM3)
    refined = page.add("SLiMeSam3Refine", parts=[parts, 0], model=[sam3, 0])
    page.column("4  Use")
    page.mask(refined, "wheel")


@template("13 Follow parts with SAM3", newer=True)
def follow_with_sam3(page: Page) -> None:
    model, embeddings = page.saved_parts(
        f"{NEEDS} Needs SAM3.1 and ComfyUI 0.20 or newer. SAM3 follows the parts from the frame that shows them best, "
        "forwards and backwards. Experimental.",
        150,
    )
    page.column("2  Segment")
    clip = page.add("LoadVideo", file=CLIP)
    frames = page.add("GetVideoComponents", video=[clip, 0])
    page.column()
    parts = page.segment(model, embeddings, [frames, 0])
    seeds = page.add("SLiMeTrackSeeds", parts=[parts, 0])
    page.column("3  Follow")
    sam3 = page.checkpoint(SAM3)
    tracks = [
        page.add(
            "SAM3_VideoTrack", title, images=[seeds, output], model=[sam3, 0], initial_mask=[seeds, 0], max_objects=0
        )
        for title, output in (("SAM3 Video Track forwards", 1), ("SAM3 Video Track backwards", 2))
    ]
    page.column("4  Use")
    named = page.add("SLiMeTracksToParts", parts=[parts, 0], forwards=[tracks[0], 0], backwards=[tracks[1], 0])
    page.add("SLiMeOverlay", parts=[named, 0])


@template("15 Paint one view of a mesh", newer=True)
def parts_of_a_mesh(page: Page) -> None:
    page.column("1  Mesh")
    page.note(
        "Needs ComfyUI 0.33 or newer. Choose a checkpoint and press Run: four parts are painted on the first view. "
        "**For your own GLB file, or other angles:** press the bin of the painter and run; it stops, and shows the "
        "view to paint.",
        105,
    )
    loaded = page.add("Load3DAdvanced", model_file=MESH)
    views = page.add("SLiMeMeshViews", mesh=[loaded, 0], **MESH_CAMERA._asdict())
    page.column("2  Paint one view")
    painter = page.add("SLiMePartPainter", image=[views, 1], painting=mesh_painting())
    page.column("3  Segment all views")
    model = page.checkpoint()
    train = page.train(model, [painter, 0])
    page.column()
    parts = page.segment(model, train, [views, 0])
    found = page.add("SLiMePartsToMesh", parts=[parts, 0], mesh_views=[views, 2], examples=[painter, 0])
    page.column("4  View the result")
    file = page.add("MeshToFile3D", mesh=[found, 0])
    page.add("Preview3D", model_file=[file, 0])


WORKFLOWS = dict(sorted(WORKFLOWS.items(), key=lambda item: int(item[0].split()[0])))


def workflows_for(info: dict[str, Any]) -> dict[str, Callable[[], Page]]:
    """Return the workflows whose files a ComfyUI with these nodes writes: those for newer ones, or all others."""
    return NEWER_WORKFLOWS if "SAM3_Detect" in info else WORKFLOWS


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
        "description": "Segments trained parts in an image and outputs them as a mask: all parts, or those in names.",
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
    workflow = to_editor(page.prompt, page.layout, info, page.notes, page.titles, page.boxes(), made)
    for node in workflow["nodes"]:
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
        made = workflows_for(info)
        for name, make in made.items():
            text = json.dumps(written(make(), info), indent=1)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for name, describe in BLUEPRINTS.items() if made is WORKFLOWS else ():
            text = json.dumps(blueprint(name, **describe(), object_info=info), indent=1)
            (SUBGRAPHS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        if options.pictures:
            for name, pictures in results(server, list(made)).items():
                thumbnail(pictures).save(FOLDER / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
