"""Embeddings with everything but the learned rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from ..backbones.base import Backbone, choose_layers
from ..embeddings import CONTEXT, KEYS, SHARED, PartEmbeddings
from ..errors import SlimeError
from ..read_out import Official, Propagated
from ..settings import InstantSettings, PaperSettings


def instant_template(backbone: Backbone, names: Sequence[str], settings: InstantSettings) -> PartEmbeddings:
    """Rows that score the features of a backbone which runs on the settings' own prompt."""
    info = backbone.info
    timestep = info.timestep if settings.timestep is None else settings.timestep
    condition = backbone.condition(settings.prompt)
    return PartEmbeddings(
        names=tuple(names),
        rows=torch.zeros(1, len(names), 1),
        condition=condition,
        prompt=settings.prompt,
        backbone=info.id,
        layers=choose_layers(backbone, settings.read_layers, settings.propagate_layers),
        timestep=timestep,
        side=info.side,
        mode=KEYS,
        row_groups=settings.row_groups,
        read_out=Propagated(),
        settings={"preset": "instant"} | asdict(settings),
    )


def part_prompt(names: Sequence[str]) -> str:
    """The paper's text: a word for the background and one for each part, all alike."""
    return " ".join(["part"] * (len(names) + 1))


def paper_template(backbone: Backbone, names: Sequence[str], settings: PaperSettings) -> PartEmbeddings:
    """Rows that stand in the text: "part" once a class, where no other prompt is given."""
    info = backbone.info
    prompt = settings.prompt or part_prompt(names)
    condition = backbone.condition(prompt)
    context = condition["context"]
    if len(context) <= len(names):
        raise SlimeError(f"The prompt gives {len(context)} text rows, too few for {len(names)} parts.")
    return PartEmbeddings(
        names=tuple(names),
        rows=torch.zeros(1, len(names), context.shape[-1]),
        condition=condition,
        prompt=prompt,
        backbone=info.id,
        layers=choose_layers(backbone, settings.read_layers, settings.propagate_layers),
        timestep=info.timestep,
        side=info.side,
        mode=CONTEXT,
        row_groups=SHARED,
        read_out=Official(),
        settings={"preset": "paper"} | asdict(settings),
    )
