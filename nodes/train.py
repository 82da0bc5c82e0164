"""SLiMe Train: learn part embeddings with live preview, cancel and autosave."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..slime.embeddings import PartEmbeddings
from ..slime.examples import Example
from ..slime.refine import refine_maps
from ..slime.segment import segment
from ..slime.settings import PRESET_NAMES, TrainSettings
from ..slime.settings import preset as make_preset
from ..slime.train import StepReport, train
from .comfy_denoiser import ComfyDenoiser
from .common import EXPERT, Embeddings, Examples, live_preview, named_errors, overlays, schema, to_core
from .files import autosave_path

logger = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512
TEXT_SECONDS = 0.25
STAGES = {"features": "Looking at view", "fit": "Fitting, step", "train": "Training, step", "done": "Done, step"}
FLIP = {"auto": None, "on": True, "off": False}
RECOLOR = {"auto": None, "off": 0.0, "mild": 0.3, "strong": 1.0}


class SLiMeTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeTrain",
            display_name="SLiMe Train",
            description="Learns the parts of the examples with the attention of the connected Stable Diffusion model.",
            search_aliases=["one shot segmentation", "train segmenter", "learn mask", "part segmentation"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL. LoRAs on it are respected."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Examples.Input("examples", tooltip="From SLiMe Example; one is enough, ten are better."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESET_NAMES),
                    default="instant",
                    tooltip="instant: seconds, no gradient through the model; part IoU 0.54 from one example of the "
                    "demo scenes. thorough and paper: training through the model, minutes; paper is the recipe of the "
                    "SLiMe paper, 0.08 there.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=100_000, tooltip="Optimiser steps; 0 takes the preset's number."
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.0001,
                    tooltip="For thorough and paper; 0 takes the preset's. The instant preset does not use it.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of noise and augmentation; the same seed learns the same embeddings.",
                ),
                Embeddings.Input("start", optional=True, tooltip="Embeddings of the same parts to continue from."),
                *_expert_inputs(),
            ],
            outputs=[
                Embeddings.Output(display_name="embeddings", tooltip="For SLiMe Segment and Save Learned Embeddings."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Image.Output(display_name="preview", tooltip="The first example, segmented by what was learned."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, vae, clip, examples, preset, steps, learning_rate, seed, start=None, **expert
    ) -> io.NodeOutput:
        with named_errors("SLiMe Train"):
            denoiser = ComfyDenoiser(model, vae, clip)
            changes = {"steps": steps or None, "learning_rate": learning_rate or None, "seed": seed} | _changes(
                **expert
            )
            settings = make_preset(preset, denoiser.family, **{k: v for k, v in changes.items() if v is not None})
            progress = _Progress(cls.hidden.unique_id)
            embeddings = _train_with_autosave(denoiser, examples, settings, start, progress)
            preview = _preview(denoiser, examples[0], embeddings, progress.last)
        losses = {"loss": list(embeddings.losses)}
        return io.NodeOutput(embeddings, losses, to_core(preview), ui=ui.PreviewImage(preview, cls=cls))


def _expert_inputs() -> list[Any]:
    """Settings few need; each has a value that leaves the preset's choice."""

    def number(kind: Any, name: str, default: float, low: float, high: float, tooltip: str, **more: Any) -> Any:
        return kind.Input(name, default=default, min=low, max=high, optional=True, tooltip=tooltip, **more, **EXPERT)

    def text(name: str, tooltip: str) -> Any:
        return io.String.Input(name, default="", optional=True, tooltip=tooltip, **EXPERT)

    def choice(name: str, options: list[str], tooltip: str) -> Any:
        return io.Combo.Input(name, options=options, default=options[0], optional=True, tooltip=tooltip, **EXPERT)

    return [
        text("prompt", "Text the model sees while it looks, for example: a photo of a car. Empty is fine."),
        number(
            io.Int,
            "views",
            0,
            0,
            1000,
            "Augmented copies of the examples; 0 takes the preset's number. Time grows with them; on the "
            "demo scenes IoU is 0.45 with 24, 0.47 with 96, 0.49 with 192.",
        ),
        number(io.Float, "crop", 0.0, 0.0, 1.0, "Smallest random crop, 1 for none; 0 takes the preset's.", step=0.05),
        number(
            io.Float,
            "rotation",
            -1.0,
            -1.0,
            180.0,
            "Largest random rotation in degrees; -1 takes the preset's.",
            step=1.0,
        ),
        choice("flip", list(FLIP), "Mirrored copies; auto switches them off when a part name says left or right."),
        choice(
            "recolor",
            list(RECOLOR),
            "Copies with other colours in every part, so that colours are not learned. Demo scenes: IoU 0.47 with, "
            "0.19 without; auto leaves it off for Stable Diffusion.",
        ),
        number(
            io.Float,
            "l2",
            0.0,
            0.0,
            10.0,
            "Pull towards simple answers, for instant; 0 takes the preset's.",
            step=0.001,
        ),
        number(io.Int, "timestep", 0, 0, 999, "Noise level of the features, for instant; 0 takes the model family's."),
        io.Boolean.Input(
            "checkpointing",
            default=False,
            optional=True,
            tooltip="Thorough and paper: needs less memory and more time.",
            **EXPERT,
        ),
        text(
            "cross_layers",
            "Cross-attention layers to read, as output.3-5, output.6.0. Empty: the model's table. auto: a probe on the "
            "examples chooses, for about the time of an instant training; IoU 0.47 to 0.48 on the demo scenes.",
        ),
        text(
            "self_layers",
            "Self-attention layers to read, as output.9-11. Empty: the model's table. auto: chosen by the probe.",
        ),
    ]


