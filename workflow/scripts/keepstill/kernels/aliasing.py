"""Waves of aliasing at sampling points: fitted to the residuals of many volumes, and taken off.

A wave is what sampling makes of detail finer than two voxels: it turns once while the head moves
by one voxel along an axis, and how strong it is, is fixed to the head. See `keepstill.run_model`.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from keepstill.kernels.sums import N_COLUMNS, Points

# Fields of the model: a constant, then cosine and sine for each axis of the moving grid.
N_FIELDS = 7
# Entries of the lower triangle of a (7, 7) matrix, row after row.
N_FACTORS = N_FIELDS * (N_FIELDS + 1) // 2
_TURN = 2 * np.pi


class Fitted(NamedTuple):
    """Volumes that a model is fitted to.

    Attributes
    ----------
    residuals : (n_slots, n) float32
        A volume's residuals at the points, 0 outside its spans; may be mapped.
    slots : (m,) int64
        Slot of each volume.
    spans : (m, n_rows, 2) int64
        First and one past the last point of each row inside each volume's field of view.
    maps : (m, 3, 4) float64
        Voxel (x, y, z, 1) of the reference -> voxel of the volume.
    """

    residuals: NDArray[np.float32]
    slots: NDArray[np.int64]
    spans: NDArray[np.int64]
    maps: NDArray[np.float64]


@njit(cache=True, nogil=True)
def wave_table(to_moving: NDArray[np.float64], n: int) -> NDArray[np.float32]:
    """Cosine and sine of how far each axis' wave has turned after 0 ... n - 1 steps in x.

    Parameters
    ----------
    to_moving : (3, 4) float64
        Voxel (x, y, z, 1) of the reference -> voxel of the volume.

    Returns
    -------
    table : (3, 2, n) float32
    """
    out = np.empty((3, 2, n), np.float32)
    for axis in range(3):
        slope = to_moving[axis, 0] - np.rint(to_moving[axis, 0])
        for i in range(n):
            out[axis, 0, i] = np.cos(_TURN * slope * i)
            out[axis, 1, i] = np.sin(_TURN * slope * i)
    return out


@njit(cache=True, nogil=True)
def fill_waves(
    waves: NDArray[np.float32],
    table: NDArray[np.float32],
    to_moving: NDArray[np.float64],
    row: NDArray[np.int64],
) -> None:
    """Cosine and sine of each axis' wave at the points of a row.

    Parameters
    ----------
    waves : (6, l) float32
        Filled for the row's points.
    table : (3, 2, l) float32
        From `wave_table`.
    to_moving : (3, 4) float64
    row : (5,) int64
        y, z, first x, number and place.
    """
    n = row[3]
    for axis in range(3):
        m = to_moving[axis]
        start = m[0] * row[2] + m[1] * row[0] + m[2] * row[1] + m[3]
        start -= np.rint(start)
        c, s = np.float32(np.cos(_TURN * start)), np.float32(np.sin(_TURN * start))
        turned_c, turned_s = table[axis, 0], table[axis, 1]
        cosine, sine = waves[2 * axis], waves[2 * axis + 1]
        for i in range(n):
            cosine[i] = c * turned_c[i] - s * turned_s[i]
        for i in range(n):
            sine[i] = s * turned_c[i] + c * turned_s[i]


@njit(cache=True, nogil=True)
def fill_factors(
    factors: NDArray[np.float32], points: Points, fitted: Fitted, ridge: float
) -> None:
    """Cholesky factors of the normal matrices of the fields, a (7, 7) matrix for each point.

    Parameters
    ----------
    factors : (28, k) float32
        Filled for the points of a block: rows of lower triangles, their diagonals inverted.
    points : Points
        Of the block: its rows alone, which still say their places among all points.
    fitted : Fitted
        With the spans of the block's rows.
    ridge : float
        What is known of the waves' strength beforehand: noise variance over wave variance.
    """
    length, first = points.rows[:, 3].max(), points.rows[0, 4]
    waves = np.empty((N_FIELDS - 1, length), np.float32)
    factors[:] = 0
    for v in range(fitted.slots.size):
        table = wave_table(fitted.maps[v], length)
        for r in range(points.rows.shape[0]):
            fill_waves(waves, table, fitted.maps[v], points.rows[r])
            low, high = fitted.spans[v, r, 0], fitted.spans[v, r, 1]
            at = points.rows[r, 4] - first
            _add_products(factors[:, at + low : at + high], waves[:, low:high])
    one = np.float32(1)
    for a in range(N_FIELDS):
        diagonal = factors[a * (a + 3) // 2]
        for i in range(diagonal.size):
            diagonal[i] += np.float32(ridge) if a else np.float32(1e-3)
    for a in range(N_FIELDS):
        for b in range(a + 1):
            entry = factors[a * (a + 1) // 2 + b]
            for k in range(b):
                left, right = factors[a * (a + 1) // 2 + k], factors[b * (b + 1) // 2 + k]
                for i in range(entry.size):
                    entry[i] -= left[i] * right[i]
            if a == b:
                for i in range(entry.size):
                    entry[i] = one / np.sqrt(entry[i])
            else:
                pivot = factors[b * (b + 3) // 2]
                for i in range(entry.size):
                    entry[i] *= pivot[i]


@njit(nogil=True, inline="always")
def _add_products(factors: NDArray[np.float32], waves: NDArray[np.float32]) -> None:
    n = waves.shape[1]
    for i in range(n):
        factors[0, i] += np.float32(1)
    for a in range(N_FIELDS - 1):
        base = (a + 1) * (a + 2) // 2
        for i in range(n):
            factors[base, i] += waves[a, i]
        for b in range(a + 1):
            for i in range(n):
                factors[base + b + 1, i] += waves[a, i] * waves[b, i]


@njit(cache=True, nogil=True)
def fit_fields(
    fields: NDArray[np.float32],
    factors: NDArray[np.float32],
    points: Points,
    fitted: Fitted,
    steps: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Fields that explain the residuals best, and what is left of them for each volume's motion.

    Parameters
    ----------
    fields : (7, n) float32
        Filled at the points of the block.
    factors : (28, k) float32
        From `fill_factors`, of the same block.
    points : Points
        Of the block, as there.
    fitted : Fitted
        As there.
    steps : (m, 8) float32
        Steps of each volume that are taken off its residuals beforehand.

    Returns
    -------
    right : (m, 8) float64
        test_jacobian' (residuals - steps - fields) over the block.
    """
    m, length = fitted.slots.size, points.rows[:, 3].max()
    tables = np.empty((m, 3, 2, length), np.float32)
    for v in range(m):
        tables[v] = wave_table(fitted.maps[v], length)
    waves = np.empty((m, N_FIELDS - 1, length), np.float32)
    left = np.empty((m, length), np.float32)
    lanes = np.zeros((m, N_COLUMNS, length), np.float32)
    solved = np.empty((N_FIELDS, length), np.float32)
    first = points.rows[0, 4]
    for r in range(points.rows.shape[0]):
        row = points.rows[r]
        n, at = row[3], row[4]
        solved[:] = 0
        for v in range(m):
            fill_waves(waves[v], tables[v], fitted.maps[v], row)
            _take_off_step(
                left[v], fitted.residuals[fitted.slots[v]], points.jacobian, steps[v], row
            )
            low, high = fitted.spans[v, r, 0], fitted.spans[v, r, 1]
            left[v, :low] = 0
            left[v, high:] = 0
            _add_right(solved, waves[v], left[v], n)
        _solve(solved, factors[:, at - first : at - first + n], n)
        for a in range(N_FIELDS):
            fields[a, at : at + n] = solved[a, :n]
        for v in range(m):
            low, high = fitted.spans[v, r, 0], fitted.spans[v, r, 1]
            _take_off_fields(left[v], waves[v], solved, (low, high))
            for a in range(N_COLUMNS):
                lane, rest, test = lanes[v, a], left[v], points.test_jacobian[a, at : at + n]
                for i in range(n):
                    lane[i] += rest[i] * test[i]
    right = np.zeros((m, N_COLUMNS))
    for v in range(m):
        for a in range(N_COLUMNS):
            for i in range(length):
                right[v, a] += np.float64(lanes[v, a, i])
    return right


