"""The methods that are compared. A method trains on examples and returns a function from images to label maps."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from slime import Example, PartEmbeddings, SegmentSettings, preset, segment, train
from slime.backbones.attention import cross_scores
from slime.backbones.base import Backbone
from slime.backbones.fused import FusedBackbone
from slime.decode.linear import LinearDecoder
from slime.images import resize_image, resize_maps, working_size
from slime.paper.decoder import AttentionMaps, PaperDecoder, official_maps, token_maps
from slime.training.cache import clear_caches
from testing import scenes
from testing.baselines import color_neighbours, mean_mask
from testing.inprocess import load_backbone, load_encoder, load_flow
from testing.recipes import PAPER_LAYERS, PAPER_OVERLAP, RECIPES
from testing.server import FLOW
from testing.tiny.untrained import write_untrained

from .feature_baselines import RULES, Bank, FeatureChoice, best_feature_choices
from .sources import as_tensor

EMPTY: Mapping[str, Any] = {}
Predict = Callable[[np.ndarray], list[np.ndarray]]  # uint8 [B, H, W, 3] -> label maps
ENCODER, BESIDE_ENCODER = "encoder", "default beside encoder"
MODEL_FREE = ("colour neighbours", "mean mask")
Learn = Callable[..., Predict]  # of examples, a seed and, if there are any, validation images


@dataclass(frozen=True)
class ChangedDecoder(PaperDecoder):
    """The official decoder with changes to the steps of :func:`slime.paper.decoder.official_maps`.

    Attributes:
        all_tokens: apply the softmax over all tokens of the text, else over the parts alone.
        steps: order, gate, subtract_mean, rescale.
    """

    all_tokens: bool = True
    steps: dict[str, Any] = field(default_factory=dict)

    def decode(self, extracted: AttentionMaps, embeddings: PartEmbeddings, index: int) -> Tensor:
        classes = len(embeddings.names) + 1
        grid = max((a.height, a.width) for a in (*extracted.cross, *extracted.attention))
        if self.all_tokens:
            maps = token_maps(extracted.cross, classes, grid)
        else:
            scores = [resize_maps(cross_scores(a, classes), grid) for a in extracted.cross]
            maps = torch.stack(scores).mean(0).softmax(1)
        return official_maps(maps, extracted.attention, **self.steps)


@dataclass(frozen=True)
class Variant:
    """A preset with changes to the model's properties, the training, the embeddings, their decoding, and segmentation.

    Attributes:
        preset: its name.
        train: training settings.
        info: fields of the backbone's :class:`slime.backbones.base.BackboneInfo` during training.
        embeddings: fields of the embeddings.
        linear: decode any embeddings with :class:`slime.decode.linear.LinearDecoder`.
        segment: segmentation settings.
        constants: values of constants by module and name, such as "paper.train.SD_WEIGHT".
        official: arguments of :class:`ChangedDecoder`, the steps among them; None for the official decoder.
        bgr: exchange red and blue in images, as the official code gives them to the VAE.
    """

    preset: str
    train: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, Any] = field(default_factory=dict)
    linear: bool = False
    segment: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    official: dict[str, Any] | None = None
    bgr: bool = False

    def recipe(self, names: Sequence[str], of: str) -> dict[str, Any]:
        """Return the paper's settings for these parts."""
        return RECIPES[tuple(names)][of] if self.preset == "paper" and tuple(names) in RECIPES else {}

    def fit(
        self, backbone: Backbone, examples: Sequence[Example], seed: int, validation: Sequence[Example] = ()
    ) -> PartEmbeddings:
        recipe = self.recipe(examples[0].names, "train")
        if self.preset == "paper" and backbone.info.id == "tiny":  # its own layers were chosen for the other preset
            recipe = PAPER_LAYERS | recipe
        settings = preset(self.preset, backbone.info, **({"seed": seed} | recipe | self.train))
        if self.bgr:
            examples = [dataclasses.replace(one, image=one.image.flip(-1)) for one in examples]
        clear_caches()  # the time of training includes all of it
        with constants(self.constants), with_info(backbone, self.info), torch.inference_mode():
            return train(backbone, examples, settings, validation=validation)

    def find(self, backbone: Backbone, embeddings: PartEmbeddings, images: np.ndarray, seed: int) -> list[np.ndarray]:
        decoder = LinearDecoder() if self.linear else embeddings.decoder
        if self.official is not None:
            steps = {name: value for name, value in self.official.items() if name != "all_tokens"}
            decoder = ChangedDecoder(self.official.get("all_tokens", True), steps)
        changed = dataclasses.replace(embeddings, decoder=decoder, **self.embeddings)
        plain = {"refine": "off"} if isinstance(decoder, PaperDecoder) else {}
        recipe = self.recipe(embeddings.names, "segment")
        settings = SegmentSettings(**({"seed": seed} | plain | recipe | self.segment))
        images = images[..., ::-1] if self.bgr else images
        overlap = {"extraction.CROP_OVERLAP": PAPER_OVERLAP} if recipe else {}
        with constants(self.constants | overlap), torch.inference_mode():
            return list(segment(backbone, as_tensor(images), changed, settings)[0].label_map.numpy())


