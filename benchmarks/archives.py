"""The paper's data sets: from the archives, as their authors ship them, to the official layout.

The paper and the official code state which annotated parts form a class, that the object's box is cut out (cars,
horses), and that images and label maps stay as they are (faces). Choices that they leave open are made here and listed
in ``OPEN``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slime import SlimeError

from .sources import OFFICIAL_PARTS

OPEN = (
    "PASCAL-Part: which images are left out (here: objects whose box is smaller than 50 pixels, and objects without "
    "any of the parts), the margin around the box (none), one picture an object; where annotated parts overlap, the "
    "later class of the paper's list lies on top",
    "PASCAL-Part: training and validation images come from VOC's list train, test images from its list val",
    "CelebAMask-HQ: which images are for testing (here: the last 2,000 numbers)",
    "which images are the one and the ten examples (here: drawn by the seed from the training images)",
)
SMALLEST = 50  # minimum side of a box, in pixels
FACES_FOR_TESTING = 2000
TRAINING_IMAGES, VALIDATION_IMAGES = 30, 20  # to write; the ten examples of a seed are drawn from the first
# Annotated part, without its number -> class. PASCAL-Part's part2ind.m names the parts.
PASCAL: Mapping[str, Mapping[str, str]] = {
    "car": {
        **dict.fromkeys((a + "side" for a in ("front", "left", "right", "back", "roof")), "body"),
        **dict.fromkeys(("leftmirror", "rightmirror", "door"), "body"),
        **dict.fromkeys(("headlight", "taillight"), "light"),
        **dict.fromkeys(("fliplate", "bliplate"), "plate"),
        "wheel": "wheel",
        "window": "window",
    },
    "horse": {
        **dict.fromkeys(("head", "leye", "reye", "lear", "rear", "muzzle"), "head"),
        **dict.fromkeys(("neck", "torso"), "neck+torso"),
        **dict.fromkeys((a + b + c for a in "lr" for b in "fb" for c in ("uleg", "lleg", "ho")), "leg"),
        "tail": "tail",
    },
}  # fmt: skip
# Later entries lie on top: small parts are also annotated inside larger ones.
CELEBA = {
    "skin": "skin", "neck": "neck", "cloth": "cloth", "hair": "hair", "l_ear": "ear", "r_ear": "ear", "nose": "nose",
    "mouth": "mouth", "u_lip": "mouth", "l_lip": "mouth", "l_brow": "brow", "r_brow": "brow", "l_eye": "eye",
    "r_eye": "eye",
}  # fmt: skip


@dataclass(frozen=True)
class SegmentedImage:
    """One image of a data set.

    Attributes:
        name: file name without suffix.
        test: whether the image is for testing.
        read: returns the image, uint8 [H, W, 3], and its label map [H, W].
    """

    name: str
    test: bool
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


def prepare(archive: Path, data: Path, domains: Sequence[str], limit: int = 0, seed: int = 0) -> dict[str, int]:
    """Write ``data/{car,horse,celeba}/{train_10,val,test}`` from an archive's folder.

    Args:
        archive: folder with ``Annotations_Part`` and ``JPEGImages``, or with ``CelebA-HQ-img`` and
            ``CelebAMask-HQ-mask-anno``, at any depth.
        data: folder in the official layout; domains that exist already are left alone.
        domains: domains to prepare.
        limit: maximum number of test images per domain; 0 for all.
        seed: of the choice of training and validation images.

    Returns:
        Number of test images of every domain that was prepared.

    Raises:
        SlimeError: the folder is neither archive, or a domain has too few objects.
    """
    readers: dict[str, Any] = {}
    if found := _inside(archive, "Annotations_Part"):
        readers = {domain: lambda domain=domain: pascal(found, domain) for domain in PASCAL}
    elif found := _inside(archive, "CelebAMask-HQ-mask-anno"):
        readers = {"celeba": lambda: celeba(found)}
    if not readers:
        raise SlimeError(
            f"{archive} holds neither PASCAL-Part (a folder Annotations_Part beside VOC2010's JPEGImages) nor "
            "CelebAMask-HQ (CelebAMask-HQ-mask-anno beside CelebA-HQ-img). Unpack the archive as its authors ship it."
        )
    counts = {}
    for domain in (one for one in readers if one in domains and not (data / one).exists()):
        pictures = list(readers[domain]())
        known = [picture for picture in pictures if not picture.test]
        tests = [picture for picture in pictures if picture.test][: limit or None]
        if not pictures:
            continue
        if len(known) < 2 or not tests:
            raise SlimeError(f"{archive} has {len(known)} pictures of {domain} to learn from and {len(tests)} to test.")
        drawn = [known[i] for i in np.random.default_rng(seed).permutation(len(known))]
        held = min(VALIDATION_IMAGES, len(known) // 2)
        _write(data / domain / "val", drawn[:held])
        _write(data / domain / "train_10", drawn[held : held + TRAINING_IMAGES])
        _write(data / domain / "test", tests)
        counts[domain] = len(tests)
    return counts


def pascal(annotations: Path, domain: str) -> Iterator[SegmentedImage]:
    """Yield every object of a class of PASCAL-Part, cut out by the box of its mask."""
    from scipy.io import loadmat

    classes, names = PASCAL[domain], OFFICIAL_PARTS[domain]
    images = _beside(annotations, "JPEGImages")
    lists = _beside(annotations, "ImageSets") / "Main"
    testing = set((lists / "val.txt").read_text(encoding="utf-8").split())
    for path in sorted(annotations.glob("*.mat")):
        objects = np.atleast_1d(loadmat(str(path), squeeze_me=True)["anno"]["objects"].item())
        for number, one in enumerate(objects):
            if str(one["class"]) != domain:
                continue
            mask = np.asarray(one["mask"]) > 0
            labels = np.zeros(mask.shape, np.uint8)
            parts = [part for part in np.atleast_1d(one["parts"]) if part.dtype.names]
            known = [(classes.get(str(part["part_name"]).split("_")[0]), part["mask"]) for part in parts]
            for label, name in enumerate(names, start=1):
                for covered in (found for kind, found in known if kind == name):
                    labels[np.asarray(covered) > 0] = label
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            if len(rows) < SMALLEST or len(columns) < SMALLEST or not labels.any():
                continue
            box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            read = partial(_cut, images / f"{path.stem}.jpg", box, labels[box].copy())
            yield SegmentedImage(f"{path.stem}_{number}", path.stem in testing, read)


def _cut(path: Path, box: tuple[slice, slice], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(Image.open(path).convert("RGB"))[box], labels


def celeba(annotations: Path) -> Iterator[SegmentedImage]:
    """Yield every face with the label map of its parts."""
    images = _beside(annotations, "CelebA-HQ-img")
    masks: dict[int, dict[str, Path]] = {}
    for path in annotations.rglob("*.png"):
        written, _, part = path.stem.partition("_")
        masks.setdefault(int(written), {})[part] = path
    first = sorted(masks)[-min(FACES_FOR_TESTING, len(masks) // 2)] if masks else 0
    for number in sorted(masks):
        if set(masks[number]) & set(CELEBA):
            yield SegmentedImage(
                f"{number:05d}", number >= first, partial(_face, images / f"{number}.jpg", masks[number])
            )


def _face(path: Path, masks: Mapping[str, Path]) -> tuple[np.ndarray, np.ndarray]:
    names = OFFICIAL_PARTS["celeba"]
    found = {part: np.asarray(Image.open(masks[part]).convert("L")) > 127 for part in CELEBA if part in masks}
    height, width = next(iter(found.values())).shape
    labels = np.zeros((height, width), np.uint8)
    for part, mask in found.items():
        labels[mask] = 1 + names.index(CELEBA[part])
    picture = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture), labels


def _inside(folder: Path, name: str) -> Path | None:
    return next((path for path in [folder / name, *sorted(folder.rglob(name))] if path.is_dir()), None)


def _beside(folder: Path, name: str) -> Path:
    """Return a folder of that name near another one.

    Raises:
        SlimeError: there is none.
    """
    for parent in folder.parents[:4]:
        if found := _inside(parent, name):
            return found
    raise SlimeError(f"There is no folder {name} near {folder}. Unpack the images beside the annotations.")


def _write(folder: Path, pictures: Sequence[SegmentedImage]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        image, labels = picture.read()
        Image.fromarray(image).save(folder / f"{picture.name}.png")
        np.save(folder / f"{picture.name}.npy", labels)
