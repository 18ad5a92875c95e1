"""A moving volume on the reference's grid, in one interpolation."""

import functools

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.sampling import narrow_spans
from keepstill.moving import Asked, Moving, fill_beyond, fill_values


def reslice_volume(
    out: NDArray[np.float32],
    moving: Moving,
    moving_affine: NDArray[np.float64],
    moving_from_reference: NDArray[np.float64],
    affine: NDArray[np.float64],
) -> int:
    """Fill `out` with the moving volume, seen in the reference's pose and grid.

    Parameters
    ----------
    out : (nz, ny, nx) float32
        Filled; contiguous. 0 where the source lies outside the moving field of view.
    moving : Moving
    moving_affine : (4, 4) float64
        World mm from voxel of the moving volume.
    moving_from_reference : (4, 4) float64
        World mm of the reference -> world mm of the volume.
    affine : (4, 4) float64
        World mm from voxel of the output grid.

    Returns
    -------
    n_inside : int
        Number of voxels with a source inside the field of view.
    """
    to_moving = geometry.compose(geometry.inverse(moving_affine), moving_from_reference, affine)
    nz, ny, nx = out.shape
    return fill_values(out.reshape(-1), _all_of((nz, ny, nx)), moving, to_moving)


def extend_volume(
    out: NDArray[np.float32],
    moving: Moving,
    moving_affine: NDArray[np.float64],
    moving_from_reference: NDArray[np.float64],
    affine: NDArray[np.float64],
) -> None:
    """Fill what `reslice_volume` has left at 0 with the value at the nearest point of the field.

    Parameters are those of `reslice_volume`.
    """
    to_moving = geometry.compose(geometry.inverse(moving_affine), moving_from_reference, affine)
    nz, ny, nx = out.shape
    asked = _all_of((nz, ny, nx))
    narrow_spans(asked.spans, asked.rows, to_moving, moving.shape)
    fill_beyond(out.reshape(-1), asked, moving, to_moving)


def _all_of(shape: tuple[int, int, int]) -> Asked:
    """Every voxel of a (nz, ny, nx) grid."""
    rows = _grid_rows(shape)
    spans = np.zeros((len(rows), 2), np.int64)
    spans[:, 1] = shape[2]
    return Asked(rows, spans)


@functools.lru_cache(maxsize=2)
def _grid_rows(shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """All rows of a (nz, ny, nx) grid, as `Asked` wants them."""
    nz, ny, nx = shape
    y, z = (index.ravel() for index in np.indices((ny, nz)))
    none = np.zeros_like(y)
    return np.column_stack([y, z, none, none + nx, (z * ny + y) * nx])


def coverage(
    moving_from_reference: NDArray[np.float64],
    moving: tuple[NDArray[np.float64], tuple[int, int, int]],
    affine: NDArray[np.float64],
    shape: tuple[int, int, int],
) -> NDArray[np.bool_]:
    """Where all volumes have data once they are resliced.

    Parameters
    ----------
    moving_from_reference : (n, 4, 4) float64
    moving : affine (4, 4), shape (nx, ny, nz)
        Grid of the moving volumes.
    affine : (4, 4) float64
        World mm from voxel of the output grid.
    shape : (nz, ny, nx)
        Of the output grid.

    Returns
    -------
    covered : (nz, ny, nx) bool
    """
    asked, voxel_from_world = _all_of(shape), geometry.inverse(moving[0])
    rows, spans = asked.rows, asked.spans
    for matrix in moving_from_reference:
        narrow_spans(spans, rows, geometry.compose(voxel_from_world, matrix, affine), moving[1])
    x = np.arange(shape[2])
    covered = np.empty(shape, np.bool_)
    covered[rows[:, 1], rows[:, 0]] = (x >= spans[:, :1]) & (x < spans[:, 1:])
    return covered


def carried_mask(
    mask: NDArray[np.bool_],
    affine: NDArray[np.float64],
    onto: tuple[NDArray[np.float64], tuple[int, int, int]],
    mask_from_grid: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """A mask on another grid: there is what its nearest voxel says.

    Parameters
    ----------
    mask : (nz, ny, nx) bool
    affine : (4, 4) float64
        World mm from voxel of the mask.
    onto : tuple of (4, 4) float64 and (nx, ny, nz)
        World mm from voxel of the grid, and its shape.
    mask_from_grid : (4, 4) float64
        World mm of the grid -> world mm of the mask.
    """
    shape = onto[1][::-1]
    voxel = np.indices(shape)[::-1].reshape(3, -1).T.astype(np.float64)
    to_mask = geometry.compose(geometry.inverse(affine), mask_from_grid, onto[0])
    nearest = np.rint(geometry.world(to_mask, voxel)).astype(np.int64)[:, ::-1]
    inside = ((nearest >= 0) & (nearest < mask.shape)).all(axis=1)
    out = np.zeros(len(nearest), np.bool_)
    out[inside] = mask[tuple(nearest[inside].T)]
    return out.reshape(shape)
