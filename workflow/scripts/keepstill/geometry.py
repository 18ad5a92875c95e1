"""Rigid motion and coordinates.

One convention in memory: world is RAS+ mm, and the one master matrix of a volume is
`moving_from_reference`, (4, 4) float64, from a point of the reference to the point of the
moving volume that shows the same tissue. Voxel positions are (x, y, z), from 0.
"""

import math

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.small import product, solution

Matrix = NDArray[np.float64]

# Radius of the sphere that stands for a head in Jenkinson's rms displacement (1999, TR99MJ1).
HEAD_RADIUS_MM = 80.0


def inverse(matrix: Matrix) -> Matrix:
    """Inverse of a (4, 4) affine.

    Raises
    ------
    ValueError
        If it is singular.
    """
    inverted, regular = solution(np.ascontiguousarray(matrix, dtype=np.float64), np.eye(4))
    if not regular:
        raise ValueError("singular affine")
    return inverted


def compose(*matrices: Matrix) -> Matrix:
    """Product of (4, 4) affines, left to right as written."""
    out = np.ascontiguousarray(matrices[0], dtype=np.float64)
    for matrix in matrices[1:]:
        out = product(out, np.ascontiguousarray(matrix, dtype=np.float64))
    return out


def translation(shift_mm: NDArray[np.float64]) -> Matrix:
    """(4, 4) affine that adds (3,) `shift_mm`."""
    out = np.eye(4)
    out[:3, 3] = shift_mm
    return out


def rigid_step(step: NDArray[np.float64]) -> Matrix:
    """Rigid (4, 4) affine of a Gauss-Newton step, about the origin.

    Parameters
    ----------
    step : (6,) float64
        Shifts (mm) and a rotation vector (rad); to first order the map is
        x -> x + shift + rotation x x.

    Notes
    -----
    The rotation is Cayley's: the unit quaternion along (1, rotation / 2). It needs no sine, whose
    last bit depends on the machine's library, and is exact in direction; its angle is
    2 atan(|rotation| / 2), equal to second order.
    """
    b, c, d = 0.5 * step[3], 0.5 * step[4], 0.5 * step[5]
    norm = 1.0 + b * b + c * c + d * d
    out = np.eye(4)
    out[:3, :3] = (
        np.array(
            [
                [1 + b * b - c * c - d * d, 2 * (b * c - d), 2 * (b * d + c)],
                [2 * (b * c + d), 1 - b * b + c * c - d * d, 2 * (c * d - b)],
                [2 * (b * d - c), 2 * (c * d + b), 1 - b * b - c * c + d * d],
            ]
        )
        / norm
    )
    out[:3, 3] = step[:3]
    return out


def step_size_mm(step: NDArray[np.float64]) -> float:
    """Rms displacement (mm) of a head of 80 mm radius by a small (6,) step about its centre.

    Jenkinson 1999, TR99MJ1, with A = rotation x: tr(A'A) = 2 |rotation|^2.
    """
    shift2 = float(step[0] ** 2 + step[1] ** 2 + step[2] ** 2)
    rotation2 = float(step[3] ** 2 + step[4] ** 2 + step[5] ** 2)
    return math.sqrt(shift2 + HEAD_RADIUS_MM**2 / 5.0 * 2.0 * rotation2)


def voxel_sizes_mm(affine: Matrix) -> NDArray[np.float64]:
    """Edge lengths (mm) of a voxel along its three axes, (3,) float64."""
    return np.sqrt(np.sum(np.asarray(affine, dtype=np.float64)[:3, :3] ** 2, axis=0))


def world(affine: Matrix, voxel: NDArray[np.float64]) -> NDArray[np.float64]:
    """World position (mm) of (..., 3) voxel positions under a (4, 4) affine."""
    a = np.asarray(affine, dtype=np.float64)
    return np.stack(
        [
            a[r, 0] * voxel[..., 0] + a[r, 1] * voxel[..., 1] + a[r, 2] * voxel[..., 2] + a[r, 3]
            for r in range(3)
        ],
        axis=-1,
    )


def field_centre_mm(affine: Matrix, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """World position (mm) of the centre of the field of view of a grid (nx, ny, nz)."""
    return world(affine, (np.array(shape, dtype=np.float64) - 1.0) / 2.0)


def pose_places_mm(matrices: Matrix, centre_mm: NDArray[np.float64]) -> Matrix:
    """Places (n, 12) whose distance is the rms displacement, mm, between (n, 4, 4) rigid maps.

    Jenkinson 1999, TR99MJ1, for a ball of 80 mm radius about (3,) `centre_mm`: the square is that
    of the centre's displacement, plus R^2 / 5 times that of the 3x3 parts.
    """
    centres = np.einsum("nij,j->ni", matrices[:, :3, :3], centre_mm) + matrices[:, :3, 3]
    turned = HEAD_RADIUS_MM / math.sqrt(5.0) * matrices[:, :3, :3]
    return np.concatenate([centres, turned.reshape(-1, 9)], axis=1)


def displacement_mm(
    found: Matrix, truth: Matrix, points_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean distance (mm) over (m, 3) points between where two (n, 4, 4) sets of maps send them."""
    difference = found[:, :3] - truth[:, :3]
    moved = np.einsum("nij,pj->npi", difference[:, :, :3], points_mm) + difference[:, None, :, 3]
    return np.linalg.norm(moved, axis=-1).mean(axis=-1)
