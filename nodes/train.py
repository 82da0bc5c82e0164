"""SLiMe Train: learn part embeddings with live preview, cancel and autosave."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..slime.backbones.base import Backbone
from ..slime.embedding_files import save_embeddings
from ..slime.embeddings import PartEmbeddings
from ..slime.examples import Example
from ..slime.parts.palette import default_palette
from ..slime.reading.refine import refine_maps
from ..slime.segment import segment
from ..slime.settings import setting_names
from ..slime.train import GONE, PRESETS, Settings, StepReport, train
from ..slime.train import preset as make_preset
from .common import (
    Embeddings,
    Examples,
    bygone,
    live_preview,
    named_errors,
    overlays,
    say,
    schema,
    to_core,
    to_picture,
    with_legend,
)
from .connected import clip_vision_input, connected, looking_inputs
from .files import autosave_path
from .train_settings import FLIP, RECOLOR, Chosen, SettingsSocket

logger = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512
TEXT_SECONDS = 0.25
BAR = 1000
STAGES = {
    "layers": "Choosing layers, view",
    "views": "Encoding view",
    "features": "Looking at view",
    "fit": "Fitting, step",
    "train": "Training, step",
    "done": "Done, step",
}
PROBE = 0.5  # a guess: of an instant training whose layers are chosen on the examples
# Guesses of how much of the whole time each stage takes, in order; the rest is the last one's. On the demo model on a
# CPU it is .6 and .1 with both; a step of paper through Stable Diffusion is far dearer than a view.
SHARES = {"instant": {"views": 0.5, "features": 0.2}, "paper": {"views": 0.08, "features": 0.08}}


class SLiMeTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeTrain",
            essentials_category="Image Tools",
            display_name="SLiMe Train",
            description="Learns the parts of the examples with what the connected models see in them.",
            search_aliases=["one shot segmentation", "train segmenter", "learn mask", "part segmentation"],
            inputs=[
                *looking_inputs(
                    "SD1.x, SD2.x or SDXL; with the preset instant also Flux, Chroma, SD3, Qwen-Image, Lumina 2, "
                    "Z-Image. LoRAs on it are respected."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The CLIP of the same checkpoint."),
                Examples.Input("examples", tooltip="From SLiMe Example; one is enough, ten are better."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="instant",
                    tooltip="instant: seconds, no gradient through the model. paper: the recipe of the SLiMe paper, "
                    "training through the model, minutes.",
                ),
                bygone(io.Int.Input("steps", default=0, min=0, max=100_000)),
                bygone(io.Float.Input("learning_rate", default=0.0, min=0.0, max=10.0, step=0.0001)),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of noise and augmentation; the same seed learns the same embeddings.",
                ),
                Embeddings.Input("start", optional=True, tooltip="Embeddings of the same parts to continue from."),
                *_bygone_inputs(),
                SettingsSocket.Input(
                    "settings",
                    optional=True,
                    tooltip="From SLiMe Instant Settings or SLiMe Paper Settings; without them the preset's own count.",
                ),
                clip_vision_input(),
            ],
            outputs=[
                Embeddings.Output(display_name="embeddings", tooltip="For SLiMe Segment and Save Learned Embeddings."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Image.Output(display_name="preview", tooltip="The first example, segmented by what was learned."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, preset: str) -> bool | str:
        """A workflow that names a preset which is gone hears why."""
        return True if preset in PRESETS else GONE.get(preset, f'There is no preset "{preset}": {", ".join(PRESETS)}.')

    @classmethod
    def execute(
        cls,
        examples: Sequence[Example],
        preset: str,
        steps: int,
        learning_rate: float,
        seed: int,
        model: Any = None,
        vae: Any = None,
        clip: Any = None,
        clip_vision: Any = None,
        start: PartEmbeddings | None = None,
        **others: Any,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Train"):
            backbone = connected(model, vae, clip, clip_vision)
            settings = _settings(preset, backbone, steps=steps, learning_rate=learning_rate, seed=seed, **others)
            progress = _Progress(cls.hidden.unique_id, preset)
            try:
                embeddings = train(backbone, examples, settings, start=start, on_step=progress)
                preview = _preview(backbone, examples[0], embeddings, progress.last)
                progress.show(with_legend(preview, embeddings.names, embeddings.palette)[0])
                return io.NodeOutput(embeddings, {"loss": list(embeddings.losses)}, to_core(preview))
            except BaseException:  # ComfyUI's interrupt is a BaseException in newer cores
                saved = _autosave(progress.last)
                if saved is not None:
                    progress.say(f"Stopped. What was learned is in models/slime/autosave/{saved.name}")
                raise


def _bygone_inputs() -> list[Any]:
    """What older workflows may hold: each has a value that leaves the preset's choice."""

    def number(kind: Any, name: str, default: float, low: float, high: float, **more: Any) -> Any:
        return bygone(kind.Input(name, default=default, min=low, max=high, optional=True, **more))

    def choice(name: str, options: list[str]) -> Any:
        return bygone(io.Combo.Input(name, options=options, default=options[0], optional=True))

    return [
        bygone(io.String.Input("prompt", default="", optional=True)),
        number(io.Int, "views", 0, 0, 1000),
        number(io.Float, "crop", 0.0, 0.0, 1.0, step=0.05),
        number(io.Float, "rotation", -1.0, -1.0, 180.0, step=1.0),
        choice("flip", list(FLIP)),
        choice("recolor", list(RECOLOR)),
        number(io.Float, "l2", 0.0, 0.0, 10.0, step=0.001),
        number(io.Int, "timestep", 0, 0, 999),
        bygone(io.Boolean.Input("checkpointing", default=False, optional=True)),
        bygone(io.String.Input("cross_layers", default="", optional=True)),
        bygone(io.String.Input("self_layers", default="", optional=True)),
    ]


