"""Sums of a Gauss-Newton step over the reference's sampling points."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Columns of the Jacobian: shifts x, y, z (mm), rotations x, y, z (rad), relative intensity.
N_COLUMNS = 7
# Point i is added to lane i % 128 of a sum: the order is fixed, and lanes do not wait for one
# another.
SUM_LANES = 128


class Points(NamedTuple):
    """Sampling points of a reference, row by row of its grid.

    Attributes
    ----------
    rows : (n_rows, 5) int64
        y, z and first x of each row of points, their number, and where they begin in the
        arrays below, one row after the other.
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
    points: Points, values: NDArray[np.float32], spans: NDArray[np.int64], scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """What one Gauss-Newton step needs, over the points inside the moving field of view.

    Parameters
    ----------
    points : Points
    values : (n,) float32
        Of the moving volume at the points; residuals afterwards, 0 outside.
    spans : (n_rows, 2) int64
        First and one past the last point of each row that lies inside.
    scale : float
        Factor that brings the moving volume's intensity to the reference's.

    Returns
    -------
    right : (7,) float64
        test_jacobian' (scale * moving - reference).
    outside : (7, 7) float64
        test_jacobian' jacobian over the points that lie outside, to be taken off the normal
        matrix.
    squares : float
        Sum of squared residuals.
    """
    outside = np.zeros((N_COLUMNS, N_COLUMNS))
    factor = np.float32(scale)
    for r in range(points.rows.shape[0]):
        n, first = points.rows[r, 3], points.rows[r, 4]
        low, high = first + spans[r, 0], first + spans[r, 1]
        _add_outer(outside, points, first, low)
        _add_outer(outside, points, high, first + n)
        values[first:low] = 0
        values[high : first + n] = 0
        row, reference_row = values[low:high], points.values[low:high]
        for i in range(row.size):
            row[i] = factor * row[i] - reference_row[i]
    lanes = np.zeros((N_COLUMNS + 1) * SUM_LANES)
    _add_lanes(lanes, values, points.test_jacobian)
    totals = _lane_totals(lanes)
    return totals[:N_COLUMNS], outside, totals[N_COLUMNS]


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
    lanes: NDArray[np.float64], residuals: NDArray[np.float32], jacobian: NDArray[np.float32]
) -> None:
    """Add products of residuals with the seven columns, then with themselves, lane by lane.

    Indices are unsigned: a signed one may be negative and would have to be tested in each lane.
    """
    n = residuals.size
    columns = jacobian.reshape(-1)
    for first in range(0, n, SUM_LANES):
        at = np.uint64(first)
        n_lanes = min(SUM_LANES, n - first)
        for a in range(N_COLUMNS):
            column, total = np.uint64(a * n + first), np.uint64(a * SUM_LANES)
            for lane in range(n_lanes):
                k = np.uint64(lane)
                lanes[total + k] += np.float64(residuals[at + k]) * np.float64(columns[column + k])
        total = np.uint64(N_COLUMNS * SUM_LANES)
        for lane in range(n_lanes):
            k = np.uint64(lane)
            lanes[total + k] += np.float64(residuals[at + k]) * np.float64(residuals[at + k])


@njit(cache=True, nogil=True)
def _lane_totals(lanes: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.zeros(N_COLUMNS + 1)
    for a in range(out.size):
        for k in range(SUM_LANES):
            out[a] += lanes[a * SUM_LANES + k]
    return out
