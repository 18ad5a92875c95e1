"""Tables of numbers in text files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError


def read_text(path: Path) -> str:
    """A text file whole.

    Raises
    ------
    InputError
        If it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: no text; needs one of transforms") from error


def read_numbers(path: Path, n_columns: int) -> NDArray[np.float64]:
    """Rows of numbers, (n, n_columns); lines that begin with ``#`` are comments.

    Raises
    ------
    InputError
        If a line has another number of columns, or a cell that is no number.
    """
    lines = [line.split() for line in read_text(path).splitlines()]
    rows = [cells for cells in lines if cells and not cells[0].startswith("#")]
    for row, cells in enumerate(rows):
        if len(cells) != n_columns:
            raise InputError(f"{path}: {len(cells)} columns in row {row + 1}; needs {n_columns}")
    try:
        return np.array(rows, np.float64).reshape(-1, n_columns)
    except ValueError as error:
        raise InputError(f"{path}: {error}; needs numbers") from error
