"""Raise errors in the middle of every node, in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slime import SlimeError
from testing import splits
from testing.inprocess import NAME, load_backbone
from testing.server import MODEL

from .trials import Trials

# What the test suite runs, with one error each: every kind of training, segmentation, and what nodes make of parts.
QUICK = ("train instant", "train paper, checkpointing", "segment", "part mask", "part segs", "merge")


class Injected(RuntimeError):
    """Error that is raised in the middle of a node."""


class RaiseAt(TorchDispatchMode):
    """Dispatch mode that raises at the operation with this number; without a number it counts operations."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise Injected(f"at operation {self.number}, {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet_nodes(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the node classes, callable in this process; previews and files go to ``folder``."""
    import folder_paths

    import_module(f"{NAME}.nodes.files").register_folder()
    module = import_module(f"{NAME}.nodes.extension")
    hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    with (
        patch.object(folder_paths, "temp_directory", str(folder)),
        patch.object(folder_paths, "output_directory", str(folder)),
        patch.dict(folder_paths.folder_names_and_paths, {"slime": ([str(folder)], {".safetensors"})}),
        patch.object(module.SLiMeTrain, "hidden", hidden, create=True),
    ):
        yield vars(module)


def errors(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Raise an error at random operations of every node; the model must be unchanged and work afterwards."""
    backbone = load_backbone(MODEL)
    with quiet_nodes(folder) as nodes, torch.inference_mode():
        works, find = node_works(nodes, backbone)
        if count == 1:  # as the test suite runs it
            works = {name: works[name] for name in QUICK}
        before, labels = _state(backbone), find()
        for name, work in works.items():
            with RaiseAt() as counting:
                work()
            numbers = range(1, counting.count + 1)
            ways = sum(node_of(other) == node_of(name) for other in works)  # these share the node's errors
            for number in sorted(rng.sample(numbers, min(-(-count // ways), len(numbers)))):
                trials.count += 1
                try:
                    with RaiseAt(number):
                        work()
                except (Injected, SlimeError):
                    trials.refused += 1
                except Exception as error:
                    trials.failures.append(f"errors {name} at {number}: {type(error).__name__}: {str(error)[:200]}")
                trials.check(f"{name} at {number}: the model is not as it was", _state(backbone) == before)
            trials.check(f"after {name}: segmentation differs", torch.equal(find(), labels))


def node_of(name: str) -> str:
    """Return the node that a call of :func:`node_works` belongs to."""
    return "train" if name.startswith("train") else name.split(",")[0]


def node_works(nodes: dict[str, Any], backbone: Any) -> tuple[dict[str, Callable[[], Any]], Callable[[], Tensor]]:
    """Return a call of every node and preset by name, and one that segments a scene and returns its label map."""
    model, vae, clip = backbone.model, backbone.vae, backbone.clip
    example = splits.example("car", splits.EXAMPLES)
    image = splits.example("car", splits.TEST).image[None]

    def training_of(name: str, seed: int = 0, **more: Any) -> Any:
        kind = {"instant": "SLiMeInstantSettings", "paper": "SLiMePaperSettings"}[name]
        schema = nodes[kind].define_schema()
        settings = {item.id: item.default for item in schema.inputs} | {"views": 2} | more
        settings |= {"steps": 2} if name == "paper" else {}
        value = nodes[kind].execute(**settings).args[0]
        with patch("slime.training.instant.STEPS", 2 if name == "instant" and not more else 100):  # not the fit alone
            return nodes["SLiMeTrain"].execute((example,), name, seed, model, vae, clip, settings=value).args

    def find(**more: Any) -> Any:
        import_module(f"{NAME}.nodes.feature_cache")._caches.clear()
        return nodes["SLiMeSegment"].execute(learned, image, model, vae, **more).args

    learned = training_of("instant", views=8)[0]
    parts = find()[0]
    truth = (example.labels == 4).float()[None]
    works: dict[str, Callable[[], Any]] = {
        "train instant": lambda: training_of("instant"),
        "train instant, auto": lambda: training_of("instant", read_layers="auto"),
        "train paper": lambda: training_of("paper"),
        "train paper, checkpointing": lambda: training_of("paper", checkpointing=True),
        "segment": find,
        "segment, zoom": lambda: find(closeups=1),
        "part mask": lambda: nodes["SLiMePartMask"].execute(parts, "wheel", "soft", grow=3, feather=2),
        "part list": lambda: nodes["SLiMePartList"].execute(parts),
        "part boxes": lambda: nodes["SLiMePartBoxes"].execute(parts),
        "part segs": lambda: nodes["SLiMePartSegs"].execute(parts),
        "overlay": lambda: nodes["SLiMeOverlay"].execute(parts),
        "smooth": lambda: nodes["SLiMeSteadyParts"].execute(parts),
        "evaluate": lambda: nodes["SLiMeEvaluate"].execute(parts, truth, "wheel"),
        "example": lambda: nodes["SLiMeExample"].execute(image, truth, "wheel"),
        "save": lambda: nodes["SLiMeSaveEmbeddings"].execute(learned, "x", True),
        "merge": lambda: nodes["SLiMeEmbeddingsMerge"].execute(learned, None, "wheel = tyre"),
    }
    return works, lambda: find()[0].maps.label_map.clone()


def _state(backbone: Any) -> tuple[Any, ...]:
    """Return the identity of every weight and of every function that may be replaced, and torch's modes."""
    modules = list(backbone.model.model.modules())
    weights = tuple(
        (id(p), p.requires_grad) for module in modules for p in module._parameters.values() if p is not None
    )
    replaced = tuple(name for module in modules for name in vars(module) if name == "forward")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return weights, replaced, hooks is None, torch.is_inference_mode_enabled(), torch.is_grad_enabled()
