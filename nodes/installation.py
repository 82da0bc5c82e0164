"""Tell what is wrong with how the extension was installed, once at start-up."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
SERVED = re.compile(r"[A-Za-z0-9._-]+")  # folder names from which ComfyUI serves scripts to the page
NODE = "SLiMeTrain"


def check_installation(folder: Path, registered: Mapping[str, Any]) -> None:
    """Warn of a folder name that ComfyUI cannot serve scripts from, and of a second copy of the extension.

    Args:
        folder: of this copy.
        registered: classes of the nodes that are there already, by id.
    """
    if not SERVED.fullmatch(folder.name):
        logger.warning(
            'SLiMe: ComfyUI serves no scripts from a folder called "%s": the painter and the help pages are missing. '
            "Rename it to SLiMe and restart.",
            folder.name,
        )
    other = registered.get(NODE)
    if other is not None:
        logger.warning(
            "SLiMe: there are two copies of this extension, %s and %s. Remove one and restart.",
            getattr(other, "RELATIVE_PYTHON_MODULE", "another folder"),
            folder.name,
        )
