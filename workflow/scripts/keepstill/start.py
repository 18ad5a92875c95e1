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
_EXTRAS = ("scipy", "yaml")


def start_quickly() -> None:
    """Prepare a program of its own, before its costly imports, for those."""
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    atexit.register(gc.freeze)
    without_extras("numba")


def without_extras(name: str) -> Any:
    """A module that looks for other packages, imported as if they were not there.

    Numba looks for a BLAS in scipy and for options in a YAML file, nibabel for Matlab's files in
    scipy (0.15 s); none of that is used here.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [extra for extra in _EXTRAS if extra not in modules] if name not in modules else []
    modules.update(dict.fromkeys(hidden))  # an import of None fails
    try:
        return importlib.import_module(name)
    finally:
        for extra in hidden:
            del modules[extra]
