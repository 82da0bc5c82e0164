"""Fixtures: random models in ComfyUI and diffusers with the same weights, and the running server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from testing.browser import canvas, chromium, fresh  # noqa: F401  fixtures of the browser tests
from testing.inprocess import import_comfyui, load_extension
from testing.sampling import plain_guider, sampled, trained_demo, without_previews
from testing.server import ComfyServer

torch.set_num_threads(1)  # one thread: measured many times faster than several on a busy machine


@pytest.fixture(scope="session")
def comfy_path() -> str:
    """ComfyUI importable in this process, on the CPU unless there is CUDA."""
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is not set; run python dev.py test")
    return import_comfyui()


@pytest.fixture(scope="session")
def extension(comfy_path: str):
    """The extension imported as a package, as ComfyUI does: slime_extension.nodes..."""
    return load_extension()


@pytest.fixture(scope="session")
def server(comfy_path: str) -> Iterator[ComfyServer]:
    """A real ComfyUI server with the extension and the demo pack."""
    with ComfyServer(comfy_path) as running:
        yield running


@pytest.fixture(scope="session")
def tiny(extension) -> Any:
    """The demo model with a car's parts learned, see :func:`testing.sampling.trained_demo`."""
    return trained_demo()


@pytest.fixture(scope="session")
def plain_sample(tiny) -> torch.Tensor:
    """The latent that the demo model samples without parts, before any test has touched it."""
    with torch.inference_mode():
        return sampled(plain_guider(tiny))


@pytest.fixture
def in_inference_mode(monkeypatch) -> Iterator[None]:
    """As ComfyUI runs nodes; without the previews, which need a server."""
    without_previews(monkeypatch)
    with torch.inference_mode():
        yield
