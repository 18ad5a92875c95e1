"""Courses over a run's volumes, and the maps over sampling points that go with them."""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.aliasing import N_FIELDS, Fitted, fill_waves, take_off_fields
from keepstill.kernels.compiled import kernel
from keepstill.kernels.sums import N_COLUMNS, Points

# Point i is added to lane i % 32 of a sum, as in `keepstill.kernels.sums`.
_LANES = 32


@kernel
def fill_left(
    left: NDArray[np.float32],
    points: Points,
    fitted: Fitted,
    fields: NDArray[np.float32],
    steps: NDArray[np.float32],
) -> None:
    """What steps and fields leave of the residuals of many volumes.

    Parameters
    ----------
    left : (m, k) float32
        Filled, at the k points of the rows, one row after the other.
    points : Points
        Of some rows, which still say their places among all points.
    fitted : Fitted
        With the spans and phases of these rows.
    fields : (7, n) float32
        From `keepstill.kernels.aliasing.fit_fields`.
    steps : (m, 8) float32
    """
    waves = np.empty((N_FIELDS - 1, fitted.tables.shape[2]), np.float32)
    to = 0
    for r in range(points.rows.shape[0]):
        n, at = points.rows[r, 3], points.rows[r, 4]
        for v in range(left.shape[0]):
            fill_waves(waves, fitted.tables[v], fitted.phases[v, r], n)
            row = left[v, to : to + n]
            row[:] = 0
            low, high = fitted.spans[v, r, 0], fitted.spans[v, r, 1]
            for i in range(low, high):
                row[i] = fitted.residuals[fitted.slots[v], at + i]
            take_off_fields(row, waves, fields, (0, at, low, high))
            for a in range(N_COLUMNS):
                for i in range(low, high):
                    row[i] -= steps[v, a] * points.jacobian[a, at + i]
        to += n


@kernel
def map_of(left: NDArray[np.float32], course: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over volumes of (m, k), each times its value of a course (m,), as (k,) float64."""
    out = np.zeros(left.shape[1])
    for v in range(left.shape[0]):
        for i in range(out.size):
            out[i] += course[v] * np.float64(left[v, i])
    return out


@kernel
def course_of(left: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over points of (m, k), each times its weight (k,), as (m,) float64."""
    chosen = np.flatnonzero(weights)
    out = np.zeros(left.shape[0])
    for v in range(left.shape[0]):
        for i in chosen:
            out[v] += weights[i] * np.float64(left[v, i])
    return out


@kernel
def take_off_pattern(
    residuals: NDArray[np.float32],
    points: Points,
    spans: NDArray[np.int64],
    pattern: NDArray[np.float32],
    probe: NDArray[np.float32],
) -> float:
    """Take as much of a pattern off a volume's residuals, in place, as leaves no probe in them.

    Parameters
    ----------
    residuals : (n,) float32
        0 outside the spans.
    points : Points
    spans : (n_rows, 2) int64
    pattern, probe : (n,) float32

    Returns
    -------
    amount : float
        How much of it there was.
    """
    found, whole = np.zeros(_LANES), np.zeros(_LANES)
    for r in range(points.rows.shape[0]):
        low, high = points.rows[r, 4] + spans[r, 0], points.rows[r, 4] + spans[r, 1]
        for first in range(low, high, _LANES):
            for lane in range(min(_LANES, high - first)):
                i = np.uint64(first + lane)
                found[lane] += np.float64(probe[i]) * np.float64(residuals[i])
                whole[lane] += np.float64(probe[i]) * np.float64(pattern[i])
    amount = found.sum() / whole.sum() if whole.sum() > 0 else 0.0
    factor = np.float32(amount)
    for r in range(points.rows.shape[0]):
        at = points.rows[r, 4]
        for k in range(at + spans[r, 0], at + spans[r, 1]):
            residuals[k] -= factor * pattern[k]
    return amount
