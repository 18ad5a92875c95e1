"""Resampling by a nearly rigid map in three one-dimensional passes, along x, then y, then z.

A map of voxels is a product of three shears, each of which moves along one axis only (Catmull &
Smith 1980, SIGGRAPH 14:279, for images; three passes for volumes). With i, j, k the voxel of the
output and X, Y, Z that of the moving volume,

    first(i, Y, Z) = moving(X, Y, Z) at X = x(i, Y, Z)
    second(i, j, Z) = first(i, Y, Z)  at Y = y(i, j, Z)
    out(i, j, k)   = second(i, j, Z) at Z = z(i, j, k)

and every pass is an exact one-dimensional B-spline interpolation with its own prefilter: 18 taps
a voxel instead of 216, and in the second and third pass neighbouring outputs read neighbouring
inputs. But the lines that these interpolate along are oblique in the moving volume, and meet finer
detail than its axes do: with the obliqueness of the motion accuracy is lost.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from keepstill.kernels.bspline import GAINS, LANES, filter_lines, mirror
from keepstill.kernels.compiled import kernel, part

# Coefficients kept on both sides of a row: further out, a row goes on with its last value.
ROW_PAD = 8
_FROM, _TO = 3 - ROW_PAD, ROW_PAD - 5
# A map that squeezes an axis by more than this has no passes worth the name.
_LEAST_SCALE = 0.5

# A spline between its coefficients, in even and odd parts. With u the distance from the middle of
# the taps, and a, b a pair of taps as far below as above it, the value is the sum over pairs of
#   (e0 + e1 u^2 + e2 u^4) (a + b) + u (o0 + o1 u^2 + o2 u^4) (b - a).
# Pairs from the inside out; where the degree is even the inner one is a single tap, halved.
_EVEN_AND_ODD = {
    1: (((1 / 2, 0, 0), (0, 0, 0), (0, 0, 0)), ((1, 0, 0), (0, 0, 0), (0, 0, 0))),
    2: (((3 / 8, -1 / 2, 0), (1 / 8, 1 / 2, 0), (0, 0, 0)), ((0, 0, 0), (1 / 2, 0, 0), (0, 0, 0))),
    3: (
        ((23 / 48, -1 / 4, 0), (1 / 48, 1 / 4, 0), (0, 0, 0)),
        ((5 / 8, -1 / 2, 0), (1 / 8, 1 / 6, 0), (0, 0, 0)),
    ),
    4: (
        ((115 / 384, -5 / 16, 1 / 8), (19 / 96, 1 / 4, -1 / 6), (1 / 384, 1 / 16, 1 / 24)),
        ((0, 0, 0), (11 / 24, -1 / 6, 0), (1 / 48, 1 / 12, 0)),
    ),
    5: (
        ((841 / 1920, -11 / 48, 1 / 24), (79 / 1280, 7 / 32, -1 / 16), (1 / 3840, 1 / 96, 1 / 48)),
        ((77 / 192, -7 / 24, 1 / 12), (25 / 128, 1 / 16, -1 / 24), (1 / 384, 1 / 48, 1 / 120)),
    ),
}
# The same, flat, times the gain that the prefilter leaves out; entry degree - 1. A constant of
# the code, so that the numbers stay in registers.
PIECES = tuple(
    tuple(np.float32(GAINS[degree] * c) for part in parts for pair in part for c in pair)
    for degree, parts in sorted(_EVEN_AND_ODD.items())
)
Eighteen = tuple[np.float32, ...]
Six = tuple[np.uint64, np.uint64, np.uint64, np.uint64, np.uint64, np.uint64]


class Rows(NamedTuple):
    """A moving volume, filtered along x.

    Attributes
    ----------
    rows : (nz * ny, 8 + nx + 8) float32
        From `filter_rows`.
    shape : (nx, ny, nz)
    degree : int
        1 to 5.
    poles : (p,) float32
    """

    rows: NDArray[np.float32]
    shape: tuple[int, int, int]
    degree: int
    poles: NDArray[np.float32]


class Room(NamedTuple):
    """Work space of one thread; rows begin at multiples of 64 bytes.

    Attributes
    ----------
    plane : (n,) float32
        The first pass's result for one Z: rows Y of outputs i.
    slabs : (m,) float32
        The second pass's: for each j, rows Z of outputs i.
    row : (l,) float32
    ramp : (l,) float32
        0, 1, 2 ...
    """

    plane: NDArray[np.float32]
    slabs: NDArray[np.float32]
    row: NDArray[np.float32]
    ramp: NDArray[np.float32]


def width_of(n: int) -> int:
    """Length of a row of work space for n outputs."""
    return -(-n // LANES) * LANES


@kernel
def passes_of(moving_voxel_from_voxel: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The three shears that a map of voxels is a product of.

    Parameters
    ----------
    moving_voxel_from_voxel : (4, 4) float64

    Returns
    -------
    passes : (3, 4) float64
        X of (i, Y, Z, 1), Y of (i, j, Z, 1) and Z of (i, j, k, 1).
    obliqueness : float
        Largest shift, in voxels a voxel, between the lines that a pass is interpolated along and
        the moving volume's axes; infinite where there are no such passes.
    """
    m = moving_voxel_from_voxel
    out = m[:3].copy()
    for done in (2, 1):  # put what is found on this axis in place of the output's voxel there
        pivot = out[done, done]
        if not abs(pivot) >= _LEAST_SCALE:
            return out, np.inf
        for axis in range(done):
            factor = out[axis, done] / pivot
            for column in range(4):
                out[axis, column] -= factor * out[done, column]
            out[axis, done] = factor
    if not abs(out[0, 0]) >= _LEAST_SCALE:
        return out, np.inf
    return out, max(abs(out[0, 1]), abs(out[0, 2]), abs(out[1, 2]))


