"""Run the demo: train on one scene (and on ten) in a real ComfyUI server, and segment held-out scenes.

    python dev.py demo                                 the tiny test bed that comes with the repository
    python dev.py demo --checkpoint sd15.safetensors --image car.png --mask wheel=wheel.png --targets photos/

On one scene it trains twice: with the defaults, and as the paper's authors published it. It writes demo_output/:
embeddings, masks, overlays and one grid of images. It prints the IoU beside simple baselines.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from slime import PartEmbeddings, load_embeddings
from slime.examples import Example
from slime.parts.draw import color_labels
from slime.parts.metrics import Scores, evaluate
from slime.parts.palette import default_palette
from testing import scenes, splits
from testing.baselines import color_neighbours, mean_mask
from testing.recipes import PAPER_LAYERS, RECIPES
from testing.server import ROOT, ComfyServer
from testing.tiny.weights import TESTBED, checkpoint_of
from testing.workflows import Prompt, PromptBuilder, find, load_workflow, to_api

OUTPUT = ROOT / "demo_output"
SHOTS = (1, 10)
PUBLISHED, OURS = "SLiMe as published", "SLiMe, defaults"
GRID_COLUMNS = 4
NONE: Mapping[str, Any] = {}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Shot:
    """An example in the server's input folder: the name of its image, and one mask name per part."""

    image: str
    masks: dict[str, str]


