"""SLiMe Train: learn part embeddings, with live preview, cancel and autosave."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from PIL import Image

from ..slime.backbones.base import Backbone
from ..slime.decode.refine import refine_maps
from ..slime.embedding_files import save_embeddings
from ..slime.embeddings import PartEmbeddings
from ..slime.examples import Example
from ..slime.parts.draw import legend_below
from ..slime.parts.palette import default_palette
from ..slime.segment import segment
from ..slime.train import TRAINERS, StepReport, train
from ..slime.train import preset as make_preset
from .backbones import build_backbone, clip_vision_input, model_inputs
from .common import (
    EmbeddingsSocket,
    ExamplesSocket,
    live_preview,
    named_errors,
    overlays,
    schema,
    seed_input,
    show_text,
    to_core,
    to_pil,
    to_tensor,
)
from .files import autosave_path
from .loading import FLOW_MODELS
from .train_settings import SettingsSocket, TrainSettingsValue

logger = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512
TEXT_SECONDS = 0.25
BAR = 1000
STAGES = {
    "layers": "Choosing layers, view",
    "views": "Encoding view",
    "features": "Extracting features of view",
    "fit": "Fitting, step",
    "train": "Training, step",
    "done": "Done, step",
}
PROBE_SHARE = 0.5  # estimated share of the layer probe in the whole time
# Estimated share of each stage in the rest of the time; the last stage takes what is left.
STAGE_SHARES = {
    "instant": {"views": 0.5, "features": 0.4},
    "paper": {"views": 0.08, "features": 0.08},
    "concept": {"views": 0.1},
}


class SLiMeTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeTrain",
            essentials_category="Image Tools",
            display_name="SLiMe Train",
            description="Learns the parts of the examples from the features of the connected models.",
            search_aliases="one shot segmentation, few shot, train segmenter, teach, learn mask, part segmentation",
            inputs=[
                *model_inputs(
                    f"SD1.x, SD2.x or SDXL; with the preset instant also {FLOW_MODELS}, SAM3. LoRAs on it are used."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the same checkpoint. Needed for training; SAM3 and vision encoders need none.",
                ),
                ExamplesSocket.Input("examples", tooltip="From SLiMe Example or SLiMe Part Painter. One is enough."),
                io.Combo.Input(
                    "preset",
                    options=list(TRAINERS),
                    default="instant",
                    tooltip="instant: fast, without gradients through the model. paper: the procedure of the SLiMe "
                    "paper; trains through the model, which takes minutes and more memory. Stable Diffusion only.",
                ),
                seed_input("Seed of noise and augmentation. The same seed learns the same embeddings."),
                EmbeddingsSocket.Input(
                    "init_embeddings", optional=True, tooltip="Embeddings of the same parts to continue training from."
                ),
                SettingsSocket.Input(
                    "settings",
                    optional=True,
                    tooltip="From SLiMe Instant Settings or SLiMe Paper Settings; by default those of the preset.",
                ),
                clip_vision_input(),
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    display_name="embeddings", tooltip="For SLiMe Segment and Save SLiMe Embeddings."
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Image.Output(display_name="preview", tooltip="The first example, segmented with the result."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        examples: Sequence[Example],
        preset: str,
        seed: int = 0,
        model: Any = None,
        vae: Any = None,
        clip: Any = None,
        clip_vision: Any = None,
        init_embeddings: PartEmbeddings | None = None,
        settings: TrainSettingsValue | None = None,
    ) -> io.NodeOutput:
        with named_errors("SLiMe Train"):
            backbone = build_backbone(model, vae, clip, clip_vision)
            changes = {} if settings is None else settings.for_preset(preset)
            chosen = make_preset(preset, backbone.info, seed=seed, **changes)
            progress = TrainingProgress(cls.hidden.unique_id, preset)
            with autosave_on_error(progress):
                embeddings = train(backbone, examples, chosen, init_embeddings=init_embeddings, on_step=progress)
                preview = _preview(backbone, examples[0], embeddings, progress.last)
                progress.show(legend_below(preview, embeddings.names, embeddings.palette))
                return io.NodeOutput(embeddings, {"loss": list(embeddings.losses)}, to_core(to_tensor(preview)[None]))


def _autosave(report: StepReport | None) -> Path | None:
    """Save the best embeddings so far to models/slime/autosave; a failure here does not hide why training stopped."""
    try:
        embeddings = report.embeddings() if report is not None else None
        if embeddings is None:
            return None
        path = save_embeddings(embeddings, autosave_path(embeddings.names))
    except Exception:
        logger.exception("SLiMe: training stopped early, and the result so far could not be saved")
        return None
    logger.warning("SLiMe: training stopped early; the best embeddings so far are in %s", path)
    return path


class TrainingProgress:
    """Progress bar over the whole training, live preview, a line of text in the node, and the check for cancel."""

    def __init__(self, node_id: str | None, preset: str) -> None:
        self.last: StepReport | None = None
        self._node_id, self._preset = node_id, preset
        self._bar = comfy.utils.ProgressBar(BAR)
        self._previewed = self._told = 0.0
        self._shares: dict[str, float] = {}  # that are done, by stage
        self._started = time.monotonic()
        self.show_text("Encoding the views of the examples")  # replaces the last run's text

    def __call__(self, report: StepReport) -> None:
        if report.losses or self.last is None:
            self.last = report
        preview = None
        now = time.monotonic()
        if report.preview is not None and (now - self._previewed >= PREVIEW_SECONDS or report.stage == "views"):
            image, maps = report.preview
            embeddings = report.embeddings()
            palette = embeddings.palette if embeddings is not None else default_palette(len(maps) - 1)
            preview = ("JPEG", live_preview(image, maps, palette), PREVIEW_SIDE)
            self._previewed = now
        self._shares[report.stage] = report.step / report.steps
        done = done_share(self._shares, self._preset)
        self._bar.update_absolute(round(BAR * done), BAR, preview)
        if now - self._told >= TEXT_SECONDS or report.step == report.steps:
            self.show_text(progress_text(report, done, now - self._started))
            self._told = now
        comfy.model_management.throw_exception_if_processing_interrupted()

    def show(self, picture: Image.Image) -> None:
        """Show the picture that stays in the node."""
        self._bar.update_absolute(BAR, BAR, ("JPEG", picture, PREVIEW_SIDE))

    def show_text(self, text: str) -> None:
        """Show a line of text in the node."""
        show_text(self._node_id, text)


@contextmanager
def autosave_on_error(progress: TrainingProgress) -> Iterator[None]:
    """Save the best embeddings so far on error and on cancel, and say where."""
    try:
        yield
    except BaseException:  # ComfyUI's interrupt is a BaseException in newer cores
        saved = _autosave(progress.last)
        if saved is not None:
            progress.show_text(f"Stopped. The result so far is in {saved}")
        raise


def done_share(stages: Mapping[str, float], preset: str) -> float:
    """Estimate the share of the training that is done, 0..1, from the share of every stage so far."""
    if "done" in stages:  # a fit may end before its last step
        return 1.0
    probe = PROBE_SHARE if "layers" in stages else 0.0
    shares = {"layers": probe} | {name: (1 - probe) * share for name, share in STAGE_SHARES.get(preset, {}).items()}
    rest = 1 - sum(shares.values())
    last = next((done for name, done in stages.items() if name not in shares), None)
    if last is not None:  # the stages before it have ended, whatever they announced
        return 1 - rest * (1 - last)
    return sum(share * stages.get(name, 0.0) for name, share in shares.items())


def progress_text(report: StepReport, done: float, elapsed: float) -> str:
    """Return one line: step, loss, and the estimated time left after ``elapsed`` seconds."""
    words = [f"{STAGES[report.stage]} {report.step}/{report.steps}"]
    if "loss" in report.losses:
        words.append(f"loss {report.losses['loss']:.4g}")
    if 0 < done < 1:
        left = elapsed / done * (1 - done)
        words.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
    return ", ".join(words) + (f". {report.remark}" if report.remark else "")


def _preview(backbone: Backbone, example: Example, embeddings: PartEmbeddings, last: StepReport | None) -> Image.Image:
    """Segment the first example for the preview; an instant training has the maps already, paper needs a pass.

    An error here does not cost the training: the example is shown unsegmented.
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
        logger.exception("SLiMe: training succeeded, but the preview failed")
        return to_pil(example.image)
    return next(overlays(images, labels, embeddings.palette))