@kernel
def fill_by_passes(
    out: NDArray[np.float32],
    points: NDArray[np.int64],
    spans: NDArray[np.int64],
    moving: Rows,
    passes: NDArray[np.float64],
    room: Room,
) -> None:
    """B-spline values at rows of voxels; 0 where a row lies outside its span.

    Parameters
    ----------
    out : (n,) float32
        Filled.
    points : (n_rows, 5) int64
        y, z, first x, number and place in `out` of each row, ordered by y.
    spans : (n_rows, 2) int64
        First and one past the last point of each row that lies in the field of view.
    moving : Rows
    passes : (3, 4) float64
        From `passes_of`.
    room : Room
    """
    low, high = _reach(points, spans)
    if high <= low:
        out[:] = 0
        return
    begins = _slabs_of(points)
    nz = moving.shape[2]
    for z in range(nz):
        _pass_x(room, moving, passes[0], z, (low, high))
        _pass_y(room, moving, passes[1], z, (low, high), points[begins[:-1], 0])
    for slab in range(begins.size - 1):
        here = slice(begins[slab], begins[slab + 1])
        _pass_z(out, points[here], spans[here], moving, passes[2], room, (slab, low, high))


@part
def _reach(points: NDArray[np.int64], spans: NDArray[np.int64]) -> tuple[int, int]:
    """First and one past the last x that any row needs."""
    low, high = 2**62, -1
    for r in range(points.shape[0]):
        if spans[r, 1] > spans[r, 0]:
            low = min(low, points[r, 2] + spans[r, 0])
            high = max(high, points[r, 2] + spans[r, 1])
    return low, high


