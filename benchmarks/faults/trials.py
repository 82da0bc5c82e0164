"""Count trials, and check the conditions that must hold after each."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from slime import SlimeError

from ..rows import Row

SECONDS, BYTES = 2.0, 200e6


class Trials:
    """Counter of trials, of the slowest and the largest one, and of failures."""

    def __init__(self, task: str) -> None:
        self.task, self.count, self.refused, self.slowest, self.largest = task, 0, 0, 0.0, 0
        self.remark = ""
        self.failures: list[str] = []

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Run one trial; a failure is listed with ``name``, by which it can be repeated."""
        self.count += 1
        tracemalloc.start()
        start = time.monotonic()
        try:
            work()
        except SlimeError:
            self.refused += 1
        except Exception as error:
            self.failures.append(f"{self.task} {name}: {type(error).__name__}: {str(error)[:200]}")
        seconds, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if seconds > SECONDS or peak > BYTES:
            self.failures.append(f"{self.task} {name}: {seconds:.1f} s, {peak / 1e6:.0f} MB")
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, peak)

    def check(self, name: str, holds: bool) -> None:
        """Record a failure unless a condition that must hold after a trial is true."""
        if not holds:
            self.failures.append(f"{self.task} {name}")

    def row(self) -> Row:
        return {
            "trials": self.count,
            "refused": self.refused,
            "failed": len(self.failures),
            "failures": self.failures[:50],
            "slowest_s": self.slowest,
            "largest_MB": self.largest / 1e6,
            "remark": self.remark,
        }
