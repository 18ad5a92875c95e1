"""The moving volume as a B-spline: its values at voxels of another grid."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.bspline import (
    GAINS,
    LANES,
    PAD,
    POLES,
    fill_coefficients,
    filter_rows,
    tap_slots,
)
from keepstill.kernels.passes import ROW_PAD, Room, Rows, fill_by_passes, passes_of, width_of
from keepstill.kernels.sampling import (
    fill_directly,
    fill_nearest,
    fill_unmoved,
    leave_out_slices,
    narrow_spans,
)

_POLES = {degree: np.array(poles, np.float32) for degree, poles in POLES.items()}
# Rows that are filtered side by side; more do not fit in the nearest cache of a core.
_ROWS_AT_ONCE = 64
# Bytes that vectors are aligned to.
_ALIGNMENT = 64
# Passes are taken up to this obliqueness, in voxels a voxel: 5.7 degrees in cubic voxels. There
# the rms error, against the truth, is 2% larger than that of the sum over all taps; it grows with
# the square. Where only a rough value is asked for, they are taken up to the second number.
_MOST_OBLIQUE, _MOST_OBLIQUE_ROUGH = 0.1, 0.4
# A map that moves no voxel by more than rounding errors do leaves the voxels as they are.
_UNMOVED_VOXELS = 1e-9
_UNMOVED = np.eye(4)
NO_SLICES = np.zeros(0, np.int64)
_SHORTEST_AXIS_WITH_INSET = 8


class Coefficients:
    """Room for one volume's B-spline coefficients, and for work with them; one for each thread.

    Parameters
    ----------
    shape : (nz, ny, nx)
        Of the volumes that are to be sampled.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        nz, ny, nx = shape
        self.shape = shape
        # Lanes that a kernel rounds up to are read, never used; hence a tail.
        length = nx + 2 * ROW_PAD
        self.rows = _aligned(nz * ny * length + 2 * LANES)[: nz * ny * length].reshape(-1, length)
        self.block = _aligned(nx * _ROWS_AT_ONCE).reshape(nx, _ROWS_AT_ONCE)
        self._full: NDArray[np.float32] | None = None
        self._room: Room | None = None
        self._sizes = 0, 0, 0

    def full(self) -> NDArray[np.float32]:
        """Room for `fill_coefficients`."""
        if self._full is None:
            nz, ny, nx = self.shape
            self._full = np.empty((nz + 2 * PAD, ny + 2 * PAD, nx + 2 * PAD + LANES), np.float32)
        return self._full

    def room(self, n_slabs: int, n_lanes: int) -> Room:
        """Room for `fill_by_passes`, for so many y and x of the other grid."""
        nz, ny, _ = self.shape
        width = width_of(n_lanes)
        needed = ny * width + LANES, n_slabs * (nz * width + LANES), width + LANES
        if self._room is None or any(
            space.size < n for space, n in zip(self._room, needed, strict=False)
        ):
            plane, slabs, row = (max(n, m) for n, m in zip(needed, self._sizes, strict=True))
            self._sizes = plane, slabs, row
            ramp = np.arange(row, dtype=np.float32)
            self._room = Room(_aligned(plane), _aligned(slabs), _aligned(row), ramp)
        return self._room


