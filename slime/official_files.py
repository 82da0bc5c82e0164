"""Read the results of the official code."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .denoiser import Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .layers import FAMILIES, LayerChoice, LayerKey
from .read import ReadOut


def import_official(folder: str | os.PathLike[str], names: list[str], denoiser: Denoiser) -> PartEmbeddings:
    """Read the official code's result, a folder of ``embedding_{i}.pth`` ([1, 1, 1024] each, SD2.1-base).

    The base context is the encoding of "part" repeated once a class, background included.

    Raises:
        SlimeError: no or unreadable files, another count than names, or a model of another family.
    """
    files = sorted(Path(folder).glob("embedding_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if len(files) != len(names):
        raise SlimeError(f'"{Path(folder).name}" holds {len(files)} embedding files but {len(names)} names are given.')
    rows = []
    for path in files:
        try:
            row = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  torch.load raises many kinds
            raise SlimeError(f'"{path.name}" cannot be read as a tensor ({error}).') from error
        rows.append(torch.as_tensor(row).detach().float().reshape(-1))
    family = FAMILIES["sd2"]
    if any(row.numel() != family.context_dim for row in rows):
        raise SlimeError(f"Official SLiMe rows are {family.context_dim} wide; got {sorted({r.numel() for r in rows})}.")
    prompt = " ".join(["part"] * (len(names) + 1))
    context = denoiser.encode_prompt(prompt)
    embeddings = PartEmbeddings(
        names=tuple(names),
        rows=torch.stack(rows)[None],
        context=context.rows.cpu().half(),
        prompt=prompt,
        family="sd2",
        prediction="eps",
        mode="context",
        timestep=100,
        working_side=512,
        read_out=ReadOut(official=True),
        layers=LayerChoice(
            tuple(LayerKey("output", number, 0) for number in (3, 4, 5, 6, 7)),
            tuple(LayerKey("output", number, 0) for number in (9, 10, 11)),
        ),
        settings={"preset": "official"},
    )
    embeddings.check_model(denoiser.family)
    return embeddings
