"""SPM: rp_*.txt; moving -> reference, RAS+ world, about the world's origin, M = T Rx Ry Rz."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill.transforms.text import read_numbers


def read_rp(path: Path) -> NDArray[np.float64]:
    """Transforms of an rp_*.txt file, (n, 4, 4), RAS+ mm.

    Its columns are shifts (mm) and rotations (rad), as ``spm_matrix`` takes them.
    """
    rows = read_numbers(path, 6)
    return np.asarray(np.linalg.inv(np.array([_spm_matrix(row) for row in rows]).reshape(-1, 4, 4)))


def _spm_matrix(row: NDArray[np.float64]) -> NDArray[np.float64]:
    (cos_x, cos_y, cos_z), (sin_x, sin_y, sin_z) = np.cos(row[3:]), np.sin(row[3:])
    pitch = np.array([[1, 0, 0], [0, cos_x, sin_x], [0, -sin_x, cos_x]])
    roll = np.array([[cos_y, 0, sin_y], [0, 1, 0], [-sin_y, 0, cos_y]])
    yaw = np.array([[cos_z, sin_z, 0], [-sin_z, cos_z, 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = pitch @ roll @ yaw
    out[:3, 3] = row[:3]
    return out
