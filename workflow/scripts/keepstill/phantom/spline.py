"""The fine head between its grid's points.

A quintic spline, by the sum over all its taps: any number of threads may read it at once, and it
shares no shortcut with the estimator that the phantom is to judge.
"""

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.bspline import GAINS, LANES, PAD, POLES, fill_coefficients, tap_slots
from keepstill.kernels.sampling import fill_directly, narrow_spans
from keepstill.phantom.head import Grid

Matrix = NDArray[np.float64]
Volume = NDArray[np.float32]

_DEGREE = 5
# Rows that are filtered side by side.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Spline:
    """Spline of a volume, its axes stored in a scanner's order.

    Attributes
    ----------
    coefficients : padded float32
        From `fill_coefficients`.
    shape : (nx, ny, nz)
    affine : (4, 4) float64
        Head mm from voxel.
    """

    coefficients: Volume
    shape: tuple[int, int, int]
    affine: Matrix


def spline_of(volume: Volume, grid: Grid, scanner_affine: Matrix) -> Spline:
    """Spline of what is not zero of a (nz, ny, nx) volume on a grid.

    Its axes are put in the order and direction that the scanner's voxels have, so that
    neighbours along a row of the scanner are neighbours in memory.
    """
    bounds = [_extent(volume, axis) for axis in (2, 1, 0)]
    kept = volume[tuple(slice(*bounds[axis]) for axis in (2, 1, 0))].T  # x, y, z
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    affine[:3, 3] = np.array(grid.origin_mm) + [low * grid.spacing_mm for low, _ in bounds]
    order = io_orientation(scanner_affine)
    for v, (axis, sign) in enumerate(order):
        w = int(axis)
        affine[w, v] = sign * grid.spacing_mm
        if sign < 0:
            kept = np.flip(kept, w)
            affine[w, 3] += (kept.shape[w] - 1) * grid.spacing_mm
    turned = np.ascontiguousarray(kept.transpose([int(axis) for axis in order[:, 0]]).T)
    nz, ny, nx = turned.shape
    coefficients = np.empty((nz + 2 * PAD, ny + 2 * PAD, nx + 2 * PAD + LANES), np.float32)
    block = np.empty((nx, _ROWS_AT_ONCE), np.float32)
    poles = np.array(POLES[_DEGREE], np.float32)
    fill_coefficients(turned, poles, GAINS[_DEGREE], coefficients, block)
    coefficients.setflags(write=False)
    return Spline(coefficients, (nx, ny, nz), affine)


def _extent(volume: Volume, axis: int) -> tuple[int, int]:
    """From and to of what is not zero along an axis, one plane of zeros to either side."""
    others = tuple(a for a in range(3) if a != axis)
    filled = np.flatnonzero(volume.any(axis=others))
    n = volume.shape[axis]
    if filled.size == 0:
        return 0, min(n, 4)
    return max(int(filled[0]) - 1, 0), min(int(filled[-1]) + 2, n)


def fill_sampled(out: Volume, spline: Spline, head_from_world: Matrix, affine: Matrix) -> None:
    """Fill a volume with the spline's values at its voxels.

    Parameters
    ----------
    out : (nz, ny, nx) float32
        Filled; contiguous. 0 outside the spline's grid.
    spline : Spline
    head_from_world : (4, 4) float64
        World mm -> head mm.
    affine : (4, 4) float64
        World mm from voxel of `out`.
    """
    nz, ny, nx = out.shape
    matrix = geometry.compose(geometry.inverse(spline.affine), head_from_world, affine)
    y, z = (index.ravel() for index in np.indices((ny, nz)))
    none = np.zeros_like(y)
    rows = np.column_stack([y, z, none, none + nx, (z * ny + y) * nx])
    spans = np.column_stack([none, none + nx])
    narrow_spans(spans, rows, matrix, spline.shape)
    taps = (_DEGREE, *tap_slots(_DEGREE))
    fill_directly(out.reshape(-1), rows, spans, spline.coefficients, taps, matrix)
