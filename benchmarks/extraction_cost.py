"""Measure the cost of extracting features, beside a bare pass of the same model over the same images.

    python dev.py benchmark extraction-cost [--full] [--repeats 7] [--json FILE]

Time is the median of one pass for the default layers, over turns in one process. Bytes are the maximum alive at
once beyond the weights; CUDA's allocator is not asked, so run it on the CPU. Models are the tiny UNet and the tiny flow
transformer, both together, and with ``--full`` DINOv2-L with random weights, alone and beside the UNet.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slime.backbones.base import ExtractionSpec, choose_layers, seeded_noise
from slime.backbones.fused import FusedBackbone
from slime.backbones.text import Context, TextConditioned
from slime.backbones.vit import VisionTransformer
from testing.inprocess import NAME, load_backbone, load_flow
from testing.random_models import random_dinov2
from testing.server import FLOW, MODEL

from .live_bytes import LiveBytes
from .rows import Row, say_row, say_table, write_rows

IMAGES = 2
PROPAGATE = "block.11"  # of an encoder, for which the probe would choose otherwise


def whole_pass(backbone: Any) -> Callable[[], object]:
    """Return the model's own pass over as many images at its own size, as sampling or encoding would run it."""
    side = backbone.info.side
    if isinstance(backbone, VisionTransformer):
        pixels = torch.randn(IMAGES, 3, side, side, device=backbone.device)
        return lambda: backbone.run(pixels)
    cells, level = side // backbone.info.cell, backbone.info.timestep
    noisy = torch.randn(IMAGES, backbone.info.channels, cells, cells, device=backbone.device)
    condition = backbone.condition("")
    if isinstance(backbone, TextConditioned):
        return lambda: backbone.predict_noise(noisy, level, Context.of(condition), None)
    return lambda: backbone.run(noisy, level / 1000, condition, _attend)


def _attend(function: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    return function(*args, **named)


def measure(name: str, models: Sequence[Any], repeats: int) -> Row:
    """Measure one model, or two fused models, whose bare passes run one after the other."""
    backbone = models[0] if len(models) == 1 else FusedBackbone(*models)
    usual = backbone.default_layers()
    layers = usual if usual.propagate else choose_layers(backbone, "", PROPAGATE)
    plan = ExtractionSpec(layers, backbone.condition(""), backbone.info.timestep).to(backbone.device)
    images = torch.rand(IMAGES, backbone.info.side, backbone.info.side, 3).to(backbone.device)
    encoded = backbone.encode_images(images)
    noise = seeded_noise(encoded.shape, 0, encoded.device)
    bare = [whole_pass(model) for model in models]
    turns: dict[str, Callable[[], object]] = {
        "encode": lambda: backbone.encode_images(images),
        "extract": lambda: backbone.extract(encoded, plan, noise),
        "bare": lambda: [run() for run in bare],
    }
    times: dict[str, list[float]] = {turn: [] for turn in turns}
    for _ in range(repeats + 1):
        for turn, work in turns.items():
            start = time.perf_counter()
            work()
            times[turn].append(time.perf_counter() - start)
    row: Row = {"model": name}
    row |= {turn: statistics.median(seen[1:]) / IMAGES for turn, seen in times.items()}  # the first warms up
    for turn in ("extract", "bare"):
        with LiveBytes() as living:
            turns[turn]()
        row[f"{turn} bytes"] = living.peak / IMAGES
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="DINOv2-L as well")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with torch.inference_mode():
        unet, flow = load_backbone(MODEL), load_flow(FLOW)
        combinations = {"tiny UNet": [unet], "tiny flow transformer": [flow], "both": [unet, flow]}
        if options.full:
            clip_vision = random_dinov2()
            adapter = importlib.import_module(f"{NAME}.nodes.comfy_vision")
            combinations["DINOv2-L"] = [adapter.ComfyVision(clip_vision)]
            combinations["tiny UNet and DINOv2-L"] = [unet, adapter.ComfyVision(clip_vision, unet.info.cell)]
        for name, models in combinations.items():
            rows.append(measure(name, models, options.repeats))
            say_row(rows[-1])
            write_rows(options.json, rows)
    head = ["model", "encode", "extract", "bare pass", "extract / bare", "memory of extract", "of a bare pass"]
    say_table(head, (_shown(row) for row in rows), "an image")


def _shown(row: Row) -> list[str]:
    times = [f"{1000 * row[name]:.0f} ms" for name in ("encode", "extract", "bare")]
    held = [f"{row[f'{name} bytes'] / 1e6:.0f} MB" for name in ("extract", "bare")]
    return [row["model"], *times, f"{row['extract'] / row['bare']:.2f}", *held]


if __name__ == "__main__":
    main()
