"""Sums of a Gauss-Newton step over the reference's sampling points."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from keepstill.kernels.sampling import fill_row, inside_span, new_work

# Columns of the Jacobian: shifts x, y, z (mm), rotations x, y, z (rad), relative intensity.
N_COLUMNS = 7
# Points of a row are padded to a multiple of this; the sums run in as many lanes.
SUM_LANES = 8


class Points(NamedTuple):
    """Sampling points of a reference, row by row of its grid.

    Attributes
    ----------
    rows : (n_rows, 5) int64
        y, z and first x of each row of points, their number, and where they begin in the
        arrays below. Rows are padded with zero weight to a multiple of `SUM_LANES`.
    values : (n,) float32
        The reference's intensity.
    jacobian : (7, n) float32
        Its change per mm, rad and unit of relative intensity.
    test_jacobian : (7, n) float32
        The low-passed Jacobian against which residuals are tested.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    jacobian: NDArray[np.float32]
    test_jacobian: NDArray[np.float32]


class Moving(NamedTuple):
    """A moving volume, ready to be sampled.

    Attributes
    ----------
    coefficients : padded float32
        From `fill_coefficients`.
    shape : (nx, ny, nz)
    degree : int
        1 to 5.
    slots : (first, number)
        From `tap_slots`.
    """

    coefficients: NDArray[np.float32]
    shape: tuple[int, int, int]
    degree: int
    slots: tuple[int, int]


@njit(cache=True, nogil=True)
def normal_matrix(points: Points) -> NDArray[np.float64]:
    """test_jacobian' jacobian over all points, (7, 7) float64."""
    out = np.zeros((N_COLUMNS, N_COLUMNS))
    for a in range(N_COLUMNS):
        for b in range(N_COLUMNS):
            total = 0.0
            for i in range(points.values.size):
                total += np.float64(points.test_jacobian[a, i]) * np.float64(points.jacobian[b, i])
            out[a, b] = total
    return out


@njit(cache=True, nogil=True)
def step_sums(
    points: Points,
    moving: Moving,
    voxel_from_point: NDArray[np.float64],
    scale: float,
    spans: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], float, int]:
    """What one Gauss-Newton step needs, over the points inside the moving field of view.

    Parameters
    ----------
    points, moving
    voxel_from_point : (4, 4) float64
        Voxel (x, y, z) of the reference -> voxel of the moving volume.
    scale : float
        Factor that brings the moving volume's intensity to the reference's.
    spans : (n_rows, 2) int64
        First and one past the last point of each row that may count; narrowed, in place, to
        those inside the field of view.

    Returns
    -------
    right : (7,) float64
        test_jacobian' (scale * moving - reference).
    outside : (7, 7) float64
        test_jacobian' jacobian over the points that lie outside, to be taken off the normal
        matrix.
    squares : float
        Sum of squared residuals.
    n_inside : int
    """
    m = voxel_from_point
    work = new_work()
    longest = 0
    for r in range(points.rows.shape[0]):
        longest = max(longest, points.rows[r, 3])
    residual = np.zeros(longest + SUM_LANES, np.float32)
    lanes = np.zeros((N_COLUMNS + 1, SUM_LANES))
    outside = np.zeros((N_COLUMNS, N_COLUMNS))
    start, step = np.empty(3), m[:3, 0].copy()
    n_inside = 0
    for r in range(points.rows.shape[0]):
        y, z, x, n, first = points.rows[r]
        for axis in range(3):
            start[axis] = m[axis, 3] + x * m[axis, 0] + y * m[axis, 1] + z * m[axis, 2]
        low, high = inside_span(start, step, n, moving.shape)
        low, high = max(low, spans[r, 0]), min(high, spans[r, 1])
        if high < low:
            low = high = 0
        spans[r, 0], spans[r, 1] = low, high
        _add_outer(outside, points, first, first + low)
        _add_outer(outside, points, first + high, first + n)
        if high == low:
            continue
        n_inside += high - low
        residual[:] = 0
        for axis in range(3):
            start[axis] += low * step[axis]
        inner = residual[low:high]
        fill_row(inner, moving.coefficients, moving.degree, moving.slots, start, step, work)
        for i in range(low, high):
            residual[i] = np.float32(scale) * residual[i] - points.values[first + i]
        _add_lanes(lanes, residual, points.test_jacobian, first, n)
    return _lane_totals(lanes, N_COLUMNS), outside, _lane_totals(lanes, N_COLUMNS + 1)[-1], n_inside


@njit(cache=True, nogil=True)
def _add_outer(out: NDArray[np.float64], points: Points, low: int, high: int) -> None:
    for i in range(low, high):
        for a in range(N_COLUMNS):
            for b in range(N_COLUMNS):
                out[a, b] += np.float64(points.test_jacobian[a, i]) * np.float64(
                    points.jacobian[b, i]
                )


@njit(cache=True, nogil=True)
def _add_lanes(
    lanes: NDArray[np.float64],
    residual: NDArray[np.float32],
    jacobian: NDArray[np.float32],
    first: int,
    n: int,
) -> None:
    """Add one row: point i goes to lane i % 8, so that the order of the sums is fixed."""
    for b in range(0, n, SUM_LANES):
        r = residual[b:][:SUM_LANES]
        for a in range(N_COLUMNS):
            column = jacobian[a][first + b :][:SUM_LANES]
            sums = lanes[a]
            for k in range(SUM_LANES):
                sums[k] += np.float64(r[k]) * np.float64(column[k])
        squares = lanes[N_COLUMNS]
        for k in range(SUM_LANES):
            squares[k] += np.float64(r[k]) * np.float64(r[k])


@njit(cache=True, nogil=True)
def _lane_totals(lanes: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    out = np.zeros(n)
    for a in range(n):
        for k in range(SUM_LANES):
            out[a] += lanes[a, k]
    return out
