"""SLiMe Train: learn part embeddings with live preview, cancel and autosave."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..slime.embeddings import PartEmbeddings
from ..slime.examples import Example
from ..slime.segment import segment
from ..slime.settings import PRESET_NAMES, TrainSettings, preset
from ..slime.train import StepReport, train
from .comfy_denoiser import ComfyDenoiser
from .common import EXPERT, Embeddings, Examples, live_preview, named_errors, overlays, schema, to_core
from .files import autosave_path

logger = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512


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
                    tooltip="instant: seconds, no gradient through the model. thorough and paper: training through the "
                    "model, minutes; paper is the recipe of the SLiMe paper.",
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
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    **EXPERT,
                    tooltip="Text the model sees while it looks, for example: a photo of a car. Empty is fine.",
                ),
                io.Int.Input(
                    "views",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    **EXPERT,
                    tooltip="Augmented copies of the examples; 0 takes the preset's number.",
                ),
                io.Combo.Input(
                    "flip",
                    options=["auto", "on", "off"],
                    default="auto",
                    optional=True,
                    **EXPERT,
                    tooltip="Mirrored copies; auto switches them off when a part name says left or right.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    optional=True,
                    **EXPERT,
                    tooltip="Thorough and paper: needs less memory and about a third more time.",
                ),
                io.String.Input(
                    "cross_layers",
                    default="",
                    optional=True,
                    **EXPERT,
                    tooltip="Cross-attention layers to read, as output.3-5, output.6.0. Empty: the model's table.",
                ),
                io.String.Input(
                    "self_layers",
                    default="",
                    optional=True,
                    **EXPERT,
                    tooltip="Self-attention layers to read, for example output.9-11. Empty: the model's table.",
                ),
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
        cls,
        model,
        vae,
        clip,
        examples,
        preset,
        steps,
        learning_rate,
        seed,
        start=None,
        prompt="",
        views=0,
        flip="auto",
        checkpointing=False,
        cross_layers="",
        self_layers="",
    ) -> io.NodeOutput:
        with named_errors("SLiMe Train"):
            denoiser = ComfyDenoiser(model, vae, clip)
            chosen = {"steps": steps, "learning_rate": learning_rate, "views": views}
            settings = make_settings(
                preset,
                denoiser,
                seed=seed,
                prompt=prompt,
                flip={"auto": None, "on": True, "off": False}[flip],
                checkpointing=checkpointing,
                cross_layers=cross_layers,
                self_layers=self_layers,
                **{name: value for name, value in chosen.items() if value},
            )
            embeddings = _train_with_autosave(denoiser, examples, settings, start)
            preview = _preview(denoiser, examples[0], embeddings)
        losses = {"loss": list(embeddings.losses)}
        return io.NodeOutput(embeddings, losses, to_core(preview), ui=ui.PreviewImage(preview, cls=cls))


def make_settings(name: str, denoiser: ComfyDenoiser, **changes: object) -> TrainSettings:
    return preset(name, denoiser.family, **changes)


def _train_with_autosave(
    denoiser: ComfyDenoiser, examples: tuple[Example, ...], settings: TrainSettings, start: PartEmbeddings | None
) -> PartEmbeddings:
    """Train; on cancel or error write the best rows so far to models/slime/autosave, then let the exception pass."""
    progress = _Progress()
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
    """Progress bar, throttled live overlay, and the check for cancel."""

    def __init__(self) -> None:
        self.last: StepReport | None = None
        self._bar = comfy.utils.ProgressBar(1)
        self._shown = 0.0

    def __call__(self, report: StepReport) -> None:
        if report.losses or self.last is None:
            self.last = report
        preview = None
        now = time.monotonic()
        if report.preview is not None and now - self._shown >= PREVIEW_SECONDS:
            image, labels = report.preview
            embeddings = report.embeddings()
            palette = embeddings.palette if embeddings is not None else ()
            preview = ("JPEG", live_preview(image, labels, palette), PREVIEW_SIDE)
            self._shown = now
        self._bar.update_absolute(report.step, report.steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()


def _preview(denoiser: ComfyDenoiser, example: Example, embeddings: PartEmbeddings):
    maps = segment(denoiser, example.image[None], embeddings)[0]
    return overlays(example.image[None], maps.label_map, embeddings.palette, embeddings.names)
