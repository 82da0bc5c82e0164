"""What all trainers share: progress reports, and the embeddings to be filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from .denoiser import Context, Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import Example
from .layers import LayerChoice, choose_layers
from .probe import probe_layers
from .read import ReadOut
from .settings import TrainSettings

AUTO = "auto"  # layers chosen by slime.probe


@dataclass(frozen=True)
class StepReport:
    """Progress of training.

    Attributes:
        stage: "features" (passes over the views before the first step), "fit" or "train", and "done" after an instant
            fit.
        step, steps: 1-based.
        losses: terms by name; empty for "features".
        embeddings: gives the best embeddings so far, or None when there are none.
        preview: image [h, w, 3] and part maps [K, h', w'] of the current segmentation, every few steps, else None;
            at "done" the first example and its maps as segmentation would give them.
    """

    stage: str
    step: int
    steps: int
    losses: dict[str, float]
    embeddings: Callable[[], PartEmbeddings | None]
    preview: tuple[Tensor, Tensor] | None = None


OnStep = Callable[[StepReport], None]


def make_template(
    denoiser: Denoiser, examples: Sequence[Example], settings: TrainSettings, mode: str
) -> PartEmbeddings:
    """Embeddings with everything but the learned rows."""
    family, names = denoiser.family, examples[0].names
    prompt = settings.prompt or (" ".join(["part"] * (len(names) + 1)) if mode == "context" else "")
    context = denoiser.encode_prompt(prompt)
    if settings.short_context:
        context = replace(context, rows=context.rows[: len(names) + 1])
    if len(context.rows) <= len(names):
        raise SlimeError(f"The prompt gives {len(context.rows)} text rows, too few for {len(names)} parts.")
    if context.rows.shape[-1] != family.context_dim:
        raise SlimeError(
            f"The CLIP gives text rows {context.rows.shape[-1]} wide, but the model needs {family.context_dim}: "
            "connect the CLIP of the same checkpoint as the model."
        )
    timestep = settings.timestep or family.timestep
    layers = _layers(denoiser, examples, settings, context, timestep)
    return PartEmbeddings(
        names=names,
        rows=torch.zeros(1, len(names), family.context_dim),
        context=context.rows.cpu().half(),
        pooled=context.pooled,
        prompt=prompt,
        row_groups=settings.row_groups if mode == "keys" else "shared",
        family=family.name,
        prediction=denoiser.prediction,
        mode=mode,
        layers=layers,
        timestep=timestep,
        working_side=family.working_side,
        read_out=ReadOut(official=settings.preset == "paper"),
        settings=asdict(settings),
    )


def _layers(
    denoiser: Denoiser, examples: Sequence[Example], settings: TrainSettings, context: Context, timestep: int
) -> LayerChoice:
    """The family's or the user's layers; "auto" asks the examples."""
    cross, self_ = settings.cross_layers.strip(), settings.self_layers.strip()
    fixed = choose_layers(
        denoiser.family, denoiser.layers, "" if cross == AUTO else cross, "" if self_ == AUTO else self_
    )
    if AUTO not in (cross, self_):
        return fixed
    probed = probe_layers(denoiser, examples, settings, context, timestep).choice
    return LayerChoice(probed.cross if cross == AUTO else fixed.cross, probed.self_ if self_ == AUTO else fixed.self_)
