"""Starting a program of the engine's: imports cost as much as some hundred volumes."""

import atexit
import gc
import sys
from typing import Any

# Imports make a million objects that stay; looking through them for garbage, time and again, and
# taking them apart at the end, costs 0.4 s. Memory is bounded all the same: arrays are freed by
# counting references.
_OBJECTS_BEFORE_COLLECTION = 200_000


def start_quickly() -> None:
    """Prepare a program of its own, before its costly imports, for those.

    Numba and nibabel look whether there is a scipy, for a BLAS and for Matlab's files (0.15 s);
    none of that is used here, so they are loaded as if there were none.
    """
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    atexit.register(gc.freeze)
    modules: dict[str, Any] = sys.modules
    if "scipy" in modules:
        return
    modules["scipy"] = None  # an import of it fails
    try:
        import nibabel  # noqa: F401
        import numba  # noqa: F401
    finally:
        del modules["scipy"]
