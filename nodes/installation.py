"""Tell what is wrong with how the extension was installed, once at start-up."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import nodes

logger = logging.getLogger(__name__)
SERVED = re.compile(r"[A-Za-z0-9._-]+")  # folder names from which ComfyUI serves scripts to the page
NODE = "SLiMeTrain"


def check_installation(folder: Path) -> None:
    """Warn of a folder name that ComfyUI cannot serve scripts from, and of a second copy of the extension."""
    if not SERVED.fullmatch(folder.name):
        logger.warning(
            'SLiMe: ComfyUI serves no scripts from a folder called "%s": the painter and the help pages are missing. '
            "Rename it to SLiMe and restart.",
            folder.name,
        )
    other = nodes.NODE_CLASS_MAPPINGS.get(NODE)
    if other is not None:
        logger.warning(
            "SLiMe: there are two copies of this extension, %s and %s. Remove one and restart.",
            getattr(other, "RELATIVE_PYTHON_MODULE", "another folder"),
            folder.name,
        )
