"""Process items in batches that shrink when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .errors import SlimeError

T = TypeVar("T")
LARGEST_BATCH = 16
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def in_batches(count: int, size: int, work: Callable[[slice], T]) -> Iterator[T]:
    """Yield the results of ``work`` on consecutive slices of ``count`` items, ``size`` at a time.

    Out of memory, the size is halved and the slice is tried again.

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
                    "Out of GPU memory with a single image. Close other programs or use a smaller model; start "
                    "ComfyUI with --lowvram, or the command line with --dtype float16."
                ) from error
            size //= 2
            torch.cuda.empty_cache()  # does nothing without CUDA
            continue
        start += size
        yield result


def batch_for(device: torch.device, one: float, free: float | None = None) -> int:
    """Return the batch size on a device where an image needs ``one`` bytes; half of the memory is left for the maps.

    ``free`` is the device's free memory in bytes, which CUDA tells by itself.
    """
    if device.type == "cpu":
        return 1  # more is no faster, and results do not depend on neighbours
    if free is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return int(min(max(0.5 * free / max(one, 1.0), 1), LARGEST_BATCH))


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Raise SlimeError if the model returned NaN or infinite values (overflow in half precision)."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise SlimeError(
            "The model returned NaN or infinite values. Start ComfyUI with --force-fp32 or --bf16-unet, or the command "
            "line with --dtype float32."
        )
