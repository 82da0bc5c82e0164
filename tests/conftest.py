"""Fixtures: random models in ComfyUI and diffusers with the same weights, and the running server."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI_DIR", "")


@pytest.fixture(scope="session")
def comfy_path() -> str:
    """ComfyUI importable in this process, on the CPU unless there is CUDA."""
    if not COMFYUI:
        pytest.skip("COMFYUI_DIR is not set; run python dev.py test")
    if COMFYUI not in sys.path:
        sys.path.append(COMFYUI)
    import comfy.options  # noqa: F401
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return COMFYUI


@pytest.fixture(scope="session")
def extension(comfy_path: str):
    """The extension imported as a package, as ComfyUI does; its modules are extension.nodes..., extension.slime..."""
    name = "slime_extension"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def server(comfy_path: str) -> Iterator[object]:
    """A real ComfyUI server with the extension and the demo pack."""
    from demo.server import ComfyServer

    with ComfyServer(comfy_path) as running:
        yield running
