"""Work on many items in sub-batches that shrink when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .errors import SlimeError

T = TypeVar("T")
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def in_batches(count: int, size: int, work: Callable[[slice], T]) -> Iterator[T]:
    """Results of ``work`` on consecutive slices of ``count`` items, ``size`` at a time.

    Where a slice does not fit the memory it is halved and tried again.

    Raises:
        SlimeError: a single item does not fit.
    """
    start = 0
    while start < count:
        try:
            result = work(slice(start, min(start + size, count)))
        except OUT_OF_MEMORY as error:
            if size == 1:
                raise SlimeError(
                    "The GPU's memory does not suffice for one image. Close other programs, start ComfyUI with "
                    "--lowvram, or use a smaller model."
                ) from error
            size //= 2
            free_memory()
            continue
        start += size
        yield result


def free_memory() -> None:
    """Give cached blocks back to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
