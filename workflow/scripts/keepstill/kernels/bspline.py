"""B-spline coefficients and weights (Unser 1999, IEEE Signal Processing Magazine 16:22)."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel, part

# Poles of the direct B-spline filter (Unser 1993, IEEE Trans. Signal Process. 41:834, table 1).
POLES: dict[int, tuple[float, ...]] = {
    1: (),
    2: (-0.17157287525380990,),
    3: (-0.26794919243112270,),
    4: (-0.36134122590022018, -0.013725429297339122),
    5: (-0.43057534709997380, -0.043096288203264654),
}
# What the recursion leaves to be multiplied with, for each degree (Unser 1993, equation 2.5).
GAINS = {
    degree: float(np.prod([(1 - pole) * (1 - 1 / pole) for pole in poles]))
    for degree, poles in POLES.items()
}
# A spline of any degree to 5 reaches from 2 coefficients before floor(position) to 3 after.
FIRST_TAP, N_TAPS = -2, 6
# Outputs that share one load of coefficients; two registers of eight float32.
LANES = 16
# Coefficients kept beside the field on each side: what taps may reach from within it.
PAD = 4
# Boundary sums end where a term's weight is below half a float32 ulp.
_NEGLIGIBLE = np.float32(2.0**-25)


def tap_slots(degree: int) -> tuple[int, int]:
    """First of the six tap slots that a spline of `degree` (1 to 5) uses, and their number."""
    return (5 - degree) // 2, degree + 1


@kernel
def mirror(index: int, size: int) -> int:
    """Index into 0 ... size - 1 of an endless signal mirrored about its first and last sample."""
    index = abs(index)
    if index < size:
        return index
    if size == 1:
        return 0
    period = 2 * size - 2
    index %= period  # a division: kept to the far side
    return period - index if index >= size else index


@kernel
def filter_lines(lines: NDArray[np.float32], poles: NDArray[np.float32]) -> None:
    """Turn samples into B-spline coefficients over `GAINS`, in place, along the first of two axes.

    Parameters
    ----------
    lines : (n, m) float32
        m signals side by side, mirrored at both ends. The recursion along n runs on whole
        vectors: fastest if rows begin at multiples of 64 bytes, and are 48 or more long.
    poles : (p,) float32
        Poles of the spline's degree.

    Notes
    -----
    The gain is left out since whoever reads the coefficients multiplies anyway.
    """
    n, m = lines.shape
    one = np.float32(1)
    for pole in poles:
        _fill_start(lines, pole)
        if n == 1:
            continue
        for i in range(1, n):
            for j in range(m):
                lines[i, j] += pole * lines[i - 1, j]
        end = pole / (pole * pole - one)
        for j in range(m):
            lines[n - 1, j] = end * (pole * lines[n - 2, j] + lines[n - 1, j])
        for i in range(n - 2, -1, -1):
            for j in range(m):
                lines[i, j] = pole * (lines[i + 1, j] - lines[i, j])


@part
def _fill_start(lines: NDArray[np.float32], pole: np.float32) -> None:
    """Put what the causal recursion has gathered of the mirrored past into the first sample."""
    n, m = lines.shape
    one = np.float32(1)
    if n == 1:  # a constant: all of the recursion, and back
        for j in range(m):
            lines[0, j] *= one / ((one - pole) * (one - one / pole))
        return
    power = pole
    for term in range(1, 2 * n - 2):
        if abs(power) < _NEGLIGIBLE:
            return
        source = mirror(term, n)
        for j in range(m):
            lines[0, j] += power * lines[source, j]
        power *= pole
    for j in range(m):  # the signal has come round; what follows repeats
        lines[0, j] *= one / (one - power)


@kernel
def filter_rows(
    rows: NDArray[np.float32],
    poles: NDArray[np.float32],
    out: NDArray[np.float32],
    block: NDArray[np.float32],
) -> None:
    """Coefficients over `GAINS` along the contiguous axis, mirrored beyond the ends of each row.

    Parameters
    ----------
    rows : (n, nx) float32
        Samples; never modified.
    poles : (p,) float32
        As in `filter_lines`.
    out : (n, pad + nx + pad) float32
        Filled.
    block : (nx, m) float32
        Work space: m rows at a time are turned to columns, so that the recursion runs across
        them, and back.
    """
    n, nx = rows.shape
    pad = (out.shape[1] - nx) // 2
    for first in range(0, n, block.shape[1]):
        n_rows = min(block.shape[1], n - first)
        for r in range(n_rows):
            for i in range(nx):
                block[i, r] = rows[first + r, i]
        filter_lines(block, poles)
        for r in range(n_rows):
            for i in range(nx):
                out[first + r, pad + i] = block[i, r]
        for i in range(2 * pad):
            there = i if i < pad else nx + i
            source = mirror(there - pad, nx)
            for r in range(n_rows):
                out[first + r, there] = block[source, r]


@kernel
def fill_coefficients(
    volume: NDArray[np.float32],
    poles: NDArray[np.float32],
    gain: float,
    out: NDArray[np.float32],
    block: NDArray[np.float32],
) -> None:
    """B-spline coefficients of a volume, mirrored beyond its borders.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Voxels; never modified.
    poles : (p,) float32
        Poles of the spline's degree, empty for degree 1.
    gain : float
        From `GAINS`.
    out : (nz + 8, ny + 8, nx + 8 + 16) float32
        Filled: coefficient (x, y, z) stands at ``[z + 4, y + 4, x + 4]``.
    block : (nx, m) float32
        Work space of `filter_rows`.
    """
    nz, ny, nx = volume.shape
    width = nx + 2 * PAD
    plane = np.zeros((ny, width), np.float32)
    slab = np.empty((nz, width), np.float32)
    scale = np.float32(gain * gain * gain)
    for k in range(nz):
        filter_rows(volume[k], poles, plane, block)
        filter_lines(plane, poles)
        for j in range(ny):
            for i in range(width):
                out[PAD + k, PAD + j, i] = plane[j, i]
    for j in range(ny):
        for k in range(nz):
            for i in range(width):
                slab[k, i] = out[PAD + k, PAD + j, i]
        filter_lines(slab, poles)
        for k in range(nz):
            for i in range(width):
                out[PAD + k, PAD + j, i] = scale * slab[k, i]
    _mirror_borders(out, nz, ny)


@part
def _mirror_borders(out: NDArray[np.float32], nz: int, ny: int) -> None:
    """Rows beyond the field in y and z; and zeros, which no sum may use, behind each row."""
    for k in range(nz):
        plane = out[PAD + k]
        for j in range(plane.shape[0]):
            for i in range(plane.shape[1] - LANES, plane.shape[1]):
                plane[j, i] = 0
        for j in range(PAD):
            _copy(plane[j], plane[PAD + mirror(j - PAD, ny)])
            _copy(plane[PAD + ny + j], plane[PAD + mirror(ny + j, ny)])
    for k in range(PAD):
        for j in range(ny + 2 * PAD):
            _copy(out[k, j], out[PAD + mirror(k - PAD, nz), j])
            _copy(out[PAD + nz + k, j], out[PAD + mirror(nz + k, nz), j])


@part
def _copy(out: NDArray[np.float32], given: NDArray[np.float32]) -> None:
    """Copy a row: an assignment of arrays takes seconds to compile, for its messages."""
    for i in range(out.size):
        out[i] = given[i]


@kernel
def fill_weights(degree: int, t: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Weights of the six taps at offsets -2 ... 3 from the base index.

    Parameters
    ----------
    degree : int, 1 to 5
    t : (n,) float32
        Position minus base index: 0 to 1 for odd degrees (base = floor), -0.5 to 0.5 for even
        ones (base = nearest).
    out : (6, n) float32
        Filled; slots that the degree does not reach stay zero. The largest central weight
        follows from the others, so that the six sum to one.
    """
    one = np.float32(1)
    for i in range(t.size):
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
