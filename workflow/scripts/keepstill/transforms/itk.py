"""ITK text files: a 3 x 3 matrix, row by row, a shift and a centre; reference -> moving, LPS mm."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError
from keepstill.transforms.text import read_text

MAGIC = "#Insight Transform File"
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_KINDS = ("AffineTransform", "MatrixOffsetTransformBase")


def read_itk(path: Path) -> NDArray[np.float64]:
    """Transforms of an ITK text file, (n, 4, 4), RAS+ mm.

    Raises
    ------
    InputError
        If there are none, or one that is no affine transform of points in space.
    """
    lines = [line.partition(":") for line in read_text(path).splitlines()]
    fields = {
        name: [value.split() for key, _, value in lines if key.strip() == name]
        for name in ("Transform", "Parameters", "FixedParameters")
    }
    kinds = {words[0] if words else "" for words in fields["Transform"]}
    for kind in sorted(kinds):
        if not kind.startswith(_KINDS) or not kind.endswith("_3_3"):
            raise InputError(f"{path}: {kind} found; needs {' or '.join(_KINDS)} in 3 dimensions")
    try:
        numbers = np.array(fields["Parameters"], np.float64).reshape(-1, 12)
        centres = np.array(fields["FixedParameters"], np.float64).reshape(len(numbers), 3)
    except ValueError as error:
        raise InputError(f"{path}: no ITK transforms ({error})") from error
    return np.array([_ras(*both) for both in zip(numbers, centres, strict=True)]).reshape(-1, 4, 4)


def _ras(numbers: NDArray[np.float64], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """One transform, (4, 4), RAS+ mm; x -> A (x - c) + c + t, in LPS."""
    out = np.eye(4)
    out[:3, :3] = numbers[:9].reshape(3, 3)
    # The sum is left alone where the centre is the origin, to the last bit.
    moved = centre - out[:3, :3] @ centre if centre.any() else 0.0
    out[:3, 3] = numbers[9:] + moved
    return np.asarray(RAS_FROM_LPS @ out @ RAS_FROM_LPS)
