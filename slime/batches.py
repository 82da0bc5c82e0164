"""Work on many items in sub-batches that shrink when memory runs out, and what came out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .errors import SlimeError

T = TypeVar("T")
LARGEST_BATCH = 16
CPU_BATCH = 1  # more at once is no faster there, and so results do not depend on neighbours
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


def batch_for(free: float, one: float) -> int:
    """Sub-batch for ``free`` bytes when an image needs ``one``; half of the memory is left for the maps."""
    return int(min(max(0.5 * free / max(one, 1.0), 1), LARGEST_BATCH))


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Raises SlimeError where a model gave NaN or infinite values (half precision that overflows)."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise SlimeError("The model returned NaN or infinite values; start ComfyUI with --force-fp32 or --bf16-unet.")
