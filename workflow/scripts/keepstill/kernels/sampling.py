"""Sampling a B-spline along rows of a rigidly moved grid."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from keepstill.kernels.bspline import FIRST_TAP, LANES, N_TAPS, PAD, fill_weights
from keepstill.kernels.compiled import kernel, part

# A position this close to the border, in voxels, is still inside the field of view: rounding
# must not push the outermost voxels of an unmoved volume out of it.
FIELD_TOLERANCE = 1e-6


# Points of a row that are worked on at once, and the length of a line of work space: the sixteen
# lanes of the last piece may run over.
CHUNK = 64
_LINE = CHUNK + LANES
# Lines of work space: six weights for each of x, y, z, then the sums.
_LINE_Y, _LINE_Z, _LINE_SUM, _N_LINES = N_TAPS, 2 * N_TAPS, 3 * N_TAPS, 3 * N_TAPS + 1
_LOW = PAD + FIRST_TAP
_U = np.uint64


class Work(NamedTuple):
    """Work space for `fill_row`.

    Attributes
    ----------
    bases : (3, 64) int64
        Index of the coefficient that each point's taps are counted from, for x, y, z.
    fractions : (64,) float32
    lines : (19, 80) float32
        Weights of the six taps for x, y, z, and sums.
    """

    bases: NDArray[np.int64]
    fractions: NDArray[np.float32]
    lines: NDArray[np.float32]


@kernel
def new_work() -> Work:
    """Room for `fill_row`."""
    return Work(
        np.zeros((3, CHUNK), np.int64),
        np.zeros(CHUNK, np.float32),
        np.zeros((_N_LINES, _LINE), np.float32),
    )


@kernel
def inside_span(
    start: tuple[float, float, float],
    step: tuple[float, float, float],
    n: int,
    shape: tuple[float, float, float],
) -> tuple[int, int]:
    """First and one past the last of the points start + i step that lie in the field of view.

    Parameters
    ----------
    start, step : (x, y, z)
        Position of point 0 and the difference between points, in voxels.
    n : int
        Number of points.
    shape : (nx, ny, nz)
        The field reaches from 0 to size - 1 on each axis.

    Returns
    -------
    low, high : int
        low == high where no point is inside. A line meets a box in one piece, so nothing
        between the two is outside.
    """
    low, high = 0, n
    while low < high and not _is_inside(start, step, low, shape):
        low += 1
    while high > low and not _is_inside(start, step, high - 1, shape):
        high -= 1
    return low, high


@njit(cache=True, nogil=True, inline="always")
def _is_inside(
    start: tuple[float, float, float],
    step: tuple[float, float, float],
    i: int,
    shape: tuple[float, float, float],
) -> bool:
    x, y, z = start[0] + i * step[0], start[1] + i * step[1], start[2] + i * step[2]
    return (
        x >= -FIELD_TOLERANCE
        and x <= shape[0] - 1 + FIELD_TOLERANCE
        and y >= -FIELD_TOLERANCE
        and y <= shape[1] - 1 + FIELD_TOLERANCE
        and z >= -FIELD_TOLERANCE
        and z <= shape[2] - 1 + FIELD_TOLERANCE
    )


@njit(cache=True, nogil=True, inline="always")
def _line(
    m: NDArray[np.float64], x: int, y: int, z: int
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Source of voxel (x, y, z), and its change to the next voxel in x."""
    start = (
        m[0, 3] + x * m[0, 0] + y * m[0, 1] + z * m[0, 2],
        m[1, 3] + x * m[1, 0] + y * m[1, 1] + z * m[1, 2],
        m[2, 3] + x * m[2, 0] + y * m[2, 1] + z * m[2, 2],
    )
    return start, (m[0, 0], m[1, 0], m[2, 0])


