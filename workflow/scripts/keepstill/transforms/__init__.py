"""Transforms of other tools: each format read in a file of its own, into the one convention.

What comes out is always `moving_from_reference`, (n, 4, 4) float64, RAS+ world mm: a point of the
reference -> the point of the volume that shows the same tissue.
"""

from keepstill.transforms.formats import KNOWN, read_any
from keepstill.transforms.space import Space

__all__ = ["KNOWN", "Space", "read_any"]