def _changes(
    flip: str = "auto", recolor: str = "auto", rotation: float = -1.0, checkpointing: bool = False, **plain: Any
) -> dict[str, Any]:
    """Expert widgets as changes of a preset; None leaves the preset's value."""
    kept = {name: value or None for name, value in plain.items()}
    turned = None if rotation < 0 else rotation
    return kept | {
        "flip": FLIP[flip],
        "recolor": RECOLOR[recolor],
        "rotation": turned,
        "checkpointing": checkpointing,
    }


def _train_with_autosave(
    denoiser: ComfyDenoiser,
    examples: tuple[Example, ...],
    settings: TrainSettings,
    start: PartEmbeddings | None,
    progress: _Progress,
) -> PartEmbeddings:
    """Train; on cancel or error write the best rows so far to models/slime/autosave, then let the exception pass."""
    try:
        return train(denoiser, examples, settings, start=start, on_step=progress)
    except BaseException:  # ComfyUI's interrupt is a BaseException in newer cores
        _autosave(progress.last)
        raise


def _autosave(report: StepReport | None) -> Path | None:
    embeddings = report.embeddings() if report is not None else None
    if embeddings is None:
        return None
    path = embeddings.save(autosave_path(embeddings.names))
    logger.warning("SLiMe: training stopped early; the best embeddings so far are in %s", path)
    return path


class _Progress:
    """Progress bar, throttled live overlay, a line of text in the node, and the check for cancel."""

    def __init__(self, node_id: str | None) -> None:
        self.last: StepReport | None = None
        self._node_id = node_id
        self._bar = comfy.utils.ProgressBar(1)
        self._shown = self._said = 0.0
        self._stage, self._began = "", 0.0

    def __call__(self, report: StepReport) -> None:
        if report.losses or self.last is None:
            self.last = report
        preview = None
        now = time.monotonic()
        if report.preview is not None and now - self._shown >= PREVIEW_SECONDS:
            image, maps = report.preview
            embeddings = report.embeddings()
            palette = embeddings.palette if embeddings is not None else ()
            preview = ("JPEG", live_preview(image, maps, palette), PREVIEW_SIDE)
            self._shown = now
        self._bar.update_absolute(report.step, report.steps, preview)
        if report.stage != self._stage:
            self._stage, self._began = report.stage, now
        if now - self._said >= TEXT_SECONDS or report.step == report.steps:
            self._say(progress_text(report, now - self._began))
            self._said = now
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _say(self, text: str) -> None:
        server = getattr(PromptServer, "instance", None)  # there is none where nodes run without a server
        if server is not None and self._node_id is not None:
            server.send_progress_text(text, self._node_id)


def progress_text(report: StepReport, elapsed: float) -> str:
    """One line: what is done, the loss, and the time left by the pace so far, ``elapsed`` seconds in this stage."""
    words = [f"{STAGES[report.stage]} {report.step}/{report.steps}"]
    if "loss" in report.losses:
        words.append(f"loss {report.losses['loss']:.4g}")
    if 1 < report.step < report.steps:
        left = elapsed / (report.step - 1) * (report.steps - report.step)
        words.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return ", ".join(words)


def _preview(
    denoiser: ComfyDenoiser, example: Example, embeddings: PartEmbeddings, last: StepReport | None
) -> torch.Tensor:
    """The first example with its parts found; an instant fit brings the maps, other presets need a pass."""
    images = example.image[None]
    if last is not None and last.stage == "done" and last.preview is not None:
        maps = refine_maps(last.preview[1][None], images, "fast")
    else:
        maps = segment(denoiser, images, embeddings)[0].probabilities
    return overlays(images, maps.argmax(1), embeddings.palette, embeddings.names)