@kernel
def narrow_spans(
    spans: NDArray[np.int64],
    rows: NDArray[np.int64],
    moving_voxel_from_voxel: NDArray[np.float64],
    moving_shape: tuple[int, int, int],
    inset: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> int:
    """Cut spans down, in place, to the points with a source inside the field of view.

    Parameters
    ----------
    spans : (n_rows, 2) int64
        First and one past the last point of each row that may count.
    rows : (n_rows, 5) int64
        y, z, first x, number and place of each row of points.
    moving_voxel_from_voxel : (4, 4) float64
        Voxel (x, y, z) of the rows' grid -> voxel of the moving volume.
    moving_shape : (nx, ny, nz)
    inset : (x, y, z)
        Voxels by which the field is smaller than the volume, at both ends of each axis.

    Returns
    -------
    n_inside : int
        Number of points left.
    """
    n_inside = 0
    smaller = (
        moving_shape[0] - 2 * inset[0],
        moving_shape[1] - 2 * inset[1],
        moving_shape[2] - 2 * inset[2],
    )
    for r in range(rows.shape[0]):
        start, step = _line(moving_voxel_from_voxel, rows[r, 2], rows[r, 0], rows[r, 1])
        start = (start[0] - inset[0], start[1] - inset[1], start[2] - inset[2])
        low, high = inside_span(start, step, rows[r, 3], smaller)
        low, high = max(low, spans[r, 0]), min(high, spans[r, 1])
        if high <= low:
            low = high = 0
        spans[r, 0], spans[r, 1] = low, high
        n_inside += high - low
    return n_inside


@kernel
def leave_out_slices(
    spans: NDArray[np.int64],
    rows: NDArray[np.int64],
    moving_voxel_from_voxel: NDArray[np.float64],
    slices: NDArray[np.int64],
) -> int:
    """Cut spans down, in place, to points further than a slice from any of some slices.

    Where a slice cuts a row in two, the longer piece is kept.

    Parameters
    ----------
    spans, rows, moving_voxel_from_voxel
        As in `narrow_spans`.
    slices : (m,) int64
        z of the moving volume's slices to keep away from.

    Returns
    -------
    n_inside : int
        Number of points left.
    """
    n_inside = 0
    for r in range(rows.shape[0]):
        start, step = _line(moving_voxel_from_voxel, rows[r, 2], rows[r, 0], rows[r, 1])
        best_low, best_high, low = 0, 0, spans[r, 0]
        for i in range(spans[r, 0], spans[r, 1] + 1):
            ends = i == spans[r, 1]
            if not ends:
                for z in slices:
                    ends = ends or abs(start[2] + i * step[2] - z) < 1
            if ends:
                if i - low > best_high - best_low:
                    best_low, best_high = low, i
                low = i + 1
        spans[r, 0], spans[r, 1] = best_low, best_high
        n_inside += best_high - best_low
    return n_inside


@kernel
def fill_row(
    out: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    degree: int,
    slots: tuple[int, int],
    start: NDArray[np.float64],
    step: NDArray[np.float64],
    work: Work,
) -> None:
    """B-spline values at start + i step, for points inside the field of view.

    Parameters
    ----------
    out : (n,) float32
        Filled.
    coefficients : padded float32
        From `fill_coefficients`, same degree.
    degree : int
        1 to 5.
    slots : (first, number)
        Tap slots of the degree, from `tap_slots`; in x all six are always summed.
    start, step : (3,) float64
        Position (x, y, z) of point 0 and the difference between points, in voxels.
    work
        From `new_work`.
    """
    for first in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - first)
        _fill_weight_lines(degree, (first, n), start, step, work)
        _fill_pieces(out[first : first + n], coefficients, slots, work)


@part
def _fill_weight_lines(
    degree: int,
    points: tuple[int, int],
    start: NDArray[np.float64],
    step: NDArray[np.float64],
    work: Work,
) -> None:
    """Base indices and weights of points[1] points from point number points[0] on."""
    first, n = points
    fractions = work.fractions
    shift = 0.0 if degree % 2 == 1 else 0.5
    for axis in range(3):
        base = work.bases[axis]
        for i in range(n):
            p = start[axis] + (first + i) * step[axis]
            whole = np.floor(p + shift)
            base[i] = np.int64(whole)
            fractions[i] = np.float32(p - whole)
        fill_weights(degree, fractions[:n], work.lines[N_TAPS * axis : N_TAPS * (axis + 1)])


@part
def _fill_pieces(
    out: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    slots: tuple[int, int],
    work: Work,
) -> None:
    """Sum the taps, piece by piece.

    A nearly unturned row meets the same y and z coefficients, and x coefficients that move on
    by one a point, for many points in a row. It is split where one of the three base indices
    breaks that pattern; within a piece, sixteen outputs load contiguous coefficients.
    """
    x, y, z = work.bases[0], work.bases[1], work.bases[2]
    row_stride = coefficients.shape[2]
    plane_stride = coefficients.shape[1] * row_stride
    flat, flat_lines = coefficients.reshape(-1), work.lines.reshape(-1)
    sums = work.lines[_LINE_SUM]
    n = out.size
    i = 0
    while i < n:
        offset, here_y, here_z = x[i] - i, y[i], z[i]
        end = i + 1
        last = min(n, i + LANES)
        while end < last and y[end] == here_y and z[end] == here_z and x[end] - end == offset:
            end += 1
        origin = (here_z + _LOW) * plane_stride + (here_y + _LOW) * row_stride + x[i] + _LOW
        _fill_block(flat, (origin, row_stride, plane_stride), slots, flat_lines, i)
        for k in range(i, end):
            out[k] = sums[k]
        i = end


