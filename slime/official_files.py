"""Read the results of the official code."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .backbones.base import Backbone
from .backbones.sd_unet import PAPER_LAYERS
from .embeddings import CONTEXT, SHARED, PartEmbeddings
from .errors import SlimeError
from .read_out import Official

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
    rows = [_read(files[number]) for number in sorted(files)]
    if any(row.numel() != WIDTH for row in rows):
        raise SlimeError(f"Official SLiMe rows are {WIDTH} wide; got {sorted({r.numel() for r in rows})}.")
    prompt = " ".join(["part"] * (len(names) + 1))
    embeddings = PartEmbeddings(
        names=tuple(names),
        rows=torch.stack(rows)[None],
        condition=None,
        prompt=prompt,
        backbone=FAMILY,
        layers=PAPER_LAYERS,
        timestep=TIMESTEP,
        side=SIDE,
        mode=CONTEXT,
        row_groups=SHARED,
        read_out=Official(),
        settings={"preset": "official"},
    )
    embeddings.check_model(backbone)
    return replace(embeddings, condition=backbone.condition(prompt))


def _read(path: Path) -> Tensor:
    """One row, float32 [D]."""
    try:
        row = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise SlimeError(f'"{path.name}" cannot be read as a tensor ({error}).') from error
    dense = isinstance(row, Tensor) and row.layout == torch.strided and row.device.type == "cpu"
    if not dense or not row.is_floating_point() or not bool(torch.isfinite(row).all()):
        raise SlimeError(f'"{path.name}" does not hold a row of finite numbers, as official SLiMe writes them.')
    return row.detach().float().reshape(-1)