def build_prompt(
    template: Prompt,
    checkpoint: str,
    shots: Sequence[Shot],
    targets: Sequence[str],
    name: str,
    seed: int = 0,
    preset: str = "instant",
    train_settings: Mapping[str, Any] = NONE,
    segment_changes: Mapping[str, Any] = NONE,
) -> tuple[Prompt, list[tuple[str, str]]]:
    """Build the prompt of the bundled workflow with these examples and every target.

    ``train_settings`` are inputs of the preset's settings node.

    Returns:
        The prompt, and for every target the ids of the nodes that save its overlay and its label map.
    """
    builder = PromptBuilder(template)
    prompt = builder.prompt
    prompt[find(prompt, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = checkpoint
    train = find(prompt, "SLiMeTrain")
    builder.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename=name, overwrite=True)
    prompt[train]["inputs"]["seed"] = seed
    builder.set_training(train, preset, **train_settings)
    segment = find(prompt, "SLiMeSegment")
    # The examples and the targets replace the template's own examples and target.
    removed = {node_id for node_id, node in prompt.items() if node["class_type"] in ("SLiMeExample", "LoadImage")}
    chain = None
    for shot in shots:
        chain = builder.add_examples(shot.image, shot.masks, chain)
    prompt[train]["inputs"]["examples"] = chain
    kept = {key: value for key, value in prompt[segment]["inputs"].items() if key != "image"} | dict(segment_changes)
    removed |= _after(prompt, segment) | {segment}
    results = []
    for target in targets:
        image = builder.add("LoadImage", image=target)
        parts = builder.add("SLiMeSegment", **kept, image=[image, 0])
        overlay = builder.add("SLiMeOverlay", parts=[parts, 0], opacity=0.55, legend=True)
        results.append(
            (
                builder.add("SaveImage", images=[overlay, 0], filename_prefix="overlay"),
                builder.add("SaveImage", images=[overlay, 1], filename_prefix="labels"),
            )
        )
    for node_id in removed:
        del prompt[node_id]
    return prompt, results


def _after(prompt: Prompt, node_id: str) -> set[str]:
    """Return the ids of the nodes that depend on ``node_id``."""
    direct = {
        other
        for other, node in prompt.items()
        if any(isinstance(value, list) and value[0] == node_id for value in node["inputs"].values())
    }
    return direct.union(*(_after(prompt, other) for other in direct)) if direct else set()


def put_image(server: ComfyServer, name: str, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(server.base / "input" / name)
    return name


def put_example(server: ComfyServer, name: str, example: Example) -> Shot:
    """Write an example's image and masks into the server's input folder."""
    image = put_image(server, f"{name}.png", (example.image.numpy() * 255).round().astype(np.uint8))
    masks = {}
    for index, part in enumerate(example.names, start=1):
        inside = (example.labels.numpy() == index).astype(np.uint8) * 255
        if inside.any():
            file = f"{name}_{re.sub(r'[^a-z0-9]+', '_', part)}.png"
            masks[part] = put_image(server, file, np.repeat(inside[..., None], 3, -1))
    return Shot(image, masks)


def read_labels(png: bytes, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the label map of an image in its exact colours."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    labels = np.zeros(pixels.shape[:2], np.int64)
    for index, color in enumerate(palette, start=1):
        labels[(pixels == np.array(color)).all(-1)] = index
    return labels


def learn_and_find(
    server: ComfyServer,
    template: Prompt,
    checkpoint: str,
    shots: Sequence[Shot],
    targets: Sequence[str],
    name: str,
    folder: Path,
    preset: str = "instant",
    train_settings: Mapping[str, Any] = NONE,
    segment_changes: Mapping[str, Any] = NONE,
) -> tuple[PartEmbeddings, list[np.ndarray], float]:
    """Queue one prompt and write its results to ``folder``; return embeddings, label maps and seconds."""
    prompt, nodes = build_prompt(
        template,
        checkpoint,
        shots,
        targets,
        name,
        preset=preset,
        train_settings=train_settings,
        segment_changes=segment_changes,
    )
    start = time.monotonic()
    outputs = server.run(prompt, 1800)
    seconds = time.monotonic() - start
    for sub in ("overlays", "masks"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    saved = server.base / "models" / "slime" / f"{name}.safetensors"
    shutil.copy(saved, folder / f"{name}.safetensors")
    embeddings = load_embeddings(saved)
    found = []
    for target, (overlay_node, label_node) in zip(targets, nodes, strict=True):
        stem = Path(target).stem
        (folder / "overlays" / f"{stem}.png").write_bytes(server.output_image(outputs[overlay_node]["images"][0]))
        png = server.output_image(outputs[label_node]["images"][0])
        (folder / "masks" / f"{stem}.png").write_bytes(png)
        found.append(read_labels(png, embeddings.palette))
    return embeddings, found, seconds


def row(label: str, scores: Scores, names: Sequence[str]) -> str:
    parts = "  ".join(f"{name} {value:.2f}" for name, value in zip(names, scores.per_class[1:], strict=True))
    return f"  {label:<34} part mIoU {scores.part_miou:.3f}   {parts}"


def run_scenes(server: ComfyServer, template: Prompt, count: int, domains: Sequence[str]) -> None:
    """Run the test bed on rendered scenes of every domain."""
    with checkpoint_of(TESTBED) as whole:
        checkpoint = server.add_checkpoint(whole)
    blocks: list[np.ndarray] = []
    means: dict[str, list[float]] = {}
    for domain in domains:
        names = scenes.PARTS[domain]
        tests = [scenes.render(domain, splits.TEST + i, style=scenes.NATURAL) for i in range(count)]
        targets = [put_image(server, f"{domain}_test_{i}.png", scene.image) for i, scene in enumerate(tests)]
        truths = [scene.labels for scene in tests]
        rows = [tinted([scene.image for scene in tests]), tinted(truths, names)]
        for shots in SHOTS:
            examples = [splits.example(domain, splits.EXAMPLES + i, style=scenes.NATURAL) for i in range(shots)]
            given = [put_example(server, f"{domain}_example_{i}", example) for i, example in enumerate(examples)]
            recipes = {PUBLISHED: papers_recipe(domain), OURS: {}} if shots == 1 else {OURS: {}}
            results: dict[str, Sequence[np.ndarray]] = {}
            seconds = {}
            for method, changes in recipes.items():
                name = f"{domain}_{shots}_shot" + ("_paper" if method == PUBLISHED else "")
                _, results[method], seconds[method] = learn_and_find(
                    server, template, checkpoint, given, targets, name, OUTPUT / name, **changes
                )
                rows.append(tinted(results[method], names))
            results["mean mask"] = [mean_mask(examples)] * count
            results["colour and position neighbours"] = color_neighbours(examples, [scene.image for scene in tests])
            say(f"{domain}, learned from {shots} image{'s' if shots > 1 else ''}, {count} held-out scenes:")
            for method, predictions in results.items():
                scores = evaluate(predictions, truths, len(names) + 1)
                time_taken = f" ({seconds[method]:.0f} s in all)" if method in seconds else ""
                say(row(method + time_taken, scores, names))
                means.setdefault(f"{shots}-shot {method}", []).append(scores.part_miou)
        blocks.append(np.vstack(rows))
    Image.fromarray(np.hstack(blocks)).save(OUTPUT / "grid.png")
    say("Mean over the domains:")
    for label, values in means.items():
        say(f"  {label:<40} part mIoU {np.mean(values):.3f}")
    say(f"Pictures: {OUTPUT / 'grid.png'} (rows: image, truth, {PUBLISHED} and {OURS} from one image, from ten)")


def papers_recipe(domain: str) -> dict[str, Any]:
    """Return the settings of the paper's authors for these parts, as inputs of the nodes."""
    recipe = RECIPES[scenes.PARTS[domain]]
    return {
        "preset": "paper",
        "train_settings": PAPER_LAYERS | recipe["train"],
        "segment_changes": {"refine": "off"} | recipe["segment"],
    }


def tinted(pictures: Sequence[np.ndarray], names: Sequence[str] = ()) -> np.ndarray:
    """Return a row of the grid: images, or label maps of these parts in their colours."""
    shown = list(pictures)[:GRID_COLUMNS]
    return np.hstack([color_labels(labels, default_palette(len(names))) for labels in shown] if names else shown)


def run_own(server: ComfyServer, template: Prompt, options: argparse.Namespace) -> None:
    """Run the user's checkpoint, image and masks."""
    checkpoint = server.add_checkpoint(options.checkpoint)
    image = np.asarray(Image.open(options.image).convert("RGB"))
    masks = {}
    for index, text in enumerate(options.mask, start=1):
        part, _, file = text.rpartition("=")
        part = part or (f"part {index}" if len(options.mask) > 1 else "part")
        pixels = np.asarray(
            Image.open(file).convert("L").resize((image.shape[1], image.shape[0]), Image.Resampling.NEAREST)
        )
        masks[part] = put_image(server, f"own_mask_{index}.png", np.repeat(pixels[..., None], 3, -1))
    files = sorted(path for path in Path(options.targets).iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"There is no picture in {options.targets}.")
    targets = []
    for path in files:
        targets.append(put_image(server, f"target_{path.name}.png", np.asarray(Image.open(path).convert("RGB"))))
    shot = Shot(put_image(server, "own_example.png", image), masks)
    folder = OUTPUT / "own"
    _, _, seconds = learn_and_find(server, template, checkpoint, [shot], targets, "own", folder)
    overlays = [Image.open(path) for path in sorted((folder / "overlays").glob("*.png"))]
    tiles = [np.asarray(picture.convert("RGB").resize((320, 320))) for picture in overlays]
    tiles += [np.zeros((320, 320, 3), np.uint8)] * (-len(tiles) % GRID_COLUMNS)
    rows = [np.hstack(tiles[i : i + GRID_COLUMNS]) for i in range(0, len(tiles), GRID_COLUMNS)]
    Image.fromarray(np.vstack(rows)).save(OUTPUT / "grid.png")
    say(f"Learned {', '.join(masks)} and segmented {len(targets)} pictures in {seconds:.0f} s: {OUTPUT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=12, help="held-out scenes a domain (default 12)")
    parser.add_argument("--domains", nargs="+", choices=scenes.DOMAINS, default=list(scenes.DOMAINS))
    parser.add_argument("--checkpoint", type=Path, help="your own Stable Diffusion checkpoint")
    parser.add_argument("--image", type=Path, help="with --checkpoint: the picture to learn from")
    parser.add_argument(
        "--mask", action="append", default=[], metavar="NAME=FILE", help="white where the part is; repeatable"
    )
    parser.add_argument("--targets", type=Path, help="with --checkpoint: folder of pictures to segment")
    options = parser.parse_args()
    own = [options.checkpoint, options.image, options.mask or None, options.targets]
    if any(own) and not all(own):
        parser.error("--checkpoint, --image, --mask and --targets belong together")
    torch.manual_seed(0)
    OUTPUT.mkdir(exist_ok=True)
    start = time.monotonic()
    say("starting ComfyUI ...")
    with ComfyServer() as server:
        version = server.get("/system_stats")["system"]["comfyui_version"]
        say(f"ComfyUI {version} answers at {server.address}")
        template = to_api(load_workflow("2 Train on masks of several images"), server.get("/object_info"))
        if options.checkpoint:
            run_own(server, template, options)
        else:
            run_scenes(server, template, options.scenes, options.domains)
        say(f"done in {time.monotonic() - start:.0f} s; everything is in {OUTPUT}")


if __name__ == "__main__":
    main()