@njit(nogil=True, inline="always")
def _take_off_step(
    out: NDArray[np.float32],
    residuals: NDArray[np.float32],
    jacobian: NDArray[np.float32],
    step: NDArray[np.float32],
    row: NDArray[np.int64],
) -> None:
    n, at = row[3], row[4]
    given = residuals[at : at + n]
    for i in range(n):
        out[i] = given[i]
    for a in range(N_COLUMNS):
        column, factor = jacobian[a, at : at + n], step[a]
        for i in range(n):
            out[i] -= factor * column[i]


@njit(nogil=True, inline="always")
def _add_right(
    right: NDArray[np.float32], waves: NDArray[np.float32], left: NDArray[np.float32], n: int
) -> None:
    constant = right[0]
    for i in range(n):
        constant[i] += left[i]
    for a in range(N_FIELDS - 1):
        total, wave = right[a + 1], waves[a]
        for i in range(n):
            total[i] += wave[i] * left[i]


@njit(nogil=True, inline="always")
def _solve(right: NDArray[np.float32], factors: NDArray[np.float32], n: int) -> None:
    """Solve for the fields of a row's points, in place."""
    for a in range(N_FIELDS):
        entry = right[a]
        for b in range(a):
            factor, known = factors[a * (a + 1) // 2 + b], right[b]
            for i in range(n):
                entry[i] -= factor[i] * known[i]
        pivot = factors[a * (a + 3) // 2]
        for i in range(n):
            entry[i] *= pivot[i]
    for a in range(N_FIELDS - 1, -1, -1):
        entry = right[a]
        for b in range(a + 1, N_FIELDS):
            factor, known = factors[b * (b + 1) // 2 + a], right[b]
            for i in range(n):
                entry[i] -= factor[i] * known[i]
        pivot = factors[a * (a + 3) // 2]
        for i in range(n):
            entry[i] *= pivot[i]


@njit(nogil=True, inline="always")
def _take_off_fields(
    left: NDArray[np.float32],
    waves: NDArray[np.float32],
    fields: NDArray[np.float32],
    between: tuple[int, int],
) -> None:
    low, high = between
    constant = fields[0]
    for i in range(low, high):
        left[i] -= constant[i]
    for a in range(N_FIELDS - 1):
        field, wave = fields[a + 1], waves[a]
        for i in range(low, high):
            left[i] -= field[i] * wave[i]


@njit(cache=True, nogil=True)
def take_off_aliasing(
    residuals: NDArray[np.float32],
    points: Points,
    spans: NDArray[np.int64],
    to_moving: NDArray[np.float64],
    fields: NDArray[np.float32],
) -> None:
    """Take the model's waves off one volume's residuals, in place.

    Parameters
    ----------
    residuals : (n,) float32
        0 outside the spans, where they stay 0.
    points : Points
    spans : (n_rows, 2) int64
    to_moving : (3, 4) float64
        Voxel (x, y, z, 1) of the reference -> voxel of the volume.
    fields : (7, n) float32
        From `fit_fields`.
    """
    length = points.rows[:, 3].max()
    table = wave_table(to_moving, length)
    waves = np.empty((N_FIELDS - 1, length), np.float32)
    for r in range(points.rows.shape[0]):
        fill_waves(waves, table, to_moving, points.rows[r])
        n, at = points.rows[r, 3], points.rows[r, 4]
        here = residuals[at : at + n]
        _take_off_fields(here, waves, fields[:, at : at + n], (spans[r, 0], spans[r, 1]))


@njit(cache=True, nogil=True)
def take_off_parabolas(
    residuals: NDArray[np.float32],
    points: Points,
    spans: NDArray[np.int64],
    parabola: NDArray[np.float64],
) -> None:
    """Take the reference times a polynomial of the position off a volume's residuals, in place.

    Parameters
    ----------
    residuals : (n,) float32
    points : Points
    spans : (n_rows, 2) int64
    parabola : (4, 4) float64
        The polynomial's value at voxel p = (x, y, z, 1) is p' parabola p.
    """
    for r in range(points.rows.shape[0]):
        y, z, x, at = points.rows[r, 0], points.rows[r, 1], points.rows[r, 2], points.rows[r, 4]
        low, high = spans[r, 0], spans[r, 1]
        here = np.array([float(x + low), float(y), float(z), 1.0])
        value, slope = 0.0, 0.0
        for a in range(4):
            slope += (parabola[0, a] + parabola[a, 0]) * here[a]
            for b in range(4):
                value += parabola[a, b] * here[a] * here[b]
        c0, c1, c2 = np.float32(value), np.float32(slope), np.float32(parabola[0, 0])
        residual, image = residuals[at + low : at + high], points.values[at + low : at + high]
        for i in range(high - low):
            q = np.float32(i)
            residual[i] -= image[i] * (c0 + q * (c1 + q * c2))
