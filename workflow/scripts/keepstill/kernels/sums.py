"""Sums of a Gauss-Newton step over the reference's sampling points."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel, part

# Columns of the Jacobian: shifts x, y, z (mm), rotations x, y, z (rad), relative intensity, and
# the strength of the ghost of echo-planar images, as a part of the image.
N_COLUMNS = 8
# Point i is added to lane i % 128 of a sum: the order is fixed, and lanes do not wait for one
# another.
SUM_LANES = 128
# Sums over fewer points than the first number go by as many lanes as the second.
_FEW, _FEW_LANES = 4 * SUM_LANES, 32


class Points(NamedTuple):
    """Sampling points of a reference, row by row of its grid.

    Attributes
    ----------
    rows : (n_rows, 5) int64
        y, z and first x of each row of points, their number, and where they begin in the
        arrays below, one row after the other.
    values : (n,) float32
        The reference's intensity.
    jacobian : (8, n) float32
        Its change per mm, rad and unit of relative intensity and of ghost.
    test_jacobian : (8, n) float32
        The low-passed Jacobian against which residuals are tested.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    jacobian: NDArray[np.float32]
    test_jacobian: NDArray[np.float32]


@kernel
def cross_sums(
    left: NDArray[np.float32], right: NDArray[np.float32], first: int, last: int
) -> NDArray[np.float64]:
    """Sums left right' over points first ... last - 1 of (p, n) and (q, n), as (p, q) float64."""
    out = np.zeros((left.shape[0], right.shape[0]))
    for a in range(left.shape[0]):
        for b in range(right.shape[0]):
            total = 0.0
            for i in range(first, last):
                total += np.float64(left[a, i]) * np.float64(right[b, i])
            out[a, b] = total
    return out


@kernel
def to_residuals(
    values: NDArray[np.float32], points: Points, spans: NDArray[np.int64], scale: float
) -> None:
    """Turn a moving volume's values at the points into residuals, in place.

    Parameters
    ----------
    values : (n,) float32
        Afterwards scale * moving - reference, 0 outside the spans.
    points : Points
    spans : (n_rows, 2) int64
        First and one past the last point of each row that lies inside the field of view.
    scale : float
        Factor that brings the moving volume's intensity to the reference's.
    """
    factor = np.float32(scale)
    for r in range(points.rows.shape[0]):
        n, first = points.rows[r, 3], points.rows[r, 4]
        low, high = first + spans[r, 0], first + spans[r, 1]
        values[first:low] = 0
        values[high : first + n] = 0
        row, reference_row = values[low:high], points.values[low:high]
        for i in range(row.size):
            row[i] = factor * row[i] - reference_row[i]


@kernel
def outside_normal(points: Points, spans: NDArray[np.int64]) -> NDArray[np.float64]:
    """test_jacobian' jacobian over the points outside the spans, (8, 8) float64."""
    whole = np.zeros(points.rows.shape[0], np.int64)
    return outside_normals(points, spans, whole, 1)[0]


@kernel
def outside_normals(
    points: Points, spans: NDArray[np.int64], parts: NDArray[np.int64], n_parts: int
) -> NDArray[np.float64]:
    """test_jacobian' jacobian over the points of each part that lie outside the spans.

    Parameters
    ----------
    points : Points
    spans : (n_rows, 2) int64
    parts : (n_rows,) int64
        Part that each row belongs to, 0 to n_parts - 1.
    n_parts : int

    Returns
    -------
    normals : (n_parts, 8, 8) float64
    """
    out = np.zeros((n_parts, N_COLUMNS, N_COLUMNS))
    for r in range(points.rows.shape[0]):
        n, first = points.rows[r, 3], points.rows[r, 4]
        _add_outer(out[parts[r]], points, first, first + spans[r, 0])
        _add_outer(out[parts[r]], points, first + spans[r, 1], first + n)
    return out


@kernel
def sums_of_parts(
    sums: NDArray[np.float64], parts: NDArray[np.int64], n_parts: int
) -> NDArray[np.float64]:
    """Sums (n_parts, p) of those rows of (n, p) that belong to each part; parts (n,) tells it."""
    out = np.zeros((n_parts, sums.shape[1]))
    for i in range(parts.size):
        for a in range(sums.shape[1]):
            out[parts[i], a] += sums[i, a]
    return out


@kernel
def block_sums(
    columns: NDArray[np.float32], residuals: NDArray[np.float32], blocks: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sums of residuals times each of some columns, and of their squares, block by block.

    Parameters
    ----------
    columns : (p, n) float32
    residuals : (n,) float32
    blocks : (n_blocks + 1,) int64
        Points where blocks begin and the last one ends.

    Returns
    -------
    sums : (n_blocks, p + 1) float64
    """
    p = columns.shape[0]
    out = np.zeros((blocks.size - 1, p + 1))
    lanes = np.empty((p + 1) * SUM_LANES)
    for block in range(blocks.size - 1):
        first, last = blocks[block], blocks[block + 1]
        n_lanes = SUM_LANES if last - first >= _FEW else _FEW_LANES
        lanes[: (p + 1) * n_lanes] = 0
        _add_lanes(lanes, residuals, columns, (first, last, n_lanes))
        for a in range(p + 1):
            for k in range(n_lanes):
                out[block, a] += lanes[a * n_lanes + k]
    return out


@part
def _add_outer(out: NDArray[np.float64], points: Points, low: int, high: int) -> None:
    for i in range(low, high):
        for a in range(N_COLUMNS):
            for b in range(N_COLUMNS):
                out[a, b] += np.float64(points.test_jacobian[a, i]) * np.float64(
                    points.jacobian[b, i]
                )


@part
def _add_lanes(
    lanes: NDArray[np.float64],
    residuals: NDArray[np.float32],
    columns: NDArray[np.float32],
    between: tuple[int, int, int],
) -> None:
    """Add products of residuals with each column, then with themselves, lane by lane.

    From the first point to the last but one, on so many lanes: `between` has the three.

    Indices are unsigned: a signed one may be negative and would have to be tested in each lane.
    """
    p, n = columns.shape
    flat = columns.reshape(-1)
    width = between[2]
    for first in range(between[0], between[1], width):
        at = np.uint64(first)
        n_lanes = min(width, between[1] - first)
        for a in range(p):
            column, total = np.uint64(a * n + first), np.uint64(a * width)
            for lane in range(n_lanes):
                k = np.uint64(lane)
                lanes[total + k] += np.float64(residuals[at + k]) * np.float64(flat[column + k])
        total = np.uint64(p * width)
        for lane in range(n_lanes):
            k = np.uint64(lane)
            lanes[total + k] += np.float64(residuals[at + k]) * np.float64(residuals[at + k])
