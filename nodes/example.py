"""SLiMe Example: an image and the masks of its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.examples import Example, check_names, merge_examples
from ..slime.parts.palette import default_palette
from .common import (
    EXPERTS,
    Examples,
    as_images,
    as_masks,
    expert,
    named_errors,
    overlays,
    schema,
    split_names,
    to_core,
    with_legend,
)


def previous_input() -> Any:
    return Examples.Input(
        "previous",
        optional=True,
        tooltip="Another SLiMe Example. The same image adds parts to it, another is one more example.",
    )


class SLiMeExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeExample",
            display_name="SLiMe Example",
            description="One image with the masks of the parts to learn. Chain several for more parts or more images.",
            search_aliases=["one shot segmentation", "part mask", "teach segmenter", "few shot"],
            inputs=[
                io.Image.Input("image", tooltip="The image to learn from; one image, not a batch."),
                io.Mask.Input("mask", tooltip="Where the part is. A batch gives one mask for each name, in order."),
                io.String.Input(
                    "names", default="part", tooltip="Name of each part, separated by commas: wheel, window"
                ),
                previous_input(),
                expert(
                    io.Combo.Input(
                        "unlabelled",
                        options=["auto", "background", "ignore"],
                        default="auto",
                        optional=True,
                        tooltip="What is without a mask. background: no part is there. ignore: nobody knows. auto: "
                        "ignored where other examples label parts that this image does not, else background.",
                    )
                ),
            ],
            outputs=[
                Examples.Output(display_name="examples", tooltip="For SLiMe Train or the next SLiMe Example."),
                io.Image.Output(display_name="preview", tooltip="The images with their parts tinted."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        mask: Tensor,
        names: str,
        previous: Sequence[Example] | None = None,
        unlabelled: str = "auto",
    ) -> io.NodeOutput:
        with named_errors("SLiMe Example"):
            example = replace(_example(image, mask, names), unlabelled=unlabelled)
            examples = merge_examples(previous or (), example)
        return shown(cls, examples)


class SLiMeExampleFromLabelMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeExampleFromLabelMap",
            category=EXPERTS,
            display_name="SLiMe Example from Label Map",
            description="One image with a picture that paints each part in its own colour.",
            search_aliases=["label map", "segmentation map", "color mask", "few shot"],
            inputs=[
                io.Image.Input("image", tooltip="The image to learn from; one image, not a batch."),
                io.Image.Input("label_map", tooltip="Of the same size; every part in one colour, the rest in others."),
                io.String.Input(
                    "colors",
                    default="wheel = #e6194b\nwindow = #3cb44b",
                    multiline=True,
                    tooltip="One part a line: its name, an equals sign, its colour.",
                ),
                previous_input(),
            ],
            outputs=[
                Examples.Output(display_name="examples", tooltip="For SLiMe Train or the next SLiMe Example."),
                io.Image.Output(display_name="preview", tooltip="The image with its parts tinted."),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, label_map: Tensor, colors: str, previous: Sequence[Example] | None = None
    ) -> io.NodeOutput:
        with named_errors("SLiMe Example from Label Map"):
            images, maps = as_images(image), as_images(label_map)
            if len(images) != 1 or len(maps) != 1:
                raise SlimeError(f"got {len(images)} images and {len(maps)} label maps; connect one of each.")
            if images.shape != maps.shape:
                raise SlimeError(
                    f"the label map is {maps.shape[2]}x{maps.shape[1]} but the image is "
                    f"{images.shape[2]}x{images.shape[1]}; they must have the same size."
                )
            examples = merge_examples(previous or (), Example.from_colors(images[0], maps[0], parse_colors(colors)))
        return shown(cls, examples)


def parse_colors(text: str) -> dict[str, tuple[int, int, int]]:
    """ "wheel = #e6194b" lines as names and RGB colours."""
    found: dict[str, tuple[int, int, int]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, color = (piece.strip() for piece in line.rpartition("="))
        if not name or not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
            raise SlimeError(f'"{line}" is not a part and its colour; write for example: wheel = #e6194b')
        if name in found:
            raise SlimeError(f'"{name}" is given twice.')
        red, green, blue = bytes.fromhex(color[1:])
        found[name] = (red, green, blue)
    return found


def shown(cls: type[io.ComfyNode], examples: tuple[Example, ...]) -> io.NodeOutput:
    """Examples with a picture of the newest one."""
    newest = examples[-1]
    palette = default_palette(len(newest.names))
    preview = overlays(newest.image[None], newest.labels[None], palette)
    shown = ui.PreviewImage(with_legend(preview, newest.names, palette), cls=cls)
    return io.NodeOutput(examples, to_core(preview), ui=shown)


def _example(image: torch.Tensor, mask: torch.Tensor, text: str) -> Example:
    images, masks = as_images(image), as_masks(mask)
    names = check_names(split_names(text))
    if len(images) != 1:
        raise SlimeError(
            f"got a batch of {len(images)} images; connect one image, and chain one example for each image."
        )
    if len(masks) != len(names):
        raise SlimeError(
            f"got {len(masks)} masks for {len(names)} names ({', '.join(names)}); give one mask for each name, "
            "for example with a Mask Batch, or chain one SLiMe Example for each part."
        )
    return Example.from_masks(images[0], dict(zip(names, masks, strict=True)))
