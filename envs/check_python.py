"""Says in one line why this Python cannot hold keepstill's environment."""

import importlib.util
import sys

OLDEST = (3, 11)
NEWEST = (3, 13)


def problem():
    """Reason why this Python is not fit, or None.

    Returns
    -------
    str or None
        One line that names this Python, what is needed and what to do.
    """
    found = sys.version_info[:2]
    name = f"python{found[0]}.{found[1]}"
    if not OLDEST <= found <= NEWEST:
        return (
            f"{sys.executable} is {name}; keepstill needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}: "
            "name one, as in `make demo PYTHON=python3.12`"
        )
    # Debian ships venv without ensurepip, and then cannot make an environment with pip.
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        return (
            f"{sys.executable} cannot make virtual environments: install its venv module "
            f"(Debian and Ubuntu: apt install {name}-venv)"
        )
    return None


if __name__ == "__main__":
    reason = problem()
    if reason:
        sys.stderr.write(f"keepstill: {reason}\n")
        sys.exit(2)
