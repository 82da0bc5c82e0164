"""Measure the resident memory that segmenting adds: for a batch, for a stream, and on a server over many prompts.

    python dev.py benchmark memory [--images 200] [--side 1024] [--parts 6] [--stream 1000] [--prompts 300]

A toy UNet extracts features at 512 pixels, as Stable Diffusion does, so that the figures are those of everything but
the model. Every case runs in a process of its own. Its figure is the peak resident memory, less what was resident after
a first image and with all images in memory, less the masks that it returns.

With --prompts, a ComfyUI server on the bundled model runs that many prompts: each trains on a new picture, segments it,
draws it, makes a mask and samples; and a second server runs prompts that only sample. The figures are the resident
memory after every sixth of them. Then a server segments a batch of 200 images of 512 x 512 and draws it; its figure is
the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor

from slime import Example, PartMaps, Segmenter, preset, train
from slime.parts.masks import part_masks
from testing.server import MODEL, ComfyServer
from testing.toy import ToyUNet
from testing.workflows import PromptBuilder

from .rows import say_table

SIDE = 512  # of the model, in pixels
BATCH = 4  # images per batch of a stream
SHORT = 100  # images of the short stream that the long one is compared with
TARGET = 1.0  # GB that a batch may add


def segmenter(parts: int) -> Segmenter:
    """Return a segmenter on a toy UNet, trained on stripes."""
    backbone = ToyUNet(side=SIDE)
    stripes = torch.arange(256).mul(parts + 1).div(256, rounding_mode="floor").expand(256, 256)
    example = Example.from_label_map(torch.rand(256, 256, 3), stripes, [f"part {index}" for index in range(parts)])
    return Segmenter(backbone, train(backbone, [example], preset("instant", views=2)))


def taken(maps: PartMaps) -> tuple[Tensor, Tensor]:
    """Return what a user requests: labels, and the mask of all parts together."""
    return maps.label_map, part_masks(maps)


def batch(count: int, side: int, parts: int) -> float:
    """Return the GB added by segmenting ``count`` images at once."""
    find, images = segmenter(parts), torch.rand(count, side, side, 3)
    taken(find(images[:1]))
    before = resident()
    _, masks = taken(find(images))
    return (peak() - before - masks.nbytes) / 1e9


def stream(count: int, side: int, parts: int) -> float:
    """Return the GB added by segmenting ``count`` images in small batches, one after the other."""
    find = segmenter(parts)

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, BATCH):
            yield torch.rand(min(BATCH, count - start), side, side, 3)

    taken(find(torch.rand(1, side, side, 3)))
    before = resident()
    for maps in map(find, batches()):
        taken(maps)
    return (peak() - before) / 1e9


CASES = {"batch": batch, "stream": stream}


def prompts(count: int, slime: bool) -> dict[int, float]:
    """Run prompts on a server; return the MB that are resident after every sixth of them."""
    megabytes, rng = {}, np.random.default_rng(0)
    with ComfyServer() as server:
        for index in range(1, count + 1):
            builder = sampling(seed=index)
            if slime:
                name = f"{index}.png"
                Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(server.base / "input" / name)
                add_segmenting(builder, name)
            server.run(builder.prompt)
            if index == 1 or index % max(1, count // 6) == 0:
                megabytes[index] = server.resident_bytes() / 1e6
    return megabytes


def peak_of_a_batch(count: int = 200, side: int = 512) -> float:
    """Return the most GB resident while a server segments a batch and draws its overlay."""
    with ComfyServer() as server:
        Image.new("RGB", (256, 256), "red").save(server.base / "input" / "red.png")
        builder = PromptBuilder.of_checkpoint(MODEL.name)
        batch = builder.add("EmptyImage", width=side, height=side, batch_size=count, color=0xC04020)
        add_segmenting(builder, "red.png", [batch, 0])
        prompt_id, most = server.queue(builder.prompt), 0
        while prompt_id not in server.get(f"/history/{prompt_id}"):
            most = max(most, server.resident_bytes())
            time.sleep(0.05)
        server.wait(prompt_id)
    return most / 1e9


def sampling(seed: int) -> PromptBuilder:
    """Return a prompt that samples a picture in 4 steps."""
    builder = PromptBuilder.of_checkpoint(MODEL.name)
    latent = builder.add("EmptyLatentImage", width=256, height=256, batch_size=1)
    sampled = builder.add_sampling("a red car", "a red car", latent, seed, steps=4)
    builder.add("PreviewImage", images=[builder.add("VAEDecode", samples=[sampled, 0], vae=["1", 2]), 0])
    return builder


def add_segmenting(builder: PromptBuilder, image_name: str, others: list[Any] | None = None) -> None:
    """Train on an image, segment it or others, and use the parts."""
    model = {"model": ["1", 0], "vae": ["1", 2]}
    image = builder.add("LoadImage", image=image_name)
    mask = builder.add("ImageToMask", image=[image, 0], channel="red")
    example = builder.add("SLiMeExample", image=[image, 0], mask=[mask, 0], names="red")
    learned = builder.add("SLiMeTrain", **model, clip=["1", 1], examples=[example, 0], seed=0)
    builder.set_training(learned, "instant", views=2)
    parts = builder.add(
        "SLiMeSegment", **model, embeddings=[learned, 0], image=others or [image, 0], refine="fast", seed=0
    )
    builder.add("SLiMeOverlay", parts=[parts, 0], legend=True, opacity=0.5)
    finish = {"mode": "argmax", "threshold": 0.5, "grow": 0, "feather": 0, "invert": False}
    builder.add("MaskPreview", mask=[builder.add("SLiMePartMask", parts=[parts, 0], names="red", **finish), 0])


def resident() -> int:
    """Return the bytes resident now."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Return the most bytes that were ever resident in this process."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # ru_maxrss would count what the starting process held
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def in_own_process(case: str, count: int, side: int, parts: int) -> float:
    """Run a case in a process of its own, and return its figure."""
    numbers = [f"--{name}={value}" for name, value in (("images", count), ("side", side), ("parts", parts))]
    line = [sys.executable, "-m", __spec__.name, "--case", case, *numbers]
    return float(json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="of the batch")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--parts", type=int, default=6)
    parser.add_argument("--stream", type=int, default=1000, help="images of the long stream")
    parser.add_argument("--prompts", type=int, default=0, help="run these on a server, and nothing else")
    parser.add_argument("--case", choices=list(CASES), help="measure in this process, and print GB")
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(json.dumps(CASES[options.case](options.images, options.side, options.parts)))
        return
    if options.prompts:
        ours, core = prompts(options.prompts, slime=True), prompts(options.prompts, slime=False)
        rows = [[str(index), f"{ours[index]:.0f}", f"{core[index]:.0f}"] for index in ours]
        say_table(["prompts", "resident with SLiMe, MB", "sampling only"], rows)
        say_table(
            ["200 images of 512 x 512 on a server", "peak, GB"], [["segment and overlay", f"{peak_of_a_batch():.2f}"]]
        )
        return
    rest = (options.side, options.parts)
    whole = in_own_process("batch", options.images, *rest)
    short, long = (in_own_process("stream", count, *rest) for count in (SHORT, options.stream))
    size = f"{options.side} x {options.side}, {options.parts} parts"
    lines = [
        [f"batch of {options.images}, beside images and masks (at most {TARGET:.0f} GB)", size, f"{whole:.2f}"],
        [f"stream of {SHORT}, {BATCH} at once", size, f"{short:.2f}"],
        [f"stream of {options.stream}, {BATCH} at once", size, f"{long:.2f}"],
        ["the longer stream beyond the shorter one", size, f"{long - short:+.2f}"],
    ]
    say_table(["case", "images", "added, GB"], lines)


if __name__ == "__main__":
    main()
