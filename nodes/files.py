"""Save and load learned embeddings in models/slime."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..slime.embedding_files import load_embeddings, save_embeddings
from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from .common import Embeddings, named_errors, schema

logger = logging.getLogger(__name__)

FOLDER = "slime"
PICTURES = Path(__file__).resolve().parent.parent / "example_workflows" / "pictures"
SUFFIX = ".safetensors"
NOTHING_SAVED = "(nothing saved yet)"
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff\\/]')
_DEVICES = re.compile(
    r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE
)  # Windows opens no file of such a name
LONGEST = 150  # bytes of a name; file systems take 255, a number and the ending come on top


def register_folder() -> None:
    """Make models/slime known for .safetensors only, keeping folders that extra_model_paths.yaml added."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {SUFFIX})


def place_pictures() -> None:
    """Put the small pictures of the bundled workflows where Load Image finds them, so that they run untouched."""
    target = Path(folder_paths.get_input_directory())
    for picture in PICTURES.iterdir() if PICTURES.is_dir() else ():
        try:
            if not (target / picture.name).exists():
                shutil.copyfile(picture, target / picture.name)
        except OSError as error:  # a folder that may not be written to: the workflows ask for pictures then
            logger.warning("SLiMe: %s could not be copied to %s (%s)", picture.name, target, error)


def _folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def save_path(name: str, overwrite: bool) -> Path:
    """Path in models/slime for a name a user typed; a number is added where the file exists and may not be replaced.

    Raises:
        SlimeError: empty names and names with path separators or characters that Windows refuses.
    """
    stem = name.strip().removesuffix(SUFFIX).strip()
    if not stem or stem.strip(".") == "":
        raise SlimeError("the file needs a name, for example car_parts.")
    bad = sorted(set(_FORBIDDEN.findall(stem)))
    if bad:
        shown = " ".join(repr(one)[1:-1] for one in bad)
        raise SlimeError(f"{name!r} cannot be a file name because of {shown}; use letters, digits, - and _.")
    if _DEVICES.fullmatch(stem) or stem.endswith("."):
        raise SlimeError(f'"{stem}" cannot be a file name on Windows; use another one.')
    if len(stem.encode()) > LONGEST:
        raise SlimeError(f"the file name is {len(stem.encode())} bytes long; at most {LONGEST} are possible.")
    path = _folder() / f"{stem}{SUFFIX}"
    number = 2
    while path.exists() and not overwrite:
        path = _folder() / f"{stem}_{number}{SUFFIX}"
        number += 1
    return path


def autosave_path(names: Sequence[str]) -> Path:
    stem = re.sub(r"[^\w-]+", "_", "_".join(names)).encode()[:60].decode(errors="ignore").strip("_") or "parts"
    return _folder() / "autosave" / f"{stem}_{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() % 1000:03d}{SUFFIX}"


class SLiMeSaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSaveEmbeddings",
            display_name="Save Learned Embeddings",
            description="Writes what SLiMe Train learned to models/slime: a small file to keep and to share.",
            search_aliases=["save slime", "save segmenter", "save part embeddings"],
            inputs=[
                Embeddings.Input("embeddings", tooltip="From SLiMe Train."),
                io.String.Input("filename", default="my_parts", tooltip="File name in models/slime, without folders."),
                io.Boolean.Input("overwrite", default=False, tooltip="Off: a number is added when the file exists."),
            ],
            outputs=[Embeddings.Output(display_name="embeddings", tooltip="The same embeddings, to go on with.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings: PartEmbeddings, filename: str, overwrite: bool = False) -> io.NodeOutput:
        with named_errors("Save Learned Embeddings"):
            path = save_embeddings(embeddings, save_path(filename, overwrite), overwrite)
        size = path.stat().st_size / 1024
        text = f"{path} ({size:.0f} KB): {', '.join(embeddings.names)}"
        return io.NodeOutput(embeddings, ui=ui.PreviewText(text))


class SLiMeLoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list(FOLDER)
        return schema(
            node_id="SLiMeLoadEmbeddings",
            display_name="Load Learned Embeddings",
            description="Reads embeddings from models/slime.",
            search_aliases=["load slime", "load segmenter", "load part embeddings"],
            inputs=[
                io.Combo.Input(
                    "filename",
                    options=files or [NOTHING_SAVED],
                    tooltip="A file in models/slime; refresh (R) after saving a new one.",
                ),
            ],
            outputs=[
                Embeddings.Output(display_name="embeddings", tooltip="For SLiMe Segment, or SLiMe Train to continue."),
                io.String.Output(display_name="names", tooltip="The parts in the file, separated by commas."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, filename: str) -> str:
        path = folder_paths.get_full_path(FOLDER, filename)
        if path is None:
            return filename
        status = os.stat(path)
        return f"{filename}/{status.st_mtime_ns}/{status.st_size}"

    @classmethod
    def execute(cls, filename: str) -> io.NodeOutput:
        with named_errors("Load Learned Embeddings"):
            path = folder_paths.get_full_path(FOLDER, filename)
            if path is None:
                raise SlimeError(f'there is no "{filename}" in models/slime. Save embeddings first, then refresh.')
            embeddings = load_embeddings(path)
        return io.NodeOutput(embeddings, ", ".join(embeddings.names))
