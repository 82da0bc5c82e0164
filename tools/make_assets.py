"""Draw assets/icon.png and assets/banner.jpg: the example of template 1, and other images segmented with it.

The command is ``python dev.py assets``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from slime import Example, preset, segment, train
from slime.parts.draw import overlay
from slime.parts.palette import default_palette
from testing.inprocess import load_backbone
from testing.server import MODEL

from .samples import EXAMPLE, FIND, FIND_TOO, PAINTED, TESTED, painted_labels, sample

FOLDER = Path(__file__).resolve().parent.parent / "assets"
ICON, BANNER = 400, (1680, 720)  # the registry asks for at most 400 x 400, and for 21:9
DARK, LIGHT = (22, 24, 29), (236, 240, 241)


def tinted(image: np.ndarray, labels: np.ndarray, side: int) -> Image.Image:
    picture = overlay(image, labels, default_palette(len(PAINTED)), opacity=0.6)
    return Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)


def labelled(side: int) -> Image.Image:
    return tinted(sample(EXAMPLE).image, painted_labels(), side)


def found(side: int) -> list[Image.Image]:
    """Return the other images of the templates with the parts that were segmented in them."""
    backbone = load_backbone(MODEL)
    images = np.stack([sample(file).image for file in (FIND, FIND_TOO, TESTED)])
    with torch.inference_mode():
        image, labels = torch.from_numpy(sample(EXAMPLE).image).float() / 255, torch.from_numpy(painted_labels()).long()
        example = Example.from_label_map(image, labels, PAINTED)
        embeddings = train(backbone, [example], preset("instant", backbone.info))
        maps = segment(backbone, torch.from_numpy(images).float() / 255, embeddings)[0]
    return [tinted(image, labels.numpy(), side) for image, labels in zip(images, maps.label_map, strict=True)]


def rounded(picture: Image.Image, radius: int) -> Image.Image:
    """Return the image with round corners on the dark ground."""
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, *picture.size], radius, fill=255)
    ground = Image.new("RGB", picture.size, DARK)
    ground.paste(picture, mask=mask)
    return ground


def icon() -> Image.Image:
    return rounded(labelled(ICON), 72)


def banner() -> Image.Image:
    page = Image.new("RGB", BANNER, DARK)
    draw = ImageDraw.Draw(page)
    draw.text((80, 50), "SLiMe for ComfyUI", font=ImageFont.load_default(84), fill=LIGHT)
    draw.text(
        (84, 160), "Mark parts in one image, find them in others", font=ImageFont.load_default(44), fill=(150, 160, 170)
    )
    side = 400
    page.paste(rounded(labelled(side), 28), (80, 260))
    arrow = np.array([(505, 440), (560, 440), (560, 415), (605, 460), (560, 505), (560, 480), (505, 480)])
    draw.polygon([tuple(point) for point in arrow.tolist()], fill=LIGHT)
    for index, picture in enumerate(found(320)):
        page.paste(rounded(picture, 24), (630 + 340 * index, 300))
    return page


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    icon().save(FOLDER / "icon.png", optimize=True)
    banner().save(FOLDER / "banner.jpg", quality=88)


if __name__ == "__main__":
    main()
