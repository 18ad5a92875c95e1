"""How kernels are compiled: to machine code that is kept on disk, and runs without a lock.

Each entry from Python takes as long to compile as a small kernel, so only what Python calls has
one, and none has an entry from C.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

from keepstill.kernels.cache import kept

F = TypeVar("F", bound=Callable[..., Any])

_njit: Any = njit  # its stub does not know all options
# No fastmath: nothing is fused or reordered, so all processors find the same bytes.
_OPTIONS: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True}


def kernel(function: F) -> F:
    """Compile a function that Python calls."""
    compiled: F = kept(_njit(**_OPTIONS)(function), function)
    return compiled


def part(function: F) -> F:
    """Compile a function that only kernels call."""
    compiled: F = kept(_njit(**_OPTIONS, no_cpython_wrapper=True)(function), function)
    return compiled
