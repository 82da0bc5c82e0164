"""A new kind of model is one file: a backbone that no file of slime/ knows, and what the sources may name."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from slime import PaperSettings, SegmentSettings, SlimeError, load_embeddings, save_embeddings, segment, train
from slime.backbones.attention import Attention
from slime.backbones.base import BackboneInfo, Observation
from slime.backbones.layers import Layer, LayerChoice
from slime.segment import look, read_look
from slime.settings import InstantSettings, LookSettings

from .test_learning import picture, score
from .toy import ToyUNet

ROOT = Path(__file__).resolve().parent.parent
CELL = 4


class ColorAndPlace:
    """Looks at colours and their squares ("color.0") and at positions ("place.0"); like cells attend to each other."""

    info = BackboneInfo("color-and-place", 96, CELL, CELL, channels=3, instant=InstantSettings(views=4))
    device = torch.device("cpu")
    layers = (Layer("color.0", 1), Layer("place.0", 2))

    def default_layers(self) -> LayerChoice:
        return LayerChoice(("color.0", "place.0"), ("color.0",))

    def condition(self, prompt: str) -> dict[str, torch.Tensor]:
        return {}

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images.movedim(-1, 1), CELL)

    def observe(self, encoded, plan, noise) -> Observation:
        features, attention = [], {}
        for layer in self.layers:
            cells = F.avg_pool2d(encoded, layer.stride)
            b, _, h, w = cells.shape
            y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
            place = torch.stack([x, y, x * y, x**2, y**2, torch.ones(h, w)]).expand(b, -1, -1, -1)
            seen = torch.cat([cells, cells**2], 1) if layer.name == "color.0" else place
            if layer.name in plan.layers.read:
                features.append(seen)
            query = 8 * seen.flatten(2).transpose(1, 2)
            attention[layer.name] = Attention(query, query, 1, h, w)
        chosen = tuple(attention[name] for name in plan.layers.propagate)
        return Observation(tuple(reversed(features)), chosen, (encoded.shape[2], encoded.shape[3]))

    def fitting_batch(self, size: tuple[int, int]) -> int:
        return 2


def test_a_backbone_nobody_knows_does_it_all(tmp_path) -> None:
    backbone, example = ColorAndPlace(), picture(0)
    embeddings = train(backbone, [example])
    assert embeddings.backbone == "color-and-place" and embeddings.condition == {} and score(embeddings, backbone) > 0.8
    loaded = load_embeddings(save_embeddings(embeddings, tmp_path / "a.safetensors"))
    images = torch.stack([picture(i).image for i in range(5)])
    expected = segment(backbone, images, embeddings)[0]
    assert torch.equal(segment(backbone, images, loaded)[0].label_map, expected.label_map)
    seen = look(backbone, images, loaded)
    torch.testing.assert_close(read_look(seen, embeddings).probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)
    assert segment(backbone, images, loaded, SegmentSettings(zoom=1))[0].probabilities.shape == (5, 3, 128, 128)
    auto = replace(backbone.info.instant, read_layers="auto", propagate_layers="auto")
    probed = train(backbone, [example], auto)
    assert "color.0" in probed.layers.read and score(probed, backbone) > 0.8
    assert score(train(backbone, [example], start=loaded), backbone) > 0.8


def test_what_needs_text_says_so() -> None:
    with pytest.raises(SlimeError, match='The preset paper puts rows into the text.*"color-and-place" does not have'):
        train(ColorAndPlace(), [picture(0)], PaperSettings(views=1, steps=1))


def sources(folder: str) -> list[tuple[str, ast.Module]]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in files]


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def test_nothing_outside_a_backbone_knows_comfyui_or_a_unet() -> None:
    for path, tree in sources("slime"):
        if path != "slime/backbones/comfyui.py":  # for those who run large sets with its loader
            assert not [name for name in imported(tree) if name.split(".")[0] in ("comfy", "nodes", "folder_paths")], (
                path
            )
        if path.startswith("slime/backbones/"):
            continue
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not [name for name in names if "unet" in name.lower()], path
        if path != "slime/official_files.py":  # results for one model alone
            assert not [name for name in imported(tree) if ".sd_unet" in name or ".diffusers" in name], path
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


LEVELS, ON_TOP = 8, 4  # of the library, and of the command line above it


def test_imports_have_no_circle_and_few_levels() -> None:
    """Every module of the library stands above all it imports, imports inside functions included."""
    modules = {path.removesuffix(".py").replace("/", "."): tree for path, tree in sources("slime")}
    modules = {name.removesuffix(".__init__"): tree for name, tree in modules.items()}
    below: dict[str, set[str]] = {}
    for name, tree in modules.items():
        package = name if any(other.startswith(f"{name}.") for other in modules) else name.rpartition(".")[0]
        below[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                target = f"{base}.{node.module}" if node.module else base
                below[name] |= {m for m in (target, *(f"{target}.{a.name}" for a in node.names)) if m in modules}
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


def test_looks_in_a_row_serve_files_of_several_models() -> None:
    """What was looked at already is not looked at again, and every file is read as if it had been alone."""
    toy, colors = ToyUNet(), ColorAndPlace()
    of_toy = [train(toy, [picture(0)], InstantSettings(views=2, seed=seed)) for seed in range(3)]
    of_colors = train(colors, [picture(0)], InstantSettings(views=2))
    images = torch.stack([picture(i).image for i in range(3)])
    toy.passes = toy.encoded = 0
    seen = look(toy, images, of_toy[0])
    seen = look(toy, images, of_toy[1], previous=seen)
    seen = look(colors, images, of_colors, previous=seen)
    seen = look(toy, images.clone(), of_toy[2], previous=seen)
    assert toy.encoded == len(images) and toy.passes == 1, "three files, one pass"
    for backbone, item in [(toy, one) for one in of_toy] + [(colors, of_colors)]:
        direct = segment(backbone, images, item)[0].label_map
        assert direct.any() and torch.equal(read_look(seen, item).label_map, direct)
    assert look(toy, images, of_toy[0], LookSettings(seed=1), previous=seen) is not seen, "another noise"
    with pytest.raises(SlimeError, match="at other images"):
        look(toy, images.flip(2), of_toy[0], previous=seen)