@part
def _slabs_of(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rows of another y begin, and the number of rows."""
    begins = [0]
    for r in range(1, points.shape[0]):
        if points[r, 0] != points[r - 1, 0]:
            begins.append(r)
    begins.append(points.shape[0])
    return np.array(begins)


@part
def _pass_x(
    room: Room, moving: Rows, along: NDArray[np.float64], z: int, reach: tuple[int, int]
) -> None:
    """Fill `room.plane`, for one Z, with outputs i = low ... high - 1 of all rows Y; filter in y.

    Along a row, output i reads its taps near X(i). Where X(i) - i has the same whole part,
    neighbouring outputs read neighbouring taps: the distance X(i) - i takes the place of a
    position, and the taps of output i are those "rows" that begin one coefficient after another.
    """
    low, high = reach
    nx, ny = moving.shape[0], moving.shape[1]
    width = (high - low + LANES - 1) // LANES * LANES
    stride = moving.rows.shape[1]
    pieces = PIECES[moving.degree - 1]
    flat, plane = moving.rows.reshape(-1), room.plane
    for y in range(ny):
        position = along[1] * y + along[2] * z + along[3] + along[0] * low
        first, last = 0, high - low
        while first < last and not _FROM <= position + along[0] * first <= nx + _TO:
            first += 1
        while last > first and not _FROM <= position + along[0] * (last - 1) <= nx + _TO:
            last -= 1
        at = y * width
        distance, slope = position - low + (along[0] - 1) * first, along[0] - 1
        origin = (z * ny + y) * stride + ROW_PAD + low + first
        _fill_between(
            plane,
            at + first,
            flat,
            (origin, 1, 0),
            (distance, slope, last - first),
            (moving.degree, pieces),
            room.ramp,
        )
        before, after = np.float32(0), np.float32(0)
        if last > first:
            before, after = plane[at + first], plane[at + last - 1]
        for i in range(first):
            plane[np.uint64(at + i)] = before
        for i in range(last, width):
            plane[np.uint64(at + i)] = after
    filter_lines(plane[: ny * width].reshape(ny, width), moving.poles)


@part
def _pass_y(
    room: Room,
    moving: Rows,
    along: NDArray[np.float64],
    z: int,
    reach: tuple[int, int],
    ys: NDArray[np.int64],
) -> None:
    """Fill row Z of each slab in `room.slabs`, one for each output row j in `ys`."""
    low, high = reach
    width = (high - low + LANES - 1) // LANES * LANES
    size = moving.shape[2] * width + LANES
    pieces = PIECES[moving.degree - 1]
    for slab in range(ys.size):
        position = along[0] * low + along[1] * ys[slab] + along[2] * z + along[3]
        _fill_between(
            room.slabs,
            slab * size + z * width,
            room.plane,
            (0, width, moving.shape[1]),
            (position, along[0], high - low),
            (moving.degree, pieces),
            room.ramp,
        )


@part
def _pass_z(
    out: NDArray[np.float32],
    points: NDArray[np.int64],
    spans: NDArray[np.int64],
    moving: Rows,
    along: NDArray[np.float64],
    room: Room,
    slab: tuple[int, int, int],
) -> None:
    """Filter a slab along z and fill the outputs of its rows of points."""
    number, low, high = slab
    nz = moving.shape[2]
    width = (high - low + LANES - 1) // LANES * LANES
    size = nz * width + LANES
    pieces = PIECES[moving.degree - 1]
    lines = room.slabs[number * size : number * size + nz * width]
    filter_lines(lines.reshape(nz, width), moving.poles)
    for r in range(points.shape[0]):
        y, z, x = points[r, 0], points[r, 1], points[r, 2]
        n, at, first, last = points[r, 3], points[r, 4], spans[r, 0], spans[r, 1]
        for i in range(first):
            out[np.uint64(at + i)] = 0
        for i in range(last, n):
            out[np.uint64(at + i)] = 0
        position = along[0] * (x + first) + along[1] * y + along[2] * z + along[3]
        _fill_between(
            room.row,
            0,
            room.slabs,
            (number * size + x + first - low, width, nz),
            (position, along[0], last - first),
            (moving.degree, pieces),
            room.ramp,
        )
        begin = np.uint64(at + first)
        for i in range(last - first):
            out[begin + np.uint64(i)] = room.row[i]


@njit(nogil=True, inline="always")
def _fill_between(
    out: NDArray[np.float32],
    at: int,
    source: NDArray[np.float32],
    rows: tuple[int, int, int],
    line: tuple[float, float, int],
    spline: tuple[int, Eighteen],
    ramp: NDArray[np.float32],
) -> None:
    """Spline values between rows of coefficients: output i at row position + i slope.

    The outputs are split where the position's whole part changes; within a piece all lanes share
    their six rows. A piece is rounded up to sixteen lanes, which the next one overwrites.

    Parameters
    ----------
    out, at
        Outputs are filled from place `at`; up to fifteen lanes after the last are spoilt.
    source, (origin, stride, n_rows)
        Coefficients: row r of output i stands at origin + i + r stride. Rows are mirrored beyond
        0 ... n_rows - 1, or not, if n_rows is 0.
    line : (position, slope, n)
        Of the n outputs.
    spline : (degree, pieces)
    ramp : 0, 1, 2 ...
    """
    origin, stride, n_rows = rows
    position, slope, n = line
    odd = spline[0] % 2
    to_middle, to_base = 0.5 * odd, 0.5 * (1 - odd)
    i = 0
    while i < n:
        here = position + i * slope
        base = np.floor(here + to_base)
        length = float(n - i)
        if slope > 0:
            length = min(length, 1 + np.floor((base + 1 - to_base - here) / slope))
        elif slope < 0:
            length = min(length, 1 + np.floor((base - to_base - here) / slope))
        taps = _taps((origin + i, stride, n_rows), int(base), odd)
        u = np.float32(here - base - to_middle)
        _fill_lanes(
            out,
            np.uint64(at + i),
            source,
            taps,
            int(length),
            (u, np.float32(slope)),
            spline[1],
            ramp,
        )
        i += int(length)


@njit(nogil=True, inline="always")
def _taps(rows: tuple[int, int, int], base: int, odd: int) -> Six:
    """Where the six rows of taps about `base` begin, from the lowest to the highest."""
    origin, stride, n = rows
    if n == 0 or (base >= 2 and base + odd + 2 < n):
        below, above = origin + base * stride, origin + (base + odd) * stride
        return (
            np.uint64(below - 2 * stride),
            np.uint64(below - stride),
            np.uint64(below),
            np.uint64(above),
            np.uint64(above + stride),
            np.uint64(above + 2 * stride),
        )
    return (
        np.uint64(origin + mirror(base - 2, n) * stride),
        np.uint64(origin + mirror(base - 1, n) * stride),
        np.uint64(origin + mirror(base, n) * stride),
        np.uint64(origin + mirror(base + odd, n) * stride),
        np.uint64(origin + mirror(base + odd + 1, n) * stride),
        np.uint64(origin + mirror(base + odd + 2, n) * stride),
    )


@njit(nogil=True, inline="always")
def _fill_lanes(
    out: NDArray[np.float32],
    at: np.uint64,
    source: NDArray[np.float32],
    taps: Six,
    n: int,
    middle: tuple[np.float32, np.float32],
    pieces: Eighteen,
    ramp: NDArray[np.float32],
) -> None:
    """Spline values of n lanes, rounded up to sixteens; lane q is u + q slope from the middle.

    Indices are unsigned: a signed one may be negative and would have to be tested, and then
    neighbouring lanes are no longer one load.
    """
    e0, e1, e2, f0, f1, f2, g0, g1, g2 = pieces[:9]
    o0, o1, o2, p0, p1, p2, q0, q1, q2 = pieces[9:]
    start, slope = middle
    for lane in range((n + LANES - 1) // LANES * LANES):
        q = np.uint64(lane)
        u = start + slope * ramp[q]
        v = u * u
        a, b = source[taps[2] + q], source[taps[3] + q]
        even = (e0 + v * (e1 + v * e2)) * (a + b)
        odd = (o0 + v * (o1 + v * o2)) * (b - a)
        a, b = source[taps[1] + q], source[taps[4] + q]
        even += (f0 + v * (f1 + v * f2)) * (a + b)
        odd += (p0 + v * (p1 + v * p2)) * (b - a)
        a, b = source[taps[0] + q], source[taps[5] + q]
        even += (g0 + v * (g1 + v * g2)) * (a + b)
        odd += (q0 + v * (q1 + v * q2)) * (b - a)
        out[at + q] = even + u * odd
