"""A new kind of model is one file: a backbone that no file of slime/ knows, and what the sources may name."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from slime import (
    PaperSettings,
    PartEmbeddings,
    SegmentSettings,
    SlimeError,
    decode,
    extract,
    load_embeddings,
    preset,
    save_embeddings,
    segment,
    train,
)
from slime.backbones.base import choose_layers
from slime.backbones.fused import FusedBackbone
from slime.settings import InstantSettings, TrainSettings
from slime.train import TRAINERS, Trainer
from testing.code import imported, sources
from testing.toy import CELL, ColorAndPlace, ToyUNet, toy_example, toy_score

ROOT = Path(__file__).resolve().parents[2]


def test_a_backbone_nobody_knows_does_it_all(tmp_path) -> None:
    backbone, example = ColorAndPlace(), toy_example(0)
    embeddings = train(backbone, [example])
    assert (
        embeddings.backbone == "color-and-place"
        and embeddings.condition == {}
        and toy_score(embeddings, backbone) > 0.8
    )
    loaded = load_embeddings(save_embeddings(embeddings, tmp_path / "a.safetensors"))
    images = torch.stack([toy_example(i).image for i in range(5)])
    expected = segment(backbone, images, embeddings)[0]
    assert torch.equal(segment(backbone, images, loaded)[0].label_map, expected.label_map)
    features = extract(backbone, images, loaded)
    torch.testing.assert_close(decode(features, embeddings).probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)
    assert segment(backbone, images, loaded, SegmentSettings(closeups=1))[0].probabilities.shape == (5, 3, 128, 128)
    auto = replace(preset("instant", backbone.info), read_layers="auto", propagate_layers="auto")
    probed = train(backbone, [example], auto)
    assert "color.0" in probed.layers.read and toy_score(probed, backbone) > 0.8
    assert toy_score(train(backbone, [example], init_embeddings=loaded), backbone) > 0.8


def test_what_needs_text_says_so() -> None:
    with pytest.raises(SlimeError, match='The preset paper learns token embeddings.*"color-and-place" does not have'):
        train(ColorAndPlace(), [toy_example(0)], PaperSettings(views=1, steps=1))


def test_nothing_outside_a_backbone_knows_comfyui_or_a_unet() -> None:
    for path, tree in sources("slime"):
        if path != "slime/backbones/comfyui.py":  # the command line may use ComfyUI's loader
            assert not [name for name in imported(tree) if name.split(".")[0] in ("comfy", "nodes", "folder_paths")], (
                path
            )
        if path.startswith("slime/backbones/"):
            continue
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not [name for name in names if "unet" in name.lower()], path
        if path != "slime/paper/files.py":  # results for one model alone
            assert not [name for name in imported(tree) if ".sd_unet" in name or ".hf_" in name], path
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant):
                assert node.value not in (77, 768, 999, 1000), (path, node.lineno)
            if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant):
                assert node.right.value not in (8, 64), (path, node.lineno)


def test_only_adapters_know_comfyuis_models() -> None:
    for path, tree in sources("nodes"):
        if not Path(path).name.startswith("comfy_"):
            models = ("comfy.ldm", "comfy.model_sampling", "comfy.model_base", "comfy.sd", "comfy.supported_models")
            assert not [name for name in imported(tree) if name.startswith(models)], path


def without_annotations(tree: ast.Module) -> ast.Module:
    """Return the module without imports for type checkers alone."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(kept, [])


LEVELS, ON_TOP = 12, 4  # of the library, and of the command line above it


def test_imports_have_no_circle_and_few_levels() -> None:
    """Every module of the library stands above all it imports, imports inside functions included."""
    modules = {path.removesuffix(".py").replace("/", "."): tree for path, tree in sources("slime")}
    modules = {name.removesuffix(".__init__"): tree for name, tree in modules.items()}
    below: dict[str, set[str]] = {}
    for name, tree in modules.items():
        package = name if any(other.startswith(f"{name}.") for other in modules) else name.rpartition(".")[0]
        below[name] = set()
        for node in ast.walk(without_annotations(tree)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                target = f"{base}.{node.module}" if node.module else base
                named = {f"{target}.{alias.name}" for alias in node.names}
                whole = set() if target == name and named <= modules.keys() else {target}  # its own modules
                below[name] |= {module for module in whole | named if module in modules}
    level: dict[str, int] = {}

    def height(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in level:
            level[name] = 1 + max((height(other, (*path, name)) for other in below[name]), default=0)
        return level[name]

    on_top = {name for name in modules if name.startswith(("slime.data", "slime.__main__"))} | {
        "slime",
        "slime.backbones.load",
    }
    assert max(height(name) for name in modules if name not in on_top) <= LEVELS, sorted(
        level.items(), key=lambda i: i[1]
    )
    assert max(height(name) for name in modules) <= LEVELS + ON_TOP, sorted(level.items(), key=lambda i: i[1])


@dataclass(frozen=True)
class BrightnessSettings(TrainSettings):
    """Settings of a toy trainer."""

    steps: int = 1


def train_on_brightness(backbone, examples, settings, init, validation, on_step) -> PartEmbeddings:
    """Return the instant trainer's result; a toy trainer."""
    del init, validation
    return TRAINERS["instant"].train(backbone, examples, InstantSettings(views=4), None, (), on_step)


def test_a_trainer_is_one_file_and_one_line(monkeypatch) -> None:
    trainer = Trainer(BrightnessSettings, "linear", train_on_brightness)
    monkeypatch.setitem(TRAINERS, "brightness", trainer)
    toy, settings = ToyUNet(), preset("brightness", steps=3)
    assert isinstance(settings, BrightnessSettings)
    assert train(toy, [toy_example(0)], settings).names == ("red", "blue")


def test_fused_backbones_of_any_number_and_their_files(tmp_path, monkeypatch) -> None:
    """Three branches, two of one kind: features by name, a file, patterns that name a branch."""
    other = ColorAndPlace()
    other.info = replace(ColorAndPlace.info, id="colors-again")
    toy = ToyUNet()
    toy.info = replace(toy.info, cell=CELL, multiple=8 * CELL)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images.movedim(-1, 1), CELL).repeat(1, 2, 1, 1)[:, :4]

    monkeypatch.setattr(toy, "encode_images", encode)
    fused = FusedBackbone(ColorAndPlace(), other, toy)
    embeddings = train(fused, [toy_example(0)], InstantSettings(views=4))
    assert (
        len(embeddings.vectors) == 6 and "toy:stride4" in embeddings.vectors and "toy:context" in embeddings.condition
    )
    loaded = load_embeddings(save_embeddings(embeddings, tmp_path / "fused.safetensors"))
    image = toy_example(3).image[None]
    assert torch.equal(segment(fused, image, loaded)[0].label_map, segment(fused, image, embeddings)[0].label_map)
    assert toy_score(loaded, fused) > 0.7
    assert choose_layers(fused, "colors-again:color.0", "color.0").read == ("colors-again:color.0",)
    assert len(choose_layers(fused, "color.0", "color.0").propagate) == 2
    with pytest.raises(SlimeError, match="cannot be combined"):
        FusedBackbone(toy, toy)
