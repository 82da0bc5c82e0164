"""Weights of the tiny models: a checkpoint has all, the test bed only those trained further from the tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..server import FLOW, MODEL

TESTBED = MODEL.parent / "testbed_warm.safetensors"
DIFFUSION = "model.diffusion_model."
CLIP = "cond_stage_model.transformer."
TABLE = "text_model.embeddings.token_embedding.weight"
TOKENS = "tokens"  # embeddings of the tokens in use; the file's metadata has their places in CLIP's vocabulary


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint, or of a test bed.

    Weights that a test bed does not hold come from the tiny model's checkpoint.
    """
    state = load_file(str(path))
    if TOKENS not in state:
        return state
    with safe_open(str(path), framework="pt") as file:
        vocabulary = json.loads(file.metadata()["vocabulary"])
    base = load_file(str(MODEL)) | {name: weight for name, weight in state.items() if name != TOKENS}
    table = torch.zeros(base[CLIP + TABLE].shape, dtype=torch.float16)
    table[vocabulary] = state[TOKENS]
    return base | {CLIP + TABLE: table}


def flow_checkpoint() -> dict[str, Tensor]:
    """Return the tiny flow transformer as a whole checkpoint, with the tiny model's VAE and text encoder."""
    rest = {name: weight for name, weight in load_file(str(MODEL)).items() if not name.startswith(DIFFUSION)}
    return rest | {DIFFUSION + name: weight for name, weight in load_file(str(FLOW)).items()}


@contextmanager
def checkpoint_of(path: Path) -> Iterator[Path]:
    """Provide a file for ComfyUI's stock loader: the path itself, or for a test bed a temporary whole checkpoint."""
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            partial = TOKENS in file.keys()
        if partial:
            with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                whole = Path(folder) / path.name
                save_file(load_weights(path), str(whole))
                yield whole
            return
    yield path
