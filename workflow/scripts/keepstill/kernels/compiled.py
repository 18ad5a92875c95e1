"""How kernels are compiled: to machine code that is kept in numba's cache, and runs without a lock.

Each entry from Python takes as long to compile as a small kernel, so only what Python calls has
one, and none has an entry from C.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

_njit: Any = njit  # its stub does not know all options
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "no_cfunc_wrapper": True}


def kernel(function: F) -> F:
    """Compile a function that Python calls."""
    compiled: F = _njit(**_OPTIONS)(function)
    return compiled


def part(function: F) -> F:
    """Compile a function that only kernels call."""
    compiled: F = _njit(**_OPTIONS, no_cpython_wrapper=True)(function)
    return compiled
