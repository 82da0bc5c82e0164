"""Sources of examples and test images: rendered scenes, or folders in the official data layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from slime import Example, SlimeError
from testing import scenes, splits

# Label ids of the official data sets; 0 is the background.
OFFICIAL_PARTS = {**scenes.PARTS, "celeba": scenes.PARTS["face"]}
OFFICIAL_SIDE = 512


@dataclass(frozen=True)
class LabelledImages:
    """Labelled test images of one size."""

    images: np.ndarray  # uint8 [B, H, W, 3]
    truths: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Task:
    """One domain: examples, test sets by name, and labelled images to choose a checkpoint by."""

    domain: str
    examples: tuple[Example, ...]
    tests: Mapping[str, LabelledImages]
    validation: tuple[Example, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.examples[0].names


OTHER = "other objects"  # images of the other domains: every part is absent
INK = "another style"  # scenes of the second renderer, never trained on
SETS = (*scenes.VARIATIONS, INK, OTHER)
DETAILS = " details"  # suffix of a domain's name: its parts are those that no caption ever named
SCENE_DOMAINS = (*scenes.DOMAINS, *(domain + DETAILS for domain in scenes.DOMAINS))


def scene_task(
    domain: str,
    shots: int,
    seed: int,
    count: int,
    split: str,
    sets: Sequence[str] = ("plain",),
    style: str = scenes.WORLD,
) -> Task:
    """Render a task; every seed has examples of its own, all share the test scenes.

    There are ``count`` plain scenes, and half as many of every other set of ``SETS``. Domains are ``SCENE_DOMAINS``.
    """
    teach = splits.VALIDATION_EXAMPLES if split == "validation" else splits.EXAMPLES
    examples = tuple(scene_example(domain, teach + 100 * seed + i, style) for i in range(shots))
    return Task(domain, examples, {name: scene_set(domain, name, count, split, style) for name in sets})


def scene_example(domain: str, seed: int, style: str) -> Example:
    """Return a scene of a domain, or of its details, as an example."""
    scene = scenes.render(domain.removesuffix(DETAILS), seed, style=style)
    names = scenes.FINE[scene.domain] if domain.endswith(DETAILS) else scenes.PARTS[domain]
    return Example.from_label_map(as_tensor([scene.image])[0], torch.from_numpy(truth_of(scene, domain)), names)


def truth_of(scene: scenes.Scene, domain: str) -> np.ndarray:
    return scene.fine if domain.endswith(DETAILS) else scene.labels


@functools.cache
def scene_set(domain: str, name: str, count: int, split: str, style: str = scenes.WORLD) -> LabelledImages:
    first = splits.VALIDATION if split == "validation" else splits.TEST
    count = count if name == "plain" else max(1, count // 2)
    shown = domain.removesuffix(DETAILS)
    others = [other for other in scenes.DOMAINS if other != shown]
    rendered = [
        scenes.render(
            others[i % len(others)] if name == OTHER else shown,
            first + i,
            scenes.VARIATIONS.get(name, scenes.VARIATIONS["plain"]),
            style="ink" if name == INK else style,
        )
        for i in range(count)
    ]
    truths = [truth_of(scene, domain) for scene in rendered]
    if name == OTHER:
        truths = [np.zeros_like(truth) for truth in truths]
    return LabelledImages(np.stack([scene.image for scene in rendered]), tuple(truths))


def folder_task(root: Path, domain: str, shots: int, seed: int, split: str, limit: int = 0) -> Task:
    """Read a task from ``root/{car,horse,celeba}/{train_1,train_10,val,test}`` with PNG images and NPY label maps.

    This is the official layout. Images are resized to 512 x 512 without keeping their aspect, label maps by nearest
    neighbour, as in the paper. If there are fewer shots than the training folder holds, the seed chooses them.
    ``limit`` is the maximum number of test images; 0 for all.

    Raises:
        SlimeError: a folder is missing or empty, an image has no label map, or there are too few examples.
    """
    names = OFFICIAL_PARTS[domain]
    train = root / domain / ("train_1" if shots == 1 and (root / domain / "train_1").is_dir() else "train_10")
    pairs = read_folder(train)
    if len(pairs) < shots:
        raise SlimeError(f"{train} holds {len(pairs)} labelled images; {shots} are asked for.")
    order = np.random.default_rng(seed).permutation(len(pairs))[:shots]

    def example(image: np.ndarray, labels: np.ndarray) -> Example:
        return Example.from_label_map(torch.from_numpy(image).float() / 255, torch.from_numpy(labels), names)

    tests = read_folder(root / domain / ("val" if split == "validation" else "test"), limit)
    found = LabelledImages(np.stack([image for image, _ in tests]), tuple(labels for _, labels in tests))
    # With one example the official code chooses its checkpoint by that example, else by validation images.
    held = read_folder(root / domain / "val") if shots > 1 and (root / domain / "val").is_dir() else []
    return Task(
        domain, tuple(example(*pairs[i]) for i in order), {"plain": found}, tuple(example(*pair) for pair in held)
    )


def read_folder(folder: Path, limit: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the images uint8 [512, 512, 3] and label maps [512, 512] of a folder, in order of their names."""
    files, side = sorted(folder.glob("*.png"))[: limit or None], OFFICIAL_SIDE
    if not files:
        raise SlimeError(f"There are no PNG images in {folder}.")
    pairs = []
    for path in files:
        labels_path = path.with_suffix(".npy")
        if not labels_path.is_file():
            raise SlimeError(f"{path.name} has no label map {labels_path.name} beside it.")
        labels = np.load(labels_path, allow_pickle=False).astype(np.uint8)
        picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        nearest = Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST)
        pairs.append((np.array(picture), np.array(nearest)))
    return pairs


def as_tensor(images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(images))).float() / 255
