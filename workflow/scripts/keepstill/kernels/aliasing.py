"""Waves of aliasing at sampling points: fitted to the residuals of many volumes, and taken off.

A wave is what sampling makes of detail finer than two voxels: it turns once while the head moves
by one voxel along an axis, and how strong it is, is fixed to the head. See `keepstill.run_model`.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel, part
from keepstill.kernels.sums import N_COLUMNS, Points

# Fields of the model: a constant, then cosine and sine for each axis of the moving grid.
N_FIELDS = 7
# Entries of the lower triangle of a (7, 7) matrix, row after row.
N_FACTORS = N_FIELDS * (N_FIELDS + 1) // 2
_TURN = 2 * np.pi
# Certainty of a constant of 0 where no volume sees a point: just enough for a solution.
_LEAST_CERTAINTY = np.float32(1e-3)


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
    phases : (m, n_rows, 6) float32
        From `row_phases`.
    tables : (m, 6, l) float32
        From `wave_tables`, for rows of up to l points.
    """

    residuals: NDArray[np.float32]
    slots: NDArray[np.int64]
    spans: NDArray[np.int64]
    maps: NDArray[np.float64]
    phases: NDArray[np.float32]
    tables: NDArray[np.float32]

    def of_rows(self, rows: slice | NDArray[np.int64]) -> "Fitted":
        """The same volumes with the spans and phases of some rows alone."""
        spans, phases = self.spans[:, rows], self.phases[:, rows]
        return self._replace(spans=np.ascontiguousarray(spans), phases=np.ascontiguousarray(phases))


@kernel
def wave_tables(maps: NDArray[np.float64], n: int) -> NDArray[np.float32]:
    """Cosine and sine of how far each axis' wave has turned after 0 ... n - 1 steps in x.

    Parameters
    ----------
    maps : (m, 3, 4) float64
        Voxel (x, y, z, 1) of the reference -> voxel of each volume.

    Returns
    -------
    tables : (m, 6, n) float32
    """
    out = np.empty((maps.shape[0], N_FIELDS - 1, n), np.float32)
    for v in range(maps.shape[0]):
        for axis in range(3):
            slope = maps[v, axis, 0] - round(maps[v, axis, 0])
            for i in range(n):
                out[v, 2 * axis, i] = math.cos(_TURN * slope * i)
                out[v, 2 * axis + 1, i] = math.sin(_TURN * slope * i)
    return out


