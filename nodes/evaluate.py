"""SLiMe Evaluate: compare parts with ground-truth masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.examples import check_known, check_names
from ..slime.parts.draw import drawable
from ..slime.parts.metrics import boundary_f, evaluate
from .common import RESULTS, Parts, PartsSocket, as_masks, named_errors, schema, split_names, to_core

ROW, MARGIN, WIDTH, FONT = 26, 12, 460, 15


class SLiMeEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeEvaluate",
            is_output_node=True,
            category=RESULTS,
            display_name="SLiMe Evaluate",
            description="Compares parts with ground-truth masks: intersection over union and boundary F of every part.",
            search_aliases="iou, mask accuracy, compare masks, test segmentation",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment."),
                io.Mask.Input(
                    "ground_truth",
                    tooltip="Ground-truth masks: of one part, one per image; of several, part by part in the order of "
                    "names.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    tooltip="Names of the parts of the masks, separated by commas. Empty = all parts.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="mean_iou", tooltip="Mean over the named parts that the ground truth contains."
                ),
                io.String.Output(display_name="table", tooltip="Markdown table: IoU and boundary F of every part."),
                io.Image.Output(display_name="chart", tooltip="The table as a bar chart."),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, ground_truth: Tensor, names: str = "") -> io.NodeOutput:
        with named_errors("SLiMe Evaluate"):
            rows = part_scores(parts, as_masks(ground_truth), names)
        mean = float(np.mean([iou for _, iou, _ in rows if not math.isnan(iou)]))
        table = as_table(rows, mean)
        chart = torch.from_numpy(np.array(draw_table(rows, mean))).float()[None] / 255
        return io.NodeOutput(mean, table, to_core(chart), ui=ui.PreviewImage(chart, cls=cls))


def part_scores(parts: Parts, truth: torch.Tensor, text: str) -> list[tuple[str, float, float]]:
    """Return name, IoU and boundary F of every named part; NaN where the ground truth does not contain it.

    Raises:
        SlimeError: unknown names, masks that do not fit the images in number or size, or empty masks.
    """
    names = list(check_names(split_names(text) or list(parts.maps.names)))
    check_known(names, parts.maps.names)
    labels = parts.maps.label_map.numpy()
    wanted = len(labels) * len(names)
    if len(truth) != wanted or truth.shape[1:] != labels.shape[1:]:
        raise SlimeError(
            f"{wanted} masks of {labels.shape[2]}x{labels.shape[1]} are needed, for {len(names)} parts "
            f"({', '.join(names)}) in {len(labels)} images, part by part; ground_truth has {len(truth)} of "
            f"{truth.shape[2]}x{truth.shape[1]}. Write in names which parts the masks show, or connect one mask "
            "per part and image in this order."
        )
    rows = []
    for index, name in enumerate(names):
        actual = (truth[index * len(labels) : (index + 1) * len(labels)] > 0.5).numpy().astype(int)
        predicted = (labels == parts.maps.names.index(name) + 1).astype(int)
        iou = float(evaluate(list(predicted), list(actual), 2).per_class[1])
        edges = [boundary_f(a, b, 2) for a, b in zip(predicted, actual, strict=True) if b.any()]
        rows.append((name, iou, float(np.mean(edges)) if edges else math.nan))
    if all(math.isnan(iou) for _, iou, _ in rows):
        raise SlimeError(
            f"ground_truth is empty: no pixel of it belongs to {', '.join(names)}. Connect masks of these parts."
        )
    return rows


def as_table(rows: list[tuple[str, float, float]], mean: float) -> str:
    lines = ["| part | IoU | boundary F |", "|---|---|---|"]
    lines += [f"| {name} | {_number(iou)} | {_number(edge)} |" for name, iou, edge in rows]
    return "\n".join([*lines, f"| mean | {mean:.3f} | |"])


def draw_table(rows: list[tuple[str, float, float]], mean: float) -> Image.Image:
    """Draw name, IoU with a bar, and boundary F of every part."""
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + ROW * (len(rows) + 2)), (30, 30, 34))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT)
    left, right, columns = 150, 290, (MARGIN, 300, 375)
    edges = [edge for _, _, edge in rows if not math.isnan(edge)]
    lines = [(drawable(name[:18], number, FONT), iou, edge) for number, (name, iou, edge) in enumerate(rows, start=1)]
    lines.append((("mean", font), mean, float(np.mean(edges)) if edges else math.nan))

    def write(row: int, named: tuple[str, Any], *texts: str, color: tuple[int, int, int] = (230, 230, 230)) -> int:
        y = MARGIN + row * ROW
        for x, (text, its_font) in zip(columns, (named, *((text, font) for text in texts)), strict=True):
            draw.text((x, y + 3), text, fill=color, font=its_font)
        draw.line((MARGIN, y + ROW - 2, WIDTH - MARGIN, y + ROW - 2), fill=(60, 60, 66))
        return y

    write(0, ("part", font), "IoU", "boundary F", color=(160, 160, 166))
    for row, (named, iou, edge) in enumerate(lines, start=1):
        y = write(row, named, _number(iou), _number(edge))
        draw.rectangle((left, y + 6, right, y + ROW - 8), fill=(60, 60, 66))
        if iou > 0:
            draw.rectangle((left, y + 6, left + (right - left) * iou, y + ROW - 8), fill=(60, 180, 75))
    return image


def _number(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.3f}"