@part
def _fill_block(
    coefficients: NDArray[np.float32],
    strides: tuple[int, int, int],
    slots: tuple[int, int],
    lines: NDArray[np.float32],
    i: int,
) -> None:
    """Sixteen neighbouring sums over the taps, from point i on; lanes past the piece are unread.

    Parameters
    ----------
    coefficients : (n,) float32
        The padded volume as one line.
    strides : (origin, row, plane)
        Where tap slot (0, 0, 0) of point i stands, and the distances to the next row and plane.
    slots : (first, number), of the degree's taps
    lines : (19 * 80,) float32
        The lines of work space as one; the sums are filled.

    Notes
    -----
    Two rows of taps are summed in one expression, which halves the loads of x weights and sums; of
    an odd number the last is paired with a slot of zero weight. Indices are unsigned: a signed one
    would have to be tested, and then sixteen neighbours are no longer one load.
    """
    point = _U(i)
    x0, x1, x2 = point, point + _U(_LINE), point + _U(2 * _LINE)
    x3, x4, x5 = point + _U(3 * _LINE), point + _U(4 * _LINE), point + _U(5 * _LINE)
    sums = point + _U(_LINE_SUM * _LINE)
    for k in range(LANES):
        lines[sums + _U(k)] = 0
    for kz in range(slots[0], slots[0] + slots[1]):
        z = point + _U((_LINE_Z + kz) * _LINE)
        for jy in range(slots[0], slots[0] + slots[1], 2):
            y = point + _U((_LINE_Y + jy) * _LINE)
            next_y = y + _U(_LINE)
            c = _U(strides[0] + kz * strides[2] + jy * strides[1])
            d = c + _U(strides[1])
            for k in range(LANES):
                lane = _U(k)
                lines[sums + lane] += lines[z + lane] * (
                    lines[y + lane]
                    * (
                        lines[x0 + lane] * coefficients[c + lane]
                        + lines[x1 + lane] * coefficients[c + lane + _U(1)]
                        + lines[x2 + lane] * coefficients[c + lane + _U(2)]
                        + lines[x3 + lane] * coefficients[c + lane + _U(3)]
                        + lines[x4 + lane] * coefficients[c + lane + _U(4)]
                        + lines[x5 + lane] * coefficients[c + lane + _U(5)]
                    )
                    + lines[next_y + lane]
                    * (
                        lines[x0 + lane] * coefficients[d + lane]
                        + lines[x1 + lane] * coefficients[d + lane + _U(1)]
                        + lines[x2 + lane] * coefficients[d + lane + _U(2)]
                        + lines[x3 + lane] * coefficients[d + lane + _U(3)]
                        + lines[x4 + lane] * coefficients[d + lane + _U(4)]
                        + lines[x5 + lane] * coefficients[d + lane + _U(5)]
                    )
                )


@kernel
def fill_unmoved(
    out: NDArray[np.float32],
    rows: NDArray[np.int64],
    spans: NDArray[np.int64],
    volume: NDArray[np.float32],
) -> None:
    """Voxels of a (nz, ny, nx) volume at rows of its own grid; 0 outside a row's span."""
    for r in range(rows.shape[0]):
        y, z, x, n, at = rows[r]
        low, high = spans[r]
        row = out[at : at + n]
        row[:low] = 0
        row[high:] = 0
        if high > low:
            for i in range(low, high):
                row[i] = volume[z, y, x + i]


@kernel
def fill_directly(
    out: NDArray[np.float32],
    rows: NDArray[np.int64],
    spans: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    spline: tuple[int, int, int],
    moving_voxel_from_voxel: NDArray[np.float64],
) -> None:
    """B-spline values at rows of voxels, by the sum over all taps; 0 outside a row's span.

    Parameters
    ----------
    out : (n,) float32
        Filled.
    rows, spans
        As in `narrow_spans`.
    coefficients : padded float32
        As in `fill_row`.
    spline : (degree, first, number)
        Degree and tap slots.
    moving_voxel_from_voxel : (4, 4) float64
        As in `narrow_spans`.
    """
    work = new_work()
    degree, slots = spline[0], (spline[1], spline[2])
    start, step = np.empty(3), np.empty(3)
    for r in range(rows.shape[0]):
        y, z, x, n, at = rows[r]
        low, high = spans[r]
        row = out[at : at + n]
        row[:low] = 0
        row[high:] = 0
        if high > low:
            first, change = _line(moving_voxel_from_voxel, x, y, z)
            for axis in range(3):
                start[axis] = first[axis] + low * change[axis]
                step[axis] = change[axis]
            fill_row(row[low:high], coefficients, degree, slots, start, step, work)


@kernel
def fill_nearest(
    out: NDArray[np.float32],
    rows: NDArray[np.int64],
    spans: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    spline: tuple[int, int, int],
    moving_voxel_from_voxel: NDArray[np.float64],
    moving_shape: tuple[int, int, int],
) -> None:
    """B-spline values at the nearest points of the field of view, for voxels outside the spans.

    Parameters
    ----------
    out : (n,) float32
        Filled outside the rows' spans.
    rows, spans, coefficients, spline, moving_voxel_from_voxel
        As in `fill_directly`.
    moving_shape : (nx, ny, nz)
    """
    work = new_work()
    degree, slots = spline[0], (spline[1], spline[2])
    nearest, step = np.empty(3), np.zeros(3)
    for r in range(rows.shape[0]):
        y, z, x, n, at = rows[r]
        first, change = _line(moving_voxel_from_voxel, x, y, z)
        for i in range(n):
            if spans[r, 0] <= i < spans[r, 1]:
                continue
            for axis in range(3):
                position = first[axis] + i * change[axis]
                nearest[axis] = min(max(position, 0.0), moving_shape[axis] - 1.0)
            fill_row(out[at + i : at + i + 1], coefficients, degree, slots, nearest, step, work)