def _settings(
    preset: str,
    backbone: Backbone,
    seed: int,
    flip: str = "auto",
    recolor: str = "auto",
    rotation: float = -1.0,
    checkpointing: bool = False,
    cross_layers: str = "",
    self_layers: str = "",
    settings: Chosen | None = None,
    **plain: Any,
) -> Settings:
    """The preset with what a settings node says, or else with what the widgets of older workflows change.

    Their 0, empty, -1 and auto leave the preset's values; those of the other preset do not count.
    """
    if settings is not None:
        return make_preset(preset, backbone.info, seed=seed, **settings.of(preset))
    changes = {name: value or None for name, value in plain.items()}
    changes |= {"read_layers": cross_layers or None, "propagate_layers": self_layers or None}
    changes |= {"flip": FLIP[flip], "recolor": RECOLOR[recolor], "rotation": None if rotation < 0 else rotation}
    changes |= {"seed": seed, "checkpointing": checkpointing}
    used = setting_names(PRESETS[preset])
    wanted = {name: value for name, value in changes.items() if value is not None and name in used}
    return make_preset(preset, backbone.info, **wanted)


def _autosave(report: StepReport | None) -> Path | None:
    """Write the best rows so far to models/slime/autosave. What fails here does not hide why the training ended."""
    try:
        embeddings = report.embeddings() if report is not None else None
        if embeddings is None:
            return None
        path = save_embeddings(embeddings, autosave_path(embeddings.names))
    except Exception:
        logger.exception("SLiMe: training stopped early, and what was learned could not be saved")
        return None
    logger.warning("SLiMe: training stopped early; the best embeddings so far are in %s", path)
    return path


class _Progress:
    """Progress bar over the whole training, live overlay, a line of text in the node, and the check for cancel."""

    def __init__(self, node_id: str | None, preset: str) -> None:
        self.last: StepReport | None = None
        self._node_id, self._preset = node_id, preset
        self._bar = comfy.utils.ProgressBar(BAR)
        self._shown = self._said = 0.0
        self._probed = False
        self._began = time.monotonic()
        self.say("Encoding the views of the examples")  # in place of what the last run said

    def __call__(self, report: StepReport) -> None:
        if report.losses or self.last is None:
            self.last = report
        preview = None
        now = time.monotonic()
        if report.preview is not None and (now - self._shown >= PREVIEW_SECONDS or report.stage == "views"):
            image, maps = report.preview
            embeddings = report.embeddings()
            palette = embeddings.palette if embeddings is not None else default_palette(len(maps) - 1)
            preview = ("JPEG", live_preview(image, maps, palette), PREVIEW_SIDE)
            self._shown = now
        self._probed = self._probed or report.stage == "layers"
        done = done_share(report, self._preset, self._probed)
        self._bar.update_absolute(round(BAR * done), BAR, preview)
        if now - self._said >= TEXT_SECONDS or report.step == report.steps:
            self.say(progress_text(report, done, now - self._began))
            self._said = now
        comfy.model_management.throw_exception_if_processing_interrupted()

    def show(self, image: torch.Tensor) -> None:
        """The picture [h, w, 3] that stays in the node."""
        self._bar.update_absolute(BAR, BAR, ("JPEG", to_picture(image), PREVIEW_SIDE))

    def say(self, text: str) -> None:
        """A line of text in the node."""
        say(self._node_id, text)


def done_share(report: StepReport, preset: str, probed: bool = False) -> float:
    """How much of the whole training is behind, 0..1, by what its stages usually take; ``probed`` where it began with
    choosing layers."""
    before = 0.0
    rest = 1 - PROBE if probed else 1.0
    shares = ({"layers": PROBE} if probed else {}) | {name: rest * share for name, share in SHARES[preset].items()}
    for stage, share in shares.items():
        if stage == report.stage:
            return before + share * report.step / report.steps
        before += share
    return before + (1 - before) * report.step / report.steps


def progress_text(report: StepReport, done: float, elapsed: float) -> str:
    """One line: what is done, the loss, and the time left of the whole training after ``elapsed`` seconds."""
    words = [f"{STAGES[report.stage]} {report.step}/{report.steps}"]
    if "loss" in report.losses:
        words.append(f"loss {report.losses['loss']:.4g}")
    if 0 < done < 1:
        left = elapsed / done * (1 - done)
        words.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
    return ", ".join(words)


def _preview(backbone: Backbone, example: Example, embeddings: PartEmbeddings, last: StepReport | None) -> torch.Tensor:
    """The first example with its parts found; an instant fit brings the maps, the preset paper needs a pass.

    A picture that cannot be made costs no training: the example is shown as it is.
    """
    images = example.image[None]
    try:
        if last is not None and last.stage == "done" and last.preview is not None:
            labels = refine_maps(last.preview[1][None], images, "fast").argmax(1)
        else:
            labels = segment(backbone, images, embeddings)[0].label_map
    except comfy.model_management.InterruptProcessingException:  # an Exception in older cores
        raise
    except Exception:
        logger.exception("SLiMe: training is done, but its preview could not be made")
        return images
    return overlays(images, labels, embeddings.palette)