@contextmanager
def constants(values: Mapping[str, float]) -> Iterator[None]:
    """Set constants of ``slime``, such as "paper.train.SD_WEIGHT", and restore them."""
    with ExitStack() as stack:
        for path, value in values.items():
            module, _, name = path.rpartition(".")
            stack.enter_context(mock.patch.object(importlib.import_module(f"slime.{module}"), name, value))
        yield


@contextmanager
def with_info(backbone: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """Change properties of a backbone, and restore them."""
    info = backbone.info
    backbone.info = dataclasses.replace(info, **changes)
    try:
        yield
    finally:
        backbone.info = info


class EncodeOnce:
    """A backbone's ``encode_images`` that keeps the latents of the test images for every method and seed.

    Nothing else is kept, so that the time of training includes its encoding and the time of segmentation does not.
    ``encoded`` counts the images that had to be encoded, of all backbones.
    """

    encoded = 0

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], latents: dict[bytes, torch.Tensor]) -> None:
        self._encode, self._latents = encode, latents

    def __call__(self, images: torch.Tensor, keep: bool = False) -> torch.Tensor:
        found = []
        for image in images:
            key = hashlib.sha256(image.cpu().numpy().tobytes()).digest()
            EncodeOnce.encoded += key not in self._latents
            found.append(self._latents[key] if key in self._latents else self._encode(image[None]))
            if keep:
                self._latents[key] = found[-1]
        return torch.cat(found)


@torch.inference_mode()
def remember(backbone: Backbone, images: np.ndarray) -> None:
    """Encode images as segmentation will, and keep their latents if the backbone is of :func:`encode_once`."""
    if isinstance(backbone.encode_images, EncodeOnce):
        size = working_size(images.shape[1], images.shape[2], backbone.info.side, backbone.info.multiple)
        backbone.encode_images(resize_image(as_tensor(images), size).to(backbone.device), keep=True)


@functools.cache
def latents_of(checkpoint: Path) -> dict[bytes, torch.Tensor]:
    """Return the kept latents of a checkpoint; the untrained UNet has the same VAE."""
    return {}


def encode_once(backbone: Any, latents: dict[bytes, torch.Tensor]) -> Any:
    backbone.encode_images = EncodeOnce(backbone.encode_images, latents)
    return backbone


@functools.cache
def trained(checkpoint: Path) -> Any:
    """Load a checkpoint file with ComfyUI's loader, or a folder with diffusers."""
    backbone = load_pipeline(checkpoint) if checkpoint.is_dir() else load_backbone(checkpoint)
    return encode_once(backbone, latents_of(checkpoint))


def load_pipeline(folder: Path) -> Any:
    """Load the folder of a diffusers pipeline, on the GPU if there is one."""
    from diffusers import DiffusionPipeline

    from slime.backbones.hf_unet import DiffusersUNet

    pipeline = DiffusionPipeline.from_pretrained(folder)
    return DiffusersUNet.from_pipeline(pipeline.to("cuda" if torch.cuda.is_available() else "cpu"))


@functools.cache
def untrained(checkpoint: Path) -> Any:
    """Load a checkpoint with its UNet as it was before training."""
    raw = write_untrained(checkpoint, Path(tempfile.mkdtemp()) / "untrained.safetensors")
    return encode_once(load_backbone(raw), latents_of(checkpoint))


Fit = Callable[[Sequence[Example], int, Sequence[Example]], PartEmbeddings]


def fitted(get_backbone: Callable[[], Any], variant: Variant) -> Fit:
    """Return a function that trains a variant; called again for the same examples and seed, it returns what it has."""
    kept: list[tuple[Sequence[Example], int, PartEmbeddings]] = []

    def fit(examples: Sequence[Example], seed: int, validation: Sequence[Example]) -> PartEmbeddings:
        if not (kept and kept[0][0] is examples and kept[0][1] == seed):
            kept[:] = [(examples, seed, variant.fit(get_backbone(), examples, seed, validation))]
        return kept[0][2]

    return fit


def learned(get_backbone: Callable[[], Any], variant: Variant, fit: Fit | None = None) -> Learn:
    fit = fit or fitted(get_backbone, variant)

    def learn(examples: Sequence[Example], seed: int, validation: Sequence[Example] = ()) -> Predict:
        embeddings = fit(examples, seed, validation)
        return lambda images: variant.find(get_backbone(), embeddings, images, seed)

    return learn


