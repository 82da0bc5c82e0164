"""The methods that are compared. A method learns from examples and gives a function from images to label maps."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.baselines import color_neighbours, mean_mask
from demo.inprocess import load_denoiser
from demo.untrained import write_untrained
from slime import PartEmbeddings, SegmentSettings, preset, segment, train
from slime.augment import resize_image, working_size
from slime.examples import Example

from .rivals import feature_neighbours
from .sources import as_tensor

LEARNED = (
    "default",
    "default + zoom",
    "default + absence",
    "default + best",
    "thorough",
    "paper",
    "untrained",
    "feature neighbours",
)
Predict = Callable[[np.ndarray], list[np.ndarray]]  # uint8 [B, H, W, 3] -> label maps
Learn = Callable[[Sequence[Example], int], Predict]


@dataclass(frozen=True)
class Variant:
    """A preset with changes: of training, of the learned embeddings, of their read-out, and of segmentation.

    With ``after_instant`` a trainer through the UNet starts from rows of the instant trainer on the same prompt.
    """

    preset: str
    train: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, Any] = field(default_factory=dict)
    read_out: dict[str, Any] = field(default_factory=dict)
    segment: dict[str, Any] = field(default_factory=dict)
    after_instant: bool = False

    def fit(self, denoiser: Any, examples: Sequence[Example], seed: int) -> PartEmbeddings:
        settings = preset(self.preset, denoiser.family, seed=seed, **self.train)
        start = None
        with torch.inference_mode():
            if self.after_instant:
                prompt = " ".join(["part"] * (len(examples[0].names) + 1))
                quick = preset("instant", denoiser.family, seed=seed, row_groups="shared", prompt=prompt)
                start = dataclasses.replace(train(denoiser, examples, quick), mode="context")
            return train(denoiser, examples, settings, start=start)

    def find(self, denoiser: Any, embeddings: PartEmbeddings, images: np.ndarray, seed: int) -> list[np.ndarray]:
        read_out = dataclasses.replace(embeddings.read_out, **self.read_out)
        changed = dataclasses.replace(embeddings, read_out=read_out, **self.embeddings)
        plain = {"refine": "off"} if read_out.official else {}
        settings = SegmentSettings(**({"seed": seed} | plain | self.segment))
        with torch.inference_mode():
            return list(segment(denoiser, as_tensor(images), changed, settings)[0].label_map.numpy())


class EncodeOnce:
    """A denoiser that keeps the latents of the test images, which serve every method and every seed.

    Nothing else is kept, so that learning is timed with its encoding and segmentation without.
    """

    def __init__(self, denoiser: Any, latents: dict[bytes, torch.Tensor]) -> None:
        self._denoiser, self._latents = denoiser, latents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        found = []
        for image in images:
            key = hashlib.sha256(image.cpu().numpy().tobytes()).digest()
            if key not in self._latents:
                found.append(self._denoiser.encode_images(image[None]))
            else:
                found.append(self._latents[key])
        return torch.cat(found)

    @torch.inference_mode()
    def remember(self, images: torch.Tensor) -> None:
        """Encode images [B, H, W, 3] as segmentation will, and keep their latents."""
        size = working_size(images.shape[1], images.shape[2], self._denoiser.family.working_side)
        for image in resize_image(images, size):
            key = hashlib.sha256(image.cpu().numpy().tobytes()).digest()
            if key not in self._latents:
                self._latents[key] = self._denoiser.encode_images(image[None])


@functools.cache
def latents_of(checkpoint: Path) -> dict[bytes, torch.Tensor]:
    """Remembered latents: the untrained UNet has the same VAE."""
    return {}


@functools.cache
def trained(checkpoint: Path) -> Any:
    """A checkpoint file through ComfyUI's loader, or a folder through diffusers."""
    denoiser = load_pipeline(checkpoint) if checkpoint.is_dir() else load_denoiser(checkpoint)
    return EncodeOnce(denoiser, latents_of(checkpoint))


def load_pipeline(folder: Path) -> Any:
    """A diffusers pipeline's folder, on the GPU where there is one."""
    from diffusers import DiffusionPipeline

    from slime.backends.diffusers import DiffusersDenoiser

    pipeline = DiffusionPipeline.from_pretrained(folder)
    return DiffusersDenoiser.from_pipeline(pipeline.to("cuda" if torch.cuda.is_available() else "cpu"))


@functools.cache
def untrained(checkpoint: Path) -> Any:
    """The same with a UNet as it was before training."""
    raw = write_untrained(checkpoint, Path(tempfile.mkdtemp()) / "untrained.safetensors")
    return EncodeOnce(load_denoiser(raw), latents_of(checkpoint))


def learned(get_denoiser: Callable[[], Any], variant: Variant) -> Learn:
    def learn(examples: Sequence[Example], seed: int) -> Predict:
        embeddings = variant.fit(get_denoiser(), examples, seed)
        return lambda images: variant.find(get_denoiser(), embeddings, images, seed)

    return learn


def make_methods(checkpoint: Path, changes: Variant) -> dict[str, Learn]:
    """Methods by name; ``changes`` apply to the learned ones."""
    ours, raw = functools.partial(trained, checkpoint), functools.partial(untrained, checkpoint)

    def variant(name: str, **segment_changes: Any) -> Variant:
        return dataclasses.replace(changes, preset=name, segment=changes.segment | segment_changes)

    return {
        "default": learned(ours, variant("instant")),
        "default + zoom": learned(ours, variant("instant", zoom=1)),
        "default + absence": learned(ours, variant("instant", min_confidence=0.8)),
        "default + best": learned(ours, variant("instant", flip=True, draws=2, refine="best")),
        "thorough": learned(ours, variant("thorough")),
        "paper": learned(ours, variant("paper")),
        "untrained": learned(raw, variant("instant")),
        "feature neighbours": lambda examples, seed: (
            lambda images: feature_neighbours(ours(), examples, as_tensor(images), seed=seed)
        ),
        "colour neighbours": lambda examples, seed: lambda images: color_neighbours(examples, images),
        "mean mask": lambda examples, seed: lambda images: [mean_mask(examples)] * len(images),
        "all background": lambda examples, seed: lambda images: [np.zeros(images.shape[1:3], int)] * len(images),
    }


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """ "recolor=0" -> {"recolor": 0}; values are JSON, anything else is text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