@dataclass
class Moving:
    """A moving volume, ready to be sampled.

    Attributes
    ----------
    volume : (nz, ny, nx) float32
        Never modified.
    degree : int
        Of its spline, 1 to 5.
    coefficients : Coefficients
        Filled along x.
    lost_slices : (m,) int64
        Slices (z) that hold no signal of their own, but what their neighbours let expect.
    is_full : bool
        Whether the coefficients are filled along all three axes too.
    """

    volume: NDArray[np.float32]
    degree: int
    coefficients: Coefficients
    lost_slices: NDArray[np.int64]
    is_full: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along x, y, z."""
        nz, ny, nx = self.volume.shape
        return nx, ny, nz


def prepare_moving(
    volume: NDArray[np.float32],
    degree: int,
    coefficients: Coefficients,
    lost_slices: NDArray[np.int64] = NO_SLICES,
) -> Moving:
    """B-spline of a volume, ready to be sampled.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Finite and contiguous; never modified.
    degree : int
        1 to 5.
    coefficients : Coefficients
        Overwritten, and held by the result.
    lost_slices : (m,) int64
        As in `Moving`.
    """
    rows = volume.reshape(-1, volume.shape[2])
    filter_rows(rows, _POLES[degree], coefficients.rows, coefficients.block)
    return Moving(volume, degree, coefficients, lost_slices)


@dataclass(frozen=True)
class Asked:
    """Voxels of another grid at which a moving volume is asked for.

    Attributes
    ----------
    rows : (n_rows, 5) int64
        y, z, first x, number and place among the values of each row, ordered by y.
    spans : (n_rows, 2) int64
        First and one past the last point of each row that is asked for.
    rough : bool
        Whether a fast value is better than an accurate one.
    inset_voxels : float
        How far points must lie inside the moving field, and inside what its lost slices leave of
        it: between the last slices, a spline knows what it has on one side only. Short axes have
        no room for it. None asks for what is seen at all, lost slices and all.
    """

    rows: NDArray[np.int64]
    spans: NDArray[np.int64]
    rough: bool = False
    inset_voxels: float | None = None


def fill_values(
    out: NDArray[np.float32],
    asked: Asked,
    moving: Moving,
    moving_voxel_from_voxel: NDArray[np.float64],
) -> int:
    """Values of a moving volume at rows of voxels of another grid.

    By three one-dimensional passes if the map turns by little, else by the sum over all taps at
    once; and without interpolation where voxel lies on voxel, as in the first step of a fit.

    Parameters
    ----------
    out : (n,) float32
        Filled; 0 outside the field of view.
    asked : Asked
        Its spans are narrowed, in place, to the points inside the moving volume's field of view.
    moving : Moving
    moving_voxel_from_voxel : (4, 4) float64
        Voxel (x, y, z) of the other grid -> voxel of the moving volume.

    Returns
    -------
    n_inside : int
        Number of values.
    """
    rows, spans, to_moving = asked.rows, asked.spans, moving_voxel_from_voxel
    n_inside = narrowed(spans, asked, moving, to_moving)
    if np.abs(to_moving - _UNMOVED).max() * max(moving.shape) < _UNMOVED_VOXELS:
        fill_unmoved(out, rows, spans, moving.volume)
        return n_inside
    passes, obliqueness = passes_of(to_moving)
    if obliqueness <= (_MOST_OBLIQUE_ROUGH if asked.rough else _MOST_OBLIQUE):
        _fill_by_passes(out, asked, moving, passes)
    else:
        _fill_directly(out, asked, moving, to_moving)
    return n_inside


def narrowed(
    spans: NDArray[np.int64], asked: Asked, moving: Moving, to_moving: NDArray[np.float64]
) -> int:
    """Cut spans down, in place, to what of `asked` the moving volume shows; number of points."""
    n_inside: int
    if asked.inset_voxels is None:
        n_inside = narrow_spans(spans, asked.rows, to_moving, moving.shape)
        return n_inside
    nx, ny, nz = moving.shape
    inset = _inset(asked, nx), _inset(asked, ny), _inset(asked, nz)
    n_inside = narrow_spans(spans, asked.rows, to_moving, moving.shape, inset)
    if moving.lost_slices.size:
        n_inside = leave_out_slices(spans, asked.rows, to_moving, moving.lost_slices)
    return n_inside


def _inset(asked: Asked, size: int) -> float:
    return float(asked.inset_voxels or 0.0) if size >= _SHORTEST_AXIS_WITH_INSET else 0.0


def _fill_by_passes(
    out: NDArray[np.float32], asked: Asked, moving: Moving, passes: NDArray[np.float64]
) -> None:
    coefficients, rows = moving.coefficients, asked.rows
    n_slabs, n_lanes = int(rows[-1, 0] - rows[0, 0]) + 1, int((rows[:, 2] + rows[:, 3]).max())
    source = Rows(coefficients.rows, moving.shape, moving.degree, _POLES[moving.degree])
    fill_by_passes(out, rows, asked.spans, source, passes, coefficients.room(n_slabs, n_lanes))


def _fill_directly(
    out: NDArray[np.float32], asked: Asked, moving: Moving, to_moving: NDArray[np.float64]
) -> None:
    spline = moving.degree, *tap_slots(moving.degree)
    fill_directly(out, asked.rows, asked.spans, _full(moving), spline, to_moving)


def fill_beyond(
    out: NDArray[np.float32],
    asked: Asked,
    moving: Moving,
    moving_voxel_from_voxel: NDArray[np.float64],
) -> None:
    """Fill voxels of another grid, beyond what a moving volume shows, with the nearest it shows.

    Parameters
    ----------
    out : (n,) float32
        From `fill_values`; filled outside the spans.
    asked : Asked
        Its spans are those that `fill_values` has narrowed.
    moving : Moving
    moving_voxel_from_voxel : (4, 4) float64
        As in `fill_values`.
    """
    rows, spans = asked.rows, asked.spans
    if (spans[:, 1] - spans[:, 0] == rows[:, 3]).all():
        return
    spline = moving.degree, *tap_slots(moving.degree)
    fill_nearest(out, rows, spans, _full(moving), spline, moving_voxel_from_voxel, moving.shape)


def _full(moving: Moving) -> NDArray[np.float32]:
    """Coefficients along all three axes, padded."""
    degree, full = moving.degree, moving.coefficients.full()
    if not moving.is_full:
        block = moving.coefficients.block
        fill_coefficients(moving.volume, _POLES[degree], GAINS[degree], full, block)
        moving.is_full = True
    return full


def _aligned(n: int) -> NDArray[np.float32]:
    """(n,) zeros that begin where a vector may."""
    size = np.dtype(np.float32).itemsize
    space = np.zeros(n + _ALIGNMENT // size, np.float32)
    first = -(space.ctypes.data // size) % (_ALIGNMENT // size)
    return space[first : first + n]