def compared(get_backbone: Callable[[], Any], style: str) -> dict[str, Learn]:
    """Return the baselines that compare descriptors; they share the descriptors of the same images."""
    banks: list[tuple[Sequence[Example], int, Bank]] = []
    kept: list[tuple[Bank, np.ndarray, dict[str, list[np.ndarray]]]] = []

    @functools.cache
    def feature_choices() -> dict[str, FeatureChoice]:
        return best_feature_choices(get_backbone(), style)

    def find(bank: Bank, images: np.ndarray) -> dict[str, list[np.ndarray]]:
        if not (kept and kept[0][0] is bank and kept[0][1] is images):
            wanted = list(feature_choices().items())
            kept[:] = [(bank, images, {pair[0]: m for pair, m in bank.find(as_tensor(images), wanted).items()})]
        return kept[0][2]

    def learn(rule: str, examples: Sequence[Example], seed: int, _validation: Sequence[Example] = ()) -> Predict:
        if not (banks and banks[0][0] is examples and banks[0][1] == seed):
            chosen = list(dict.fromkeys(feature_choices().values()))
            banks[:] = [(examples, seed, Bank(get_backbone(), examples, chosen, seed))]
        bank = banks[0][2]
        return lambda images: find(bank, images)[rule]

    return {rule: functools.partial(learn, rule) for rule in RULES}


@functools.cache
def flow(drawn_anew: bool = False) -> Any:
    """Load the tiny flow transformer, or the same as it was before training."""
    path = FLOW
    if drawn_anew:
        path = write_untrained(FLOW, Path(tempfile.mkdtemp()) / "untrained.safetensors", prefix="")
    return encode_once(load_flow(path), {})


@functools.cache
def both(checkpoint: Path) -> Any:
    """Return the checkpoint's UNet fused with the tiny flow transformer."""
    return FusedBackbone(trained(checkpoint), flow())


@functools.cache
def encoder(file: Path) -> Any:
    """Load a vision encoder from its file."""
    return encode_once(load_encoder(file), {})


@functools.cache
def beside_encoder(checkpoint: Path, file: Path) -> Any:
    """Return the checkpoint's model fused with a vision encoder."""
    first = trained(checkpoint)
    return FusedBackbone(first, encode_once(load_encoder(file, first.info.cell), {}))


def make_methods(
    checkpoint: Path, changes: Variant, style: str = scenes.WORLD, clip_vision: Path | None = None
) -> dict[str, Learn]:
    """Return the methods by name; ``changes`` apply to those that are trained."""
    ours, raw = functools.partial(trained, checkpoint), functools.partial(untrained, checkpoint)

    def variant(
        name: str,
        official: dict[str, Any] | None = None,
        train: Mapping[str, Any] = EMPTY,
        info: Mapping[str, Any] = EMPTY,
        **segment: Any,
    ) -> Variant:
        return dataclasses.replace(
            changes,
            preset=name,
            train={**changes.train, **train},
            info={**changes.info, **info},
            segment=changes.segment | segment,
            official=official,
        )

    encoders: dict[str, Learn] = {}
    if clip_vision is not None:
        encoders[ENCODER] = learned(functools.partial(encoder, clip_vision), variant("instant"))
        together = functools.partial(beside_encoder, checkpoint, clip_vision)
        encoders[BESIDE_ENCODER] = learned(together, variant("instant"))
    paper = fitted(ours, variant("paper"))  # trained once for both decoders
    return {
        "default": learned(ours, variant("instant")),
        "default + closeups": learned(ours, variant("instant", closeups=1)),
        "default + absence": learned(ours, variant("instant", min_confidence=0.8)),
        "default + best": learned(ours, variant("instant", average_flip=True, noise_samples=2, refine="best")),
        "paper": learned(ours, variant("paper"), paper),
        "paper, softmax over the parts": learned(ours, variant("paper", {"all_tokens": False}), paper),
        "default, not recoloured": learned(ours, variant("instant", train={"recolor": 0.0})),
        "paper, recoloured": learned(ours, variant("paper", train={"recolor": 1.0})),
        "untrained": learned(raw, variant("instant")),
        **compared(ours, style),
        "flow": learned(flow, variant("instant")),
        "flow, untrained": learned(functools.partial(flow, True), variant("instant")),
        "flow, feature neighbours": compared(flow, style)["feature neighbours"],
        "default beside flow": learned(functools.partial(both, checkpoint), variant("instant")),
        **encoders,
        "colour neighbours": lambda examples, seed, *_: lambda images: color_neighbours(examples, images),
        "mean mask": lambda examples, seed, *_: lambda images: [mean_mask(examples)] * len(images),
    }


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Parse texts: "recolor=0" -> {"recolor": 0}; values are JSON, anything else is text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
