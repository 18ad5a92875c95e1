"""B-spline coefficients and weights (Unser 1999, IEEE Signal Processing Magazine 16:22)."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Poles of the direct B-spline filter (Unser 1993, IEEE Trans. Signal Process. 41:834, table 1).
POLES: dict[int, tuple[float, ...]] = {
    1: (),
    2: (-0.17157287525380990,),
    3: (-0.26794919243112270,),
    4: (-0.36134122590022018, -0.013725429297339122),
    5: (-0.43057534709997380, -0.043096288203264654),
}
# Values and slopes of the quintic B-spline at the integers 1 and 2 (0 and both by symmetry).
QUINTIC_SLOPE = (10.0 / 24.0, 1.0 / 24.0)
# A spline of any degree to 5 reaches from 2 coefficients before floor(position) to 3 after.
FIRST_TAP, N_TAPS = -2, 6
# Outputs that share one load of coefficients; two registers of eight float32.
LANES = 16
# Coefficients kept beside the field: taps on the low side, taps and one block on the high side.
PAD_LOW, PAD_HIGH = 4, 4
PAD_ROW = LANES + PAD_HIGH
# Terms of the boundary sum: 0.4306 ** 24 is below half a float32 ulp.
_HORIZON = 24


def tap_slots(degree: int) -> tuple[int, int]:
    """First of the six tap slots that a spline of `degree` (1 to 5) uses, and their number."""
    return (5 - degree) // 2, degree + 1


@njit(cache=True, nogil=True)
def _mirror(index: int, size: int) -> int:
    """Index into 0 ... size - 1 of an endless signal mirrored about its first and last sample."""
    period = 2 * size - 2
    index = abs(index) % period
    return period - index if index >= size else index


@njit(cache=True, nogil=True)
def _filter_lines(lines: NDArray[np.float32], poles: NDArray[np.float32]) -> None:
    """Turn samples into B-spline coefficients, in place, along the first of two axes.

    Parameters
    ----------
    lines : (n, m) float32
        m signals side by side, so that the recursion along n runs on whole vectors.
    poles : (p,) float32
        Poles of the spline's degree; mirror boundaries at both ends.
    """
    n, m = lines.shape
    if n < 2:
        return
    start = np.empty(m, np.float32)
    for pole in poles:
        gain = (np.float32(1) - pole) * (np.float32(1) - np.float32(1) / pole)
        for i in range(n):
            for j in range(m):
                lines[i, j] *= gain
        start[:] = 0
        power = np.float32(1)
        for term in range(_HORIZON):
            row = lines[_mirror(term, n)]
            for j in range(m):
                start[j] += power * row[j]
            power *= pole
        lines[0] = start
        for i in range(1, n):
            for j in range(m):
                lines[i, j] += pole * lines[i - 1, j]
        end = pole / (pole * pole - np.float32(1))
        for j in range(m):
            lines[n - 1, j] = end * (pole * lines[n - 2, j] + lines[n - 1, j])
        for i in range(n - 2, -1, -1):
            for j in range(m):
                lines[i, j] = pole * (lines[i + 1, j] - lines[i, j])


@njit(cache=True, nogil=True)
def _filter_rows(plane: NDArray[np.float32], poles: NDArray[np.float32]) -> None:
    """`_filter_lines` along the contiguous axis: rows are turned to columns, a block at a time."""
    ny, nx = plane.shape
    block = np.empty((nx, LANES), np.float32)
    for first in range(0, ny, LANES):
        n_rows = min(LANES, ny - first)
        for r in range(LANES):
            row = plane[first + min(r, n_rows - 1)]
            for i in range(nx):
                block[i, r] = row[i]
        _filter_lines(block, poles)
        for r in range(n_rows):
            row = plane[first + r]
            for i in range(nx):
                row[i] = block[i, r]


@njit(cache=True, nogil=True)
def fill_coefficients(
    volume: NDArray[np.float32], poles: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """B-spline coefficients of a volume, mirrored beyond its borders.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Voxels; never modified.
    poles : (p,) float32
        Poles of the spline's degree, empty for degree 1.
    out : (nz + 8, ny + 8, nx + 4 + 20) float32
        Filled: coefficient (x, y, z) stands at ``[z + 4, y + 4, x + 4]``.
    """
    nz, ny, nx = volume.shape
    inner = out[PAD_LOW : PAD_LOW + nz, PAD_LOW : PAD_LOW + ny]
    for k in range(nz):
        for j in range(ny):
            for i in range(nx):
                inner[k, j, PAD_LOW + i] = volume[k, j, i]
    if poles.size > 0:
        for k in range(nz):
            plane = inner[k, :, PAD_LOW : PAD_LOW + nx]
            _filter_rows(plane, poles)
            _filter_lines(plane, poles)
        for j in range(ny):
            _filter_lines(inner[:, j, PAD_LOW : PAD_LOW + nx], poles)
    _mirror_borders(out, nz, ny, nx)


@njit(cache=True, nogil=True)
def _mirror_borders(out: NDArray[np.float32], nz: int, ny: int, nx: int) -> None:
    for k in range(PAD_LOW, PAD_LOW + nz):
        for j in range(PAD_LOW, PAD_LOW + ny):
            row = out[k, j]
            for i in range(PAD_LOW):
                row[i] = row[PAD_LOW + (_mirror(i - PAD_LOW, nx) if nx > 1 else 0)]
            for i in range(nx, row.size - PAD_LOW):
                row[PAD_LOW + i] = row[PAD_LOW + (_mirror(i, nx) if nx > 1 else 0)]
        for j in range(out.shape[1]):
            if j < PAD_LOW or j >= PAD_LOW + ny:
                source = _mirror(j - PAD_LOW, ny) if ny > 1 else 0
                out[k, j] = out[k, PAD_LOW + source]
    for k in range(out.shape[0]):
        if k < PAD_LOW or k >= PAD_LOW + nz:
            source = _mirror(k - PAD_LOW, nz) if nz > 1 else 0
            out[k] = out[PAD_LOW + source]


@njit(cache=True, nogil=True)
def fill_weights(degree: int, t: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Weights of the six taps at offsets -2 ... 3 from the base index.

    Parameters
    ----------
    degree : int
        1 to 5.
    t : (n,) float32
        Position minus base index: 0 to 1 for odd degrees (base = floor), -0.5 to 0.5 for even
        ones (base = nearest).
    out : (6, n) float32
        Filled; slots that the degree does not reach stay zero. The largest central weight
        follows from the others, so that the six sum to one.
    """
    n = t.size
    one = np.float32(1)
    for i in range(n):
        a = t[i]
        b = one - a
        if degree == 5:
            a2, b2 = a * a, b * b
            out[5, i] = a2 * a2 * a * np.float32(1 / 120)
            out[0, i] = b2 * b2 * b * np.float32(1 / 120)
            out[1, i] = _quintic_middle(b)
            out[4, i] = _quintic_middle(a)
            out[3, i] = _quintic_centre(b)
            out[2, i] = one - out[3, i] - out[0, i] - out[1, i] - out[4, i] - out[5, i]
        elif degree == 4:
            c = np.float32(0.5) + a
            d = np.float32(0.5) - a
            a2 = a * a
            out[0, i] = d * d * d * d * np.float32(1 / 24)
            out[4, i] = c * c * c * c * np.float32(1 / 24)
            even = np.float32(19 / 96) + a2 * (np.float32(1 / 4) - np.float32(1 / 6) * a2)
            odd = a * (np.float32(11 / 24) - np.float32(1 / 6) * a2)
            out[1, i] = even - odd
            out[3, i] = even + odd
            out[2, i] = one - out[0, i] - out[1, i] - out[3, i] - out[4, i]
            out[5, i] = 0
        elif degree == 3:
            out[0, i] = 0
            out[1, i] = b * b * b * np.float32(1 / 6)
            out[4, i] = a * a * a * np.float32(1 / 6)
            out[3, i] = np.float32(2 / 3) - np.float32(0.5) * b * b * (np.float32(2) - b)
            out[2, i] = one - out[1, i] - out[3, i] - out[4, i]
            out[5, i] = 0
        elif degree == 2:
            c = np.float32(0.5) + a
            d = np.float32(0.5) - a
            out[0, i] = 0
            out[1, i] = np.float32(0.5) * d * d
            out[3, i] = np.float32(0.5) * c * c
            out[2, i] = one - out[1, i] - out[3, i]
            out[4, i] = 0
            out[5, i] = 0
        else:
            out[0, i] = 0
            out[1, i] = 0
            out[2, i] = b
            out[3, i] = a
            out[4, i] = 0
            out[5, i] = 0


@njit(cache=True, nogil=True, inline="always")
def _quintic_middle(s: np.float32) -> np.float32:
    """Quintic B-spline at distance 2 - s from its centre, s from 0 to 1."""
    # (1 + 5 s + 10 s^2 + 10 s^3 + 5 s^4 - 5 s^5) / 120, from (1 + s)^5 - 6 s^5
    p = np.float32(10) + s * (np.float32(10) + s * (np.float32(5) - np.float32(5) * s))
    return (np.float32(1) + s * (np.float32(5) + s * p)) * np.float32(1 / 120)


@njit(cache=True, nogil=True, inline="always")
def _quintic_centre(s: np.float32) -> np.float32:
    """Quintic B-spline at distance s from its centre, s from 0 to 1."""
    s2 = s * s
    return np.float32(11 / 20) + s2 * (
        np.float32(-1 / 2) + s2 * (np.float32(1 / 4) - np.float32(1 / 12) * s)
    )
