"""Test robustness: hostile files, errors and interrupts in the middle of nodes, kills, a full disk, flags.

    python dev.py benchmark faults [--quick] [--seed 0] [--json FILE] [--tasks TASK ...]

Each trial must end in success or in a SlimeError within 2 s and 200 MB, and leave everything as it was. The program
exits with 1 and names every trial that did not. Tasks whose rows are in the JSON file already are not run again.
``--quick`` runs a tenth of the trials and no server. The test suite runs a part of them, and of those on the server.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import files, nodes, server
from .trials import Trials

Task = Callable[[Trials, int, random.Random, Path], None]
TASKS: dict[str, tuple[Task, int]] = {
    "files": (files.files, 10_000),
    "texts": (files.texts, 3_000),
    "paintings": (files.paintings, 1_000),
    "official": (files.official, 100),
    "savers": (files.savers, 20),
    "disk": (files.disk, 20),
    "errors": (nodes.errors, 50),
    "interrupts": (server.interrupts, 100),
    "kills": (server.kills, 30),
    "queue": (server.queue, 200),
    "flags": (server.flags, 1),
}
ON_A_SERVER = ("interrupts", "kills", "queue", "flags")


def run(task: str, count: int, seed: int = 0) -> Trials:
    """Run all trials of a task, in a folder of its own."""
    trials = Trials(task)
    with tempfile.TemporaryDirectory() as folder:
        TASKS[task][0](trials, count, random.Random(f"{task}/{seed}"), Path(folder))
    return trials
