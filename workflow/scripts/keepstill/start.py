"""Starting a program of the engine's: imports cost as much as some hundred volumes."""

import atexit
import gc
import importlib
import sys
from typing import Any

# Imports make a million objects that stay; looking through them for garbage, time and again, and
# taking them apart at the end, costs 0.4 s. Memory is bounded all the same: arrays are freed by
# counting references.
_OBJECTS_BEFORE_COLLECTION = 200_000


def start_quickly() -> None:
    """Prepare a program of its own, before its costly imports, for those."""
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    atexit.register(gc.freeze)
    without_scipy("numba")


def without_scipy(name: str) -> Any:
    """A module that looks whether there is a scipy, imported as if there were none.

    Numba looks for a BLAS, nibabel for Matlab's files (0.15 s); none of that is used here.
    """
    if name in sys.modules or "scipy" in sys.modules:
        return importlib.import_module(name)
    modules: dict[str, Any] = sys.modules
    modules["scipy"] = None  # an import of it fails
    try:
        return importlib.import_module(name)
    finally:
        del modules["scipy"]
