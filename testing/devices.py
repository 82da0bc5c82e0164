"""A simulated device: its tensors compute on the CPU and obey the rules of a real device.

It refuses tensors of two devices in one operation, as CUDA does, and on demand float64, as Apple's MPS does. Values are
real, so code that depends on them runs too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "simulated"
MOVES = {"_to_copy", "copy_", "_copy_from"}  # the only operations that may meet tensors of two devices


class _Module(_DummyBackendModule):
    """Module ``torch.simulated`` with what torch asks of it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_autocast_enabled(self) -> bool:
        return False


class _Rules:
    float64 = True
    waits = operations = 0


class Simulated(Tensor):
    """Tensor of the simulated device; ``held`` is the tensor that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Simulated:
        if held.dtype == torch.float64 and not _Rules.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        device = torch.device(NAME, 0)
        made: Simulated = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME} {self.held!r}"

    def __getitem__(self, index: Any) -> Any:  # torch moves lists in a way that is not simulated
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, *args, **(kwargs or {}))


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    strangers = [t for t in tensors if not isinstance(t, Simulated) and t.ndim > 0]
    here = any(isinstance(t, Simulated) for t in tensors)
    if here and strangers and name not in MOVES and not name.startswith("index"):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu in {func}")
    target = kwargs.get("device")
    stays = here if target is None else torch.device(target).type == NAME
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    _Rules.operations += here
    result = func(*tree_map(_open, args), **tree_map(_open, kwargs))
    if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
        return args[0]
    if name == "_local_scalar_dense" or not stays:
        _Rules.waits += here
        return result
    return tree_map(lambda value: Simulated(value) if isinstance(value, Tensor) else value, result)


def waits() -> int:
    """Return how often the host has waited for the device so far: values and tensors that it fetched."""
    return _Rules.waits


def operations() -> int:
    """Return how many operations the device has computed so far."""
    return _Rules.operations


def _open(value: Any) -> Any:
    return value.held if isinstance(value, Simulated) else value


@contextmanager
def simulated_device(float64: bool = True) -> Iterator[torch.device]:
    """Provide the device while the block lasts; without ``float64`` it refuses that type."""
    global _library
    if _library is None:
        _setup_privateuseone_for_python_backend(NAME, _Module())
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(_compute, "PrivateUse1")
    _Rules.float64 = float64
    yield torch.device(NAME, 0)


_library: Any = None
