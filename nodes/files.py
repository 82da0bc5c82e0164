"""Save SLiMe Embeddings and Load SLiMe Embeddings: files in models/slime, or a text inside a workflow."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..slime.data.file_names import DEVICE
from ..slime.edit import describe
from ..slime.embedding_files import from_text, load_embeddings, save_embeddings, to_text
from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from .common import EmbeddingsSocket, advanced, named_errors, schema

logger = logging.getLogger(__name__)

FOLDER = "slime"
SAMPLE_IMAGES = Path(__file__).resolve().parent.parent / "example_workflows" / "pictures"
SUFFIX = ".safetensors"
NOTHING_SAVED = "(nothing saved yet)"
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff\\/]')
LONGEST = 150  # bytes of a name; file systems allow 255, and a number and the suffix are added


def register_folder() -> None:
    """Register models/slime for .safetensors only, keeping folders that extra_model_paths.yaml added."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {SUFFIX})


def copy_sample_images() -> None:
    """Copy the templates' small files to where Load Image and Load 3D find them, so that they run as they are."""
    for file in (path for path in SAMPLE_IMAGES.rglob("*") if path.is_file()):
        target = Path(folder_paths.get_input_directory()) / file.relative_to(SAMPLE_IMAGES)
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        except OSError as error:  # a read-only folder: the templates ask for images then
            logger.warning("SLiMe: could not copy the sample file %s to %s (%s)", file.name, target, error)


def _folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def save_path(name: str, overwrite: bool) -> Path:
    """Return the path in models/slime for a name; a number is added if the file exists and must not be replaced.

    Raises:
        SlimeError: empty names and names with path separators or characters that Windows refuses.
    """
    stem = name.strip().removesuffix(SUFFIX).strip()
    if not stem or stem.strip(".") == "":
        raise SlimeError("The file name is empty. Write one, for example car_parts.")
    bad = sorted(set(_FORBIDDEN.findall(stem)))
    if bad:
        shown = " ".join(repr(character)[1:-1] for character in bad)
        raise SlimeError(f"{name!r} cannot be a file name because of {shown}. Use letters, digits, - and _.")
    if DEVICE.match(stem) or stem.endswith("."):
        raise SlimeError(f'"{stem}" cannot be a file name on Windows. Use another one.')
    if len(stem.encode()) > LONGEST:
        raise SlimeError(
            f"The file name is {len(stem.encode())} bytes long; at most {LONGEST} are possible. Use a shorter one."
        )
    path = _folder() / f"{stem}{SUFFIX}"
    number = 2
    while path.exists() and not overwrite:
        path = _folder() / f"{stem}_{number}{SUFFIX}"
        number += 1
    return path


def autosave_path(names: Sequence[str]) -> Path:
    """Return a path in models/slime/autosave of the parts' names and the time; the last digits make it unique."""
    stem = re.sub(r"[^\w-]+", "_", "_".join(names)).encode()[:60].decode(errors="ignore").strip("_") or "parts"
    now = datetime.now().strftime("%Y%m%d_%H%M%S_%f")
    return _folder() / "autosave" / f"{stem}_{now}{SUFFIX}"


class SLiMeSaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSaveEmbeddings",
            display_name="Save SLiMe Embeddings",
            description="Saves trained parts to models/slime: a small file to keep and to share. Also shows them as "
            "text, which can be shared inside a workflow.",
            search_aliases="save learned embeddings, save segmenter, save part embeddings, embeddings to text, "
            "share segmenter",
            inputs=[
                EmbeddingsSocket.Input("embeddings", tooltip="From SLiMe Train."),
                io.String.Input(
                    "filename",
                    default="my_parts",
                    tooltip="File name in models/slime, without folders. The node shows the whole path.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Off: a number is added if the file exists."),
            ],
            outputs=[
                EmbeddingsSocket.Output(display_name="embeddings", tooltip="The same embeddings, unchanged."),
                io.String.Output(
                    display_name="text",
                    tooltip="The embeddings as text, for the input text of Load SLiMe Embeddings. Empty if they are "
                    "too large for a workflow.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings: PartEmbeddings, filename: str, overwrite: bool = False) -> io.NodeOutput:
        with named_errors("Save SLiMe Embeddings"):
            path = save_embeddings(embeddings, save_path(filename, overwrite), overwrite)
        size = path.stat().st_size / 1024
        saved = f"{path} ({size:.0f} KB): {', '.join(embeddings.names)}"
        try:
            text = to_text(embeddings)
        except SlimeError as error:
            return io.NodeOutput(embeddings, "", ui=ui.PreviewText(f"{saved}\n\nNo text: {error}"))
        return io.NodeOutput(embeddings, text, ui=ui.PreviewText(f"{saved}\n\n{text}"))


class SLiMeLoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list(FOLDER)
        return schema(
            node_id="SLiMeLoadEmbeddings",
            display_name="Load SLiMe Embeddings",
            description="Loads trained parts from models/slime, or from a text of Save SLiMe Embeddings; shows what is "
            "inside.",
            search_aliases="load learned embeddings, load segmenter, load part embeddings, embeddings from text, "
            "embeddings info",
            inputs=[
                io.Combo.Input(
                    "filename",
                    options=files or [NOTHING_SAVED],
                    tooltip="A file in models/slime. Press R after saving a new one.",
                ),
                advanced(
                    io.String.Input(
                        "text",
                        default="",
                        multiline=True,
                        optional=True,
                        tooltip="A text from Save SLiMe Embeddings, which begins with slime1:. Used instead of the "
                        "file; connect clip in SLiMe Segment.",
                    )
                ),
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    display_name="embeddings", tooltip="For SLiMe Segment, or SLiMe Train to continue."
                ),
                io.String.Output(display_name="names", tooltip="The part names, separated by commas."),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename: Any = None) -> bool:
        """Accept any file name: a workflow with a text needs no file, and execute says what is missing."""
        del filename
        return True

    @classmethod
    def fingerprint_inputs(cls, filename: str | None = None, text: str | None = None) -> str:
        # A name that comes by a link is not known here: then any file may be the one.
        names = [filename] if filename else folder_paths.get_filename_list(FOLDER)
        paths = [folder_paths.get_full_path(FOLDER, name) for name in names] if not text else []
        stamps = [(path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths if path is not None]
        return f"{filename}/{text}/{stamps}"

    @classmethod
    def execute(cls, filename: str, text: str = "") -> io.NodeOutput:
        with named_errors("Load SLiMe Embeddings"):
            embeddings = from_text(text) if text.strip() else _load(filename)
        return io.NodeOutput(embeddings, ", ".join(embeddings.names), ui=ui.PreviewText(describe(embeddings)))


def _load(filename: str) -> PartEmbeddings:
    path = folder_paths.get_full_path(FOLDER, filename)
    if path is None:
        raise SlimeError(
            f'There is no file "{filename}" in models/slime. Save embeddings with Save SLiMe Embeddings, press R, and '
            "choose it again."
        )
    return load_embeddings(path)
