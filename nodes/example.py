"""SLiMe Example and SLiMe Example from Label Map: an image with the masks of its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional

from ..slime.errors import SlimeError
from ..slime.examples import Example, check_names, merge_examples
from ..slime.parts.draw import legend_below
from ..slime.parts.palette import default_palette
from .common import (
    ADVANCED,
    ExamplesSocket,
    advanced,
    as_images,
    as_masks,
    named_errors,
    overlays,
    save_previews,
    schema,
    show_text,
    split_names,
    to_core,
    to_tensor,
)


def previous_input() -> Any:
    return ExamplesSocket.Input(
        "previous",
        optional=True,
        tooltip="Examples so far. If this image is among them, its parts are added there; otherwise it becomes one "
        "more example.",
    )


class SLiMeExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeExample",
            display_name="SLiMe Example",
            description="One image with masks of the parts to learn. Chain several for more parts or more images.",
            search_aliases="one shot segmentation, part mask, teach segmenter, few shot, similar",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The image to learn from. For a batch, give one name and one mask per image."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the part is. A batch is one mask for each name, in order. A mask of another "
                    "size but the image's proportions is resized.",
                ),
                io.String.Input(
                    "names", default="part", tooltip="Names of the parts, separated by commas: wheel, window"
                ),
                previous_input(),
                advanced(
                    io.Combo.Input(
                        "unlabelled",
                        options=["auto", "background", "ignore"],
                        default="auto",
                        optional=True,
                        tooltip="What pixels without a mask mean. auto, the usual choice: background, or ignore if "
                        "other examples label parts that this one does not. background: no part is there. ignore: not "
                        "used in training; choose it if this image shows parts that you did not mask.",
                    )
                ),
            ],
            outputs=[
                ExamplesSocket.Output(display_name="examples", tooltip="For SLiMe Train or the next SLiMe Example."),
                io.Image.Output(display_name="preview", tooltip="The last image with its parts tinted."),
            ],
            hidden=[io.Hidden.unique_id],
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
            found, remark = _examples(as_images(image), as_masks(mask), check_names(split_names(names)))
            examples = tuple(previous or ())
            for example in found:
                examples = merge_examples(examples, replace(example, unlabelled=unlabelled))
        show_text(getattr(cls.hidden, "unique_id", None), remark)
        return examples_result(cls, examples)


class SLiMeExampleFromLabelMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeExampleFromLabelMap",
            category=ADVANCED,
            display_name="SLiMe Example from Label Map",
            description="One image with a second one that shows each part in its own colour.",
            search_aliases="label map, segmentation map, color mask, few shot",
            inputs=[
                io.Image.Input("image", tooltip="The image to learn from: one image, not a batch."),
                io.Image.Input(
                    "label_map",
                    tooltip="An image of the same size with each part in its own colour. All other colours are "
                    "background.",
                ),
                io.String.Input(
                    "colors",
                    default="wheel = #e6194b\nwindow = #3cb44b",
                    multiline=True,
                    tooltip="One part per line: its name, an equals sign, its colour.",
                ),
                previous_input(),
            ],
            outputs=[
                ExamplesSocket.Output(display_name="examples", tooltip="For SLiMe Train or the next SLiMe Example."),
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
                raise SlimeError(f"There are {len(images)} images and {len(maps)} label maps. Connect one of each.")
            if images.shape != maps.shape:
                raise SlimeError(
                    f"The label map is {maps.shape[2]}x{maps.shape[1]} but the image is "
                    f"{images.shape[2]}x{images.shape[1]}. Resize the label map, with nearest neighbours."
                )
            examples = merge_examples(previous or (), Example.from_colors(images[0], maps[0], parse_colors(colors)))
        return examples_result(cls, examples)


def parse_colors(text: str) -> dict[str, tuple[int, int, int]]:
    """Parse lines such as "wheel = #e6194b" into RGB colours by name."""
    colors: dict[str, tuple[int, int, int]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, color = (word.strip() for word in line.rpartition("="))
        if not name or not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
            raise SlimeError(f'"{line}" is not a part and its colour. Write for example: wheel = #e6194b')
        if name in colors:
            raise SlimeError(f'"{name}" is listed twice. Use one line per part.')
        red, green, blue = bytes.fromhex(color[1:])
        colors[name] = (red, green, blue)
    return colors


def examples_result(cls: type[io.ComfyNode], examples: tuple[Example, ...]) -> io.NodeOutput:
    """Return examples with a preview of the newest one."""
    newest = examples[-1]
    palette = default_palette(len(newest.names))
    picture = next(overlays(newest.image[None], newest.labels[None], palette))
    preview = save_previews(cls, [legend_below(picture, newest.names, palette)])
    return io.NodeOutput(examples, to_core(to_tensor(picture)[None]), ui=preview)


def _examples(images: Tensor, masks: Tensor, names: Sequence[str]) -> tuple[list[Example], str]:
    """Return one example with a mask for each name, or one per image with a mask for the one name; and a remark."""
    if len(images) > 1 and (len(names) > 1 or len(masks) != len(images)):
        raise SlimeError(
            f"There are {len(images)} images, {len(masks)} masks and {len(names)} names ({', '.join(names)}). A batch "
            "of images needs one name and one mask for each image; else chain one SLiMe Example per image."
        )
    if len(images) == 1 and len(masks) != len(names):
        raise SlimeError(
            f"There are {len(masks)} masks for {len(names)} names ({', '.join(names)}). Connect one mask for each "
            "name, as a batch, or chain one SLiMe Example per part."
        )
    (height, width), before = images.shape[1:3], masks.shape[1:]
    remark = ""
    if before != (height, width) and abs(before[0] * width / before[1] - height) <= max(1.0, 0.01 * height):
        masks = functional.interpolate(masks[:, None], (height, width), mode="nearest-exact")[:, 0]
        remark = f"The mask of {before[1]} x {before[0]} was resized to the image's {width} x {height}."
    if len(images) == 1:
        return [Example.from_masks(images[0], dict(zip(names, masks, strict=True)))], remark
    pairs = zip(images, masks, strict=True)
    return [Example.from_masks(image, {names[0]: mask}) for image, mask in pairs], remark
