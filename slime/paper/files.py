"""Import embeddings trained by the official code."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..backbones.sd_unet import PAPER_LAYERS
from ..embeddings import CONTEXT, PartEmbeddings
from ..errors import SlimeError
from ..settings import RESOLUTION, SHARED
from .decoder import PaperDecoder
from .train import part_prompt

FAMILY, WIDTH, SIDE, TIMESTEP = "sd2", 1024, 512, 100  # stable-diffusion-2-1-base


def import_official(folder: str | os.PathLike[str], names: list[str], backbone: Backbone) -> PartEmbeddings:
    """Read the official code's result, a folder of ``embedding_{i}.pth`` ([1, 1, 1024] each, SD2.1-base).

    The base context is the encoding of "part" repeated once a class, background included.

    Raises:
        SlimeError: no or unreadable files, another count than names, or a model of another family.
    """
    files = {int(path.stem[10:]): path for path in Path(folder).glob("embedding_*.pth") if path.stem[10:].isdecimal()}
    if len(files) != len(names):
        raise SlimeError(f'"{Path(folder).name}" holds {len(files)} embedding files but {len(names)} names are given.')
    tokens = [_read(files[number]) for number in sorted(files)]
    widths = {token.numel() for token in tokens}
    if widths != {WIDTH}:
        raise SlimeError(f"Official SLiMe embeddings are {WIDTH} wide; these files hold {sorted(widths)}.")
    prompt = part_prompt(names)
    embeddings = PartEmbeddings(
        names=tuple(names),
        vectors={SHARED: torch.stack(tokens)},
        condition=None,
        prompt=prompt,
        backbone=FAMILY,
        layers=PAPER_LAYERS,
        timestep=TIMESTEP,
        side=SIDE,
        mode=CONTEXT,
        grouping=RESOLUTION,
        decoder=PaperDecoder(),
        settings={"preset": "official"},
    )
    embeddings.check_model(backbone)
    return replace(embeddings, condition=backbone.condition(prompt))


def _read(path: Path) -> Tensor:
    """Read one token embedding, float32 [D]."""
    try:
        token = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise SlimeError(f'"{path.name}" cannot be read as a tensor ({error}).') from error
    dense = isinstance(token, Tensor) and token.layout == torch.strided and token.device.type == "cpu"
    if not dense or not token.is_floating_point() or not bool(torch.isfinite(token).all()):
        raise SlimeError(f'"{path.name}" does not hold an embedding of finite numbers, as official SLiMe writes them.')
    return token.detach().float().reshape(-1)
