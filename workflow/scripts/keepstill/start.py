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

    Numba imports scipy, where there is one, to see whether it brings a BLAS (0.15 s); no kernel
    calls one, so numba is loaded as if there were none.
    """
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    atexit.register(gc.freeze)
    modules: dict[str, Any] = sys.modules
    if "scipy" in modules:
        return
    modules["scipy"] = None  # an import of it fails
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del modules["scipy"]
