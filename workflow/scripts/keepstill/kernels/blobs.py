"""Sums of Gaussian blobs, plane by plane of a grid."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel, part

_U = np.uint64


class Blobs(NamedTuple):
    """Blobs on a grid, each as three lines of factors whose products are its values.

    Attributes
    ----------
    brights : (n,) float64
    centres : (n, 3) float64
        Position x, y, z of each blob, in the grid's units.
    reaches : (n,) float64
        Distance from the centre beyond which a blob is left out; negative leaves it out whole.
    first, number : (n, 3) int64
        First index that a blob reaches along each axis, and the number of indices.
    begins : (n, 3) int64
        Where its line of factors for each axis begins in `factors`.
    factors : (m,) float
        exp(-d^2 / spread^2) at each of those indices, d along one axis.
    """

    brights: NDArray[np.float64]
    centres: NDArray[np.float64]
    reaches: NDArray[np.float64]
    first: NDArray[np.int64]
    number: NDArray[np.int64]
    begins: NDArray[np.int64]
    factors: NDArray[np.floating]


class Grid(NamedTuple):
    """Positions of a grid's points: index * spacing + origin, each (3,) float64."""

    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]


@kernel
def fill_spans(
    centres: NDArray[np.float64],
    reaches: NDArray[np.float64],
    shape: NDArray[np.int64],
    grid: Grid,
    first: NDArray[np.int64],
    number: NDArray[np.int64],
) -> None:
    """Indices of the grid (3 axes) within reach of each blob.

    Parameters
    ----------
    centres, reaches, grid
        As in `Blobs` and `Grid`.
    shape : (3,) int64
    first, number : (n, 3) int64
        Filled; number is 0 where a blob does not meet the grid.
    """
    for b in range(reaches.size):
        for a in range(3):
            low, high = _span(centres[b, a] - grid.origin[a], reaches[b], grid.spacing[a], shape[a])
            first[b, a] = low
            number[b, a] = high - low


@njit(cache=True, nogil=True, inline="always")
def _span(centre: float, reach: float, spacing: float, size: int) -> tuple[int, int]:
    """First index, and one past the last, with abs(index * spacing - centre) <= reach."""
    if not reach >= 0:
        return 0, 0
    low = max(np.ceil((centre - reach) / spacing), 0.0)
    high = min(np.floor((centre + reach) / spacing) + 1.0, float(size))
    return (int(low), int(high)) if high > low else (0, 0)


@kernel
def fill_factors(blobs: Blobs, spreads: NDArray[np.float64], grid: Grid) -> None:
    """The lines of factors of all blobs; `spreads` (n,) float64 in the grid's units."""
    for b in range(spreads.size):
        for a in range(3):
            for i in range(blobs.number[b, a]):
                at = (blobs.first[b, a] + i) * grid.spacing[a] + grid.origin[a]
                d = at - blobs.centres[b, a]
                blobs.factors[blobs.begins[b, a] + i] = np.exp(-(d * d) / spreads[b] ** 2)


@kernel
def fill_planes(out: NDArray[np.floating], first_plane: int, blobs: Blobs, grid: Grid) -> None:
    """Sum of blobs on planes of a grid.

    Parameters
    ----------
    out : (n_planes, ny, nz) float32 or float64
        Planes `first_plane` and up of the grid; added to.
    first_plane : int
    blobs : Blobs
        Factors of the same dtype as `out`.
    grid : Grid
    """
    for i in range(out.shape[0]):
        _add_to_plane(out[i], first_plane + i, blobs, grid, False)


@kernel
def fill_whole_planes(
    out: NDArray[np.integer],
    first_plane: int,
    blobs: Blobs,
    grid: Grid,
    limits: tuple[float, float],
    truncate_each: bool,
) -> None:
    """`fill_planes` for whole numbers: truncated towards zero, kept within `limits`.

    The sums run in float64, in a plane that stays in the cache, so that nothing overflows
    before the limits are applied.

    Parameters
    ----------
    out : (n_planes, ny, nz) integer
        Filled.
    first_plane, blobs, grid
        As in `fill_planes`; factors float64.
    limits : (low, high)
        Smallest and largest value of the dtype.
    truncate_each : bool
        Truncate each blob, or their sum once.
    """
    sums = np.zeros(out.shape[1:])
    for i in range(out.shape[0]):
        sums[:] = 0
        _add_to_plane(sums, first_plane + i, blobs, grid, truncate_each)
        plane = out[i]
        for j in range(plane.shape[0]):
            for k in range(plane.shape[1]):
                plane[j, k] = min(max(sums[j, k], limits[0]), limits[1])


@part
def _add_to_plane(
    plane: NDArray[np.floating], i: int, blobs: Blobs, grid: Grid, truncate: bool
) -> None:
    """Add every blob that meets plane i: row by row of the disc in which it reaches the plane."""
    flat, row_stride = plane.reshape(-1), plane.shape[1]
    per_step = 1.0 / grid.spacing[2]
    for b in range(blobs.brights.size):
        offset = i - blobs.first[b, 0]
        if offset < 0 or offset >= blobs.number[b, 0]:
            continue
        dx = i * grid.spacing[0] + grid.origin[0] - blobs.centres[b, 0]
        left = blobs.reaches[b] ** 2 - dx * dx
        bright = blobs.brights[b] * np.float64(blobs.factors[blobs.begins[b, 0] + offset])
        centre = (blobs.centres[b, 2] - grid.origin[2]) * per_step
        first, most = blobs.first[b, 2], float(blobs.number[b, 2])
        for row in range(blobs.number[b, 1]):
            j = blobs.first[b, 1] + row
            dy = j * grid.spacing[1] + grid.origin[1] - blobs.centres[b, 1]
            rest = left - dy * dy
            if rest < 0:
                continue
            half = np.sqrt(rest) * per_step
            # Cut to the span as floats: a huge reach is beyond whole numbers.
            low = int(max(min(np.ceil(centre - half) - first, most), 0.0))
            high = int(max(min(np.floor(centre + half) + 1.0 - first, most), 0.0))
            weight = bright * np.float64(blobs.factors[blobs.begins[b, 1] + row])
            line = blobs.begins[b, 2] + low
            place = j * row_stride + first + low
            _add_line(flat, place, blobs.factors, line, high - low, weight, truncate)


@njit(cache=True, nogil=True, inline="always")
def _add_line(
    flat: NDArray[np.floating],
    place: int,
    factors: NDArray[np.floating],
    line: int,
    n: int,
    weight: float,
    truncate: bool,
) -> None:
    """flat[place + k] += weight * factors[line + k], k < n, truncated on the way if asked for.

    Indices are unsigned, since a signed one may be negative and would have to be tested; then
    neighbours are no longer one load. Slices of both arrays would cost more than the sums.
    """
    if truncate:
        sign, size = np.sign(weight), abs(weight)
        for k in range(n):
            flat[_U(place + k)] += sign * np.floor(size * factors[_U(line + k)])
    else:
        same = factors.dtype.type(weight)
        for k in range(n):
            flat[_U(place + k)] += same * factors[_U(line + k)]
