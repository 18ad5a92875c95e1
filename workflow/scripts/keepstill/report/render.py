"""Templates filled, equal text for equal values."""

import math
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

MISSING = "n/a"


def render(template: str, **values: Any) -> str:
    """Fill `template` with `values`, each escaped."""
    environment = Environment(
        loader=PackageLoader("keepstill.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "size": size, "url": quote}
    return environment.get_template(template).render(**values)


def number(value: float | None, digits: int = 0) -> str:
    """`value` with a fixed number of `digits`, or ``n/a`` if it is None or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:z.{digits}f}"


def size(n_bytes: int) -> str:
    """Give a file's size in decimal units, with three figures."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