@kernel
def row_phases(to_moving: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Cosine and sine of each axis' wave at the first point of rows, (n_rows, 6) float32."""
    out = np.empty((rows.shape[0], N_FIELDS - 1), np.float32)
    for r in range(rows.shape[0]):
        for axis in range(3):
            start = to_moving[axis, 3] + to_moving[axis, 0] * rows[r, 2]
            start += to_moving[axis, 1] * rows[r, 0] + to_moving[axis, 2] * rows[r, 1]
            start -= round(start)
            out[r, 2 * axis] = math.cos(_TURN * start)
            out[r, 2 * axis + 1] = math.sin(_TURN * start)
    return out


@kernel
def fill_waves(
    waves: NDArray[np.float32], table: NDArray[np.float32], phases: NDArray[np.float32], n: int
) -> None:
    """Cosine and sine of each axis' wave at the points of a row.

    Parameters
    ----------
    waves : (6, l) float32
        Filled for the row's n points.
    table : (6, l) float32
        Of a volume, from `wave_tables`.
    phases : (6,) float32
        The row's, from `row_phases`.
    """
    for axis in range(3):
        c, s = phases[2 * axis], phases[2 * axis + 1]
        for i in range(n):
            waves[2 * axis, i] = c * table[2 * axis, i] - s * table[2 * axis + 1, i]
        for i in range(n):
            waves[2 * axis + 1, i] = s * table[2 * axis, i] + c * table[2 * axis + 1, i]


@kernel
def fill_factors(
    factors: NDArray[np.float32], points: Points, fitted: Fitted, ridge: float
) -> None:
    """Cholesky factors of the normal matrices of the fields, a (7, 7) matrix for each point.

    Parameters
    ----------
    factors : (28, n) float32
        Filled at the points of the block: rows of lower triangles, their diagonals inverted.
    points : Points
        Of the block: its rows alone, which still say their places among all points.
    fitted : Fitted
        With the spans and phases of the block's rows.
    ridge : float
        What is known of the waves' strength beforehand: noise variance over wave variance.
    """
    rows, m, length = points.rows, fitted.slots.size, _longest(points.rows)
    waves = np.empty((N_FIELDS - 1, length), np.float32)
    normal = np.empty((N_FACTORS, length), np.float32)
    for r in range(rows.shape[0]):
        n, at = rows[r, 3], rows[r, 4]
        normal[:] = 0
        normal[0] = _LEAST_CERTAINTY
        for a in range(1, N_FIELDS):
            normal[a * (a + 3) // 2] = ridge
        for v in range(m):
            fill_waves(waves, fitted.tables[v], fitted.phases[v, r], n)
            _add_products(normal, waves, fitted.spans[v, r, 0], fitted.spans[v, r, 1])
        _decompose(normal)
        for entry in range(N_FACTORS):
            for i in range(n):
                factors[entry, at + i] = normal[entry, i]


@part
def _longest(rows: NDArray[np.int64]) -> int:
    n = 0
    for r in range(rows.shape[0]):
        n = max(n, rows[r, 3])
    return n


# The functions below have indices that are unsigned: a signed one may be negative and would have
# to be tested in each lane. Each loop has few arrays, whose overlap a vector loop has to exclude.


@part
def _add_products(
    normal: NDArray[np.float32], waves: NDArray[np.float32], low: int, high: int
) -> None:
    first, last = np.uint64(low), np.uint64(high)
    for i in range(first, last):
        normal[0, i] += np.float32(1)
    for a in range(N_FIELDS - 1):
        entry = normal[(a + 1) * (a + 2) // 2]
        for i in range(first, last):
            entry[i] += waves[a, i]
        for b in range(a + 1):
            entry = normal[(a + 1) * (a + 2) // 2 + b + 1]
            for i in range(first, last):
                entry[i] += waves[a, i] * waves[b, i]


@part
def _decompose(factors: NDArray[np.float32]) -> None:
    n, one = factors.shape[1], np.float32(1)
    known = np.empty(n, np.float32)
    for a in range(N_FIELDS):
        for b in range(a + 1):
            entry, pivot = factors[a * (a + 1) // 2 + b], factors[b * (b + 3) // 2]
            known[:] = 0
            for k in range(b):
                _add_product(known, factors[a * (a + 1) // 2 + k], factors[b * (b + 1) // 2 + k])
            if a == b:
                for i in range(n):
                    entry[i] = one / np.sqrt(entry[i] - known[i])
            else:
                for i in range(n):
                    entry[i] = (entry[i] - known[i]) * pivot[i]


@part
def _add_product(
    total: NDArray[np.float32], left: NDArray[np.float32], right: NDArray[np.float32]
) -> None:
    for i in range(total.size):
        total[i] += left[i] * right[i]


@kernel
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
    factors : (28, n) float32
        From `fill_factors`.
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
    rows, m, length = points.rows, fitted.slots.size, _longest(points.rows)
    waves = np.empty((m, N_FIELDS - 1, length), np.float32)
    left = np.empty((m, length), np.float32)
    lanes = np.zeros((m, N_COLUMNS, length), np.float32)
    solved = np.empty((N_FIELDS, length), np.float32)
    for r in range(rows.shape[0]):
        n, at = rows[r, 3], rows[r, 4]
        for v in range(m):
            fill_waves(waves[v], fitted.tables[v], fitted.phases[v, r], n)
        _take_off_steps(left, fitted, points.jacobian, steps, (at, r))
        _fill_right(solved, waves, left, fitted.spans, r)
        _solve(solved, factors, at, n)
        for a in range(N_FIELDS):
            for i in range(n):
                fields[a, at + i] = solved[a, i]
        _take_off_all_fields(left, waves, solved, fitted.spans, r)
        _add_lanes(lanes, left, points.test_jacobian, fitted.spans, (at, r))
    right = np.zeros((m, N_COLUMNS))
    for v in range(m):
        for a in range(N_COLUMNS):
            for i in range(length):
                right[v, a] += np.float64(lanes[v, a, i])
    return right


@part
def _take_off_steps(
    left: NDArray[np.float32],
    fitted: Fitted,
    jacobian: NDArray[np.float32],
    steps: NDArray[np.float32],
    row: tuple[int, int],
) -> None:
    at, r = np.uint64(row[0]), row[1]
    for v in range(left.shape[0]):
        slot = fitted.slots[v]
        first, last = np.uint64(fitted.spans[v, r, 0]), np.uint64(fitted.spans[v, r, 1])
        for i in range(first, last):
            left[v, i] = fitted.residuals[slot, at + i]
        for a in range(N_COLUMNS):
            for i in range(first, last):
                left[v, i] -= steps[v, a] * jacobian[a, at + i]


@part
def _fill_right(
    right: NDArray[np.float32],
    waves: NDArray[np.float32],
    left: NDArray[np.float32],
    spans: NDArray[np.int64],
    r: int,
) -> None:
    right[:] = 0
    for v in range(left.shape[0]):
        first, last = np.uint64(spans[v, r, 0]), np.uint64(spans[v, r, 1])
        for i in range(first, last):
            right[0, i] += left[v, i]
        for a in range(N_FIELDS - 1):
            for i in range(first, last):
                right[a + 1, i] += waves[v, a, i] * left[v, i]


@part
def _take_off_all_fields(
    left: NDArray[np.float32],
    waves: NDArray[np.float32],
    fields: NDArray[np.float32],
    spans: NDArray[np.int64],
    r: int,
) -> None:
    for v in range(left.shape[0]):
        first, last = np.uint64(spans[v, r, 0]), np.uint64(spans[v, r, 1])
        for i in range(first, last):
            left[v, i] -= fields[0, i]
        for a in range(N_FIELDS - 1):
            for i in range(first, last):
                left[v, i] -= fields[a + 1, i] * waves[v, a, i]


@part
def _add_lanes(
    lanes: NDArray[np.float32],
    left: NDArray[np.float32],
    tests: NDArray[np.float32],
    spans: NDArray[np.int64],
    row: tuple[int, int],
) -> None:
    at, r = np.uint64(row[0]), row[1]
    for v in range(left.shape[0]):
        first, last = np.uint64(spans[v, r, 0]), np.uint64(spans[v, r, 1])
        for a in range(N_COLUMNS):
            for i in range(first, last):
                lanes[v, a, i] += left[v, i] * tests[a, at + i]


@part
def _solve(right: NDArray[np.float32], factors: NDArray[np.float32], at: int, n: int) -> None:
    """Solve for the fields of a row's points, in place."""
    known = np.empty(n, np.float32)
    for a in range(N_FIELDS):
        known[:] = 0
        for b in range(a):
            _add_product_at(known, factors[a * (a + 1) // 2 + b], at, right[b])
        _complete(right[a], known, factors[a * (a + 3) // 2], at)
    for a in range(N_FIELDS - 1, -1, -1):
        known[:] = 0
        for b in range(a + 1, N_FIELDS):
            _add_product_at(known, factors[b * (b + 1) // 2 + a], at, right[b])
        _complete(right[a], known, factors[a * (a + 3) // 2], at)


@part
def _add_product_at(
    total: NDArray[np.float32], left: NDArray[np.float32], at: int, right: NDArray[np.float32]
) -> None:
    place = np.uint64(at)
    for k in range(total.size):
        i = np.uint64(k)
        total[i] += left[place + i] * right[i]


@part
def _complete(
    entry: NDArray[np.float32], known: NDArray[np.float32], pivot: NDArray[np.float32], at: int
) -> None:
    place = np.uint64(at)
    for k in range(known.size):
        i = np.uint64(k)
        entry[i] = (entry[i] - known[i]) * pivot[place + i]


@part
def take_off_fields(
    left: NDArray[np.float32],
    waves: NDArray[np.float32],
    fields: NDArray[np.float32],
    between: tuple[int, int, int, int],
) -> None:
    """Take fields from place `at_fields` on off what is at place `at` on."""
    at, at_fields = np.uint64(between[0]), np.uint64(between[1])
    first, last = np.uint64(between[2]), np.uint64(between[3])
    for i in range(first, last):
        left[at + i] -= fields[0, at_fields + i]
    for a in range(N_FIELDS - 1):
        for i in range(first, last):
            left[at + i] -= fields[a + 1, at_fields + i] * waves[a, i]


@kernel
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
    rows, length = points.rows, _longest(points.rows)
    table = wave_tables(to_moving.reshape(1, 3, 4), length)[0]
    phases = row_phases(to_moving, rows)
    waves = np.empty((N_FIELDS - 1, length), np.float32)
    for r in range(rows.shape[0]):
        at = rows[r, 4]
        fill_waves(waves, table, phases[r], rows[r, 3])
        take_off_fields(residuals, waves, fields, (at, at, spans[r, 0], spans[r, 1]))


@kernel
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
    here = np.ones(4)
    for r in range(points.rows.shape[0]):
        for axis, column in ((0, 2), (1, 0), (2, 1)):
            here[axis] = points.rows[r, column]
        value, slope = 0.0, 0.0
        for a in range(4):
            slope += (parabola[0, a] + parabola[a, 0]) * here[a]
            for b in range(4):
                value += parabola[a, b] * here[a] * here[b]
        c0, c1, c2 = np.float32(value), np.float32(slope), np.float32(parabola[0, 0])
        at = np.uint64(points.rows[r, 4])
        for k in range(np.uint64(spans[r, 0]), np.uint64(spans[r, 1])):
            i = np.float32(k)
            residuals[at + k] -= points.values[at + k] * (c0 + i * (c1 + i * c2))


@kernel
def take_off_columns(
    residuals: NDArray[np.float32],
    points: Points,
    spans: NDArray[np.int64],
    columns: NDArray[np.float32],
    factors: NDArray[np.float32],
) -> None:
    """Take a sum of columns off a volume's residuals, in place.

    Parameters
    ----------
    residuals : (n,) float32
    points : Points
    spans : (n_rows, 2) int64
    columns : (p, n) float32
    factors : (p,) float32
    """
    for r in range(points.rows.shape[0]):
        at = np.uint64(points.rows[r, 4])
        for a in range(columns.shape[0]):
            for i in range(np.uint64(spans[r, 0]), np.uint64(spans[r, 1])):
                residuals[at + i] -= factors[a] * columns[a, at + i]
