"""Measure part prompts and the detailer on the tiny model.

    python dev.py benchmark part_prompts [--pictures 6] [--json FILE]

Part prompts: the caption leaves the colour of one part open, and a prompt for that part names one. All methods start
from the same noise. The figures of each method are the share of the part's pixels that have the colour (the nearest of
the twelve that scenes are painted with), the share of the pixels elsewhere that differ from the image of the open
caption by more than a tenth, the time relative to plain sampling, and the share of segmentation in that time. The part
is segmented with reference embeddings, which are trained on ten other examples than the one example that the guider's
embeddings are trained on. Elsewhere means more than 12 pixels from the part in both images.

The detailer gets scenes that are reduced to a quarter and enlarged again. The figures are the IoU of their small parts
with the truth, segmented with the reference embeddings, and the sharpness (mean absolute Laplacian on these parts) of
the blurred image, the redrawn image and the image before blurring.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_dilation, laplace
from torch import Tensor

from slime import PartEmbeddings, segment
from slime.parts.masks import MaskShape, part_masks
from slime.parts.metrics import mean_known
from testing import scenes, splits
from testing.inprocess import NAME
from testing.scenes.painter import COLORS
from testing.server import MODEL

from .faults.nodes import quiet_nodes
from .methods import Variant, trained
from .rows import Row, say_row, say_table, write_rows
from .sources import as_tensor

PARTS = (("car", "wheel"), ("car", "window"), ("horse", "leg"), ("horse", "head"), ("face", "cloth"), ("face", "hair"))
SMALL = (("car", "plate"), ("car", "light"), ("face", "eye"), ("face", "nose"))
STEPS, CFG = 20, 4.0
NEAR = 12  # pixels
SHAPE = MaskShape(grow=8, feather=8)  # the node's defaults


class Timed:
    """The segmenter of a guider, with the time that it has taken."""

    def __init__(self, segmenter: Any) -> None:
        self.segmenter, self.seconds = segmenter, 0.0

    def segment(self, denoised: Tensor, sampled: Any) -> Any:
        start = time.perf_counter()
        maps = self.segmenter.segment(denoised, sampled)
        self.seconds += time.perf_counter() - start
        return maps


class Painting:
    """ComfyUI's sampling with the tiny model; ``segmenting`` is the segmentation time of the last run in seconds."""

    segmenting = 0.0

    def __init__(self, backbone: Any) -> None:
        import comfy.sample
        import comfy.samplers

        self.backbone, self.samplers = backbone, comfy.samplers
        self.prepare_noise = comfy.sample.prepare_noise
        sampling = backbone.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, "karras", STEPS)
        self.nothing = self.prompt("")

    def prompt(self, text: str) -> Any:
        clip = self.backbone.clip
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def guider(self, positive: Any) -> Any:
        guider = self.samplers.CFGGuider(self.backbone.model)
        guider.set_conds(positive, self.nothing)
        guider.set_cfg(CFG)
        return guider

    def paint(self, guider: Any, seed: int) -> Tensor:
        """Sample an image: pixels [1, H, W, 3]."""
        latent = torch.zeros(1, 4, scenes.SIZE // 8, scenes.SIZE // 8)
        sampler = self.samplers.sampler_object("euler")
        noise = self.prepare_noise(latent, seed)
        found = guider.sample(noise, latent, sampler, self.sigmas, disable_pbar=True, seed=seed)
        pixels: Tensor = self.backbone.vae.decode(found)
        return pixels


def captions(domain: str, part: str, seed: int) -> tuple[str, str, str]:
    """Return a scene's caption without the part's colour, the caption with another colour, and that colour's name."""
    scene = scenes.render(domain, seed, style="free")
    words = scenes.PLURAL.get(part, part)
    head, _, place = scene.caption.rpartition(" on ")
    main, _, said = head.partition(" with ")
    rest = [phrase for phrase in said.split(", ") if phrase and not phrase.endswith(f" {words}")]
    taken = {phrase.split()[0] for phrase in [main.removeprefix("a "), *rest]}
    free = [name for name in COLORS if name not in taken]
    color = free[seed % len(free)]
    opened = f"{main} with {', '.join(rest)} on {place}" if rest else f"{main} on {place}"
    return opened, f"{main} with {', '.join([f'{color} {words}', *rest])} on {place}", color


def has_color(pixels: Tensor, name: str) -> np.ndarray:
    """Return bool [H, W]: whether the nearest of the colours is this one."""
    table = torch.tensor(list(COLORS.values())) / 255
    nearest = torch.cdist(pixels[0].reshape(-1, 3), table).argmin(1).reshape(pixels.shape[1:3])
    found: np.ndarray = (nearest == list(COLORS).index(name)).numpy()
    return found


def ways(
    painting: Painting, nodes: Mapping[str, Any], embeddings: PartEmbeddings, part: str, opened: str, full: str
) -> Mapping[str, Any]:
    """Return the methods by name, as functions from a seed to an image.

    Those with the masks of a first sampling sample the open caption first.
    """
    whole, asked = painting.prompt(opened), painting.prompt(full)

    def second(rest: bool) -> Any:
        def paint(seed: int) -> Tensor:
            first = painting.paint(painting.guider(whole), seed)
            mask = part_masks(segment(painting.backbone, first, embeddings)[0], [part], shape=SHAPE)
            inside = [[rows, more | {"mask": mask, "mask_strength": 1.0}] for rows, more in asked]
            outside = [
                [rows, more | {"mask": 1 - mask, "mask_strength": 1.0} if rest else more] for rows, more in whole
            ]
            return painting.paint(painting.guider([*outside, *inside]), seed)

        return paint

    def guided(seed: int) -> Tensor:
        prompts = nodes["SLiMePartPrompt"].execute(embeddings, asked, part).args[0]
        model = painting.backbone.model
        guider = nodes["SLiMePartGuider"].execute(model, whole, painting.nothing, prompts, CFG).args[0]
        guider._segmenter = Timed(guider._segmenter)
        pixels = painting.paint(guider, seed)
        painting.segmenting = guider._segmenter.seconds
        return pixels

    return {
        "open caption": lambda seed: painting.paint(painting.guider(whole), seed),
        "SLiMe Part Guider": guided,
        "the colour in the caption": lambda seed: painting.paint(painting.guider(asked), seed),
        "masks of a first sampling, ConditioningSetMask beside the caption": second(False),
        "masks of a first sampling, ConditioningSetMask in its place": second(True),
    }


def colors(painting: Painting, nodes: Mapping[str, Any], files: Mapping[str, Any], pictures: int, report: Any) -> None:
    """Report the rows of part prompts."""
    for domain, part in PARTS:
        guide, embeddings = files[domain]
        for seed in range(splits.TEST, splits.TEST + pictures):
            opened, full, color = captions(domain, part, seed)
            plain, mask, base = None, None, 1.0
            for name, paint in ways(painting, nodes, guide, part, opened, full).items():
                start, painting.segmenting = time.perf_counter(), 0.0
                pixels = paint(seed)
                seconds = time.perf_counter() - start
                found = part_masks(segment(painting.backbone, pixels, embeddings)[0], [part])[0].numpy() > 0
                if plain is None:
                    plain, mask, base = pixels, found, seconds
                assert mask is not None
                elsewhere = ~binary_dilation(found | mask, iterations=NEAR)
                changed = ((pixels - plain).abs().amax(-1)[0] > 0.1).numpy()
                row: Row = {"way": name, "domain": domain, "part": part, "seed": seed, "asked": full}
                row["colored"] = float(has_color(pixels, color)[found].mean()) if found.any() else None
                row["changed"] = float(changed[elsewhere].mean())
                report(row | {"time": seconds / base, "segmenting": painting.segmenting / seconds})


def details(painting: Painting, nodes: Mapping[str, Any], files: Mapping[str, Any], pictures: int, report: Any) -> None:
    """Report the rows of the detailer."""
    for domain, part in SMALL:
        embeddings = files[domain][1]
        label = scenes.PARTS[domain].index(part) + 1
        for seed in range(splits.TEST, splits.TEST + pictures):
            scene = scenes.render(domain, seed, style="free")
            truth = scene.labels == label
            if not truth.any():
                continue
            sharp = as_tensor([scene.image])
            small = torch.nn.functional.interpolate(sharp.movedim(-1, 1), scale_factor=0.25, mode="area")
            large = torch.nn.functional.interpolate(small, sharp.shape[1:3], mode="bicubic")
            blurred = large.clamp(0, 1).movedim(1, -1)
            maps = segment(painting.backbone, blurred, embeddings)[0]
            parts = importlib.import_module(f"{NAME}.nodes.common").Parts(maps, blurred)
            asked = painting.prompt(scene.caption)
            model, vae = painting.backbone.model, painting.backbone.vae
            drawn = (
                nodes["SLiMePartDetailer"]
                .execute(
                    parts,
                    model,
                    vae,
                    asked,
                    painting.nothing,
                    part,
                    seed,
                    STEPS,
                    CFG,
                    "euler",
                    "karras",
                    size=scenes.SIZE,
                )
                .args[0]
            )
            for name, pixels in (("blurred", blurred), ("SLiMe Part Detailer", drawn), ("never blurred", sharp)):
                found = part_masks(segment(painting.backbone, pixels, embeddings)[0], [part])[0].numpy() > 0
                row: Row = {"way": name, "domain": domain, "part": part, "seed": seed}
                row["iou"] = float((found & truth).sum() / (found | truth).sum())
                edges = np.abs(np.stack([laplace(channel) for channel in pixels[0].movedim(-1, 0).numpy()]))
                report(row | {"sharpness": float(edges[:, truth].mean())})


def table(rows: Sequence[Row], keys: Mapping[str, str], title: str) -> None:
    names = list(dict.fromkeys(row["way"] for row in rows))
    lines = []
    for name in names:
        mine = [row for row in rows if row["way"] == name]
        values = [np.array([[np.nan if row[key] is None else row[key]] for row in mine]) for key in keys]
        lines.append([name, *(f"{mean_known(one)[0]:.3f}" for one in values), str(len(mine))])
    say_table(["", *keys.values(), "pictures"], lines, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=6, help="of every part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        say_row(row)
        write_rows(options.json, rows)

    backbone = trained(MODEL)
    with tempfile.TemporaryDirectory() as folder, quiet_nodes(Path(folder)) as nodes, torch.inference_mode():
        files = {}
        for domain in scenes.DOMAINS:
            labelled = [splits.example(domain, splits.EXAMPLES + index, style="free") for index in range(11)]
            files[domain] = [Variant("instant").fit(backbone, some, 0) for some in (labelled[:1], labelled[1:])]
        painting = Painting(backbone)
        colors(painting, nodes, files, options.pictures, report)
        details(painting, nodes, files, options.pictures, report)
    heads = {
        "colored": "share of the part in the colour",
        "changed": "changed elsewhere",
        "time": "time",
        "segmenting": "of it segmenting",
    }
    table([row for row in rows if "colored" in row], heads, "a colour for one part")
    heads = {"iou": "IoU with the truth", "sharpness": "sharpness"}
    table([row for row in rows if "iou" in row], heads, "small parts redrawn")


if __name__ == "__main__":
    main()
