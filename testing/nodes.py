"""Values of node sockets, for tests that call nodes in this process."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .inprocess import NAME


def train_settings(preset: str, **values: Any) -> Any:
    """Return the value of a settings socket of SLiMe Train; layers by the names of :mod:`slime.settings`."""
    return import_module(f"{NAME}.nodes.train_settings").TrainSettingsValue(preset, values)
