"""The reference: what of it every volume is compared with, prepared once a run."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.errors import EmptyVolumeError
from keepstill.kernels.bspline import GAINS, LANES, PAD, POLES, fill_coefficients
from keepstill.kernels.sums import N_COLUMNS, Points, normal_matrix
from keepstill.masks import head_mask
from keepstill.settings import EstimateSettings
from keepstill.smooth import lowpass, valid_filtered

Volume = NDArray[np.float32]

# Value and slope of the quintic B-spline at -2 ... 2: the derivative of a spline at grid points.
_QUINTIC_VALUE = (1 / 120, 26 / 120, 66 / 120, 26 / 120, 1 / 120)
_QUINTIC_SLOPE = (-1 / 24, -10 / 24, 0.0, 10 / 24, 1 / 24)
# The border of the field is left out of the sampling points where an axis has room for it: its
# slices lose and gain tissue that no other slice sees.
_SHORTEST_AXIS_WITH_BORDER = 8
# Early steps look at the rows of one y in so many, the last ones at all: what is left out is
# whole slabs of the volume, which then need not be interpolated in y and z.
_COARSE_STEP = 4


@dataclass(frozen=True)
class Level:
    """Sampling points and their normal matrix (7, 7), test_jacobian' jacobian.

    A rough level is one whose result is a starting point only.
    """

    points: Points
    normal: NDArray[np.float64]
    rough: bool


@dataclass(frozen=True)
class Reference:
    """A reference that volumes can be realigned to.

    Attributes
    ----------
    volume : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel.
    centre_mm : (3,) float64
        World point that steps turn about: the middle of the sampling points.
    coarse, fine : Level
        Sampling points of every fourth y, and all of them.
    basis : (7, m) float64
        Steps that are allowed, as combinations of shifts, rotations and intensity: all seven,
        or within the slice plane two shifts, one rotation and intensity.
    mean_intensity, sd_intensity : float
        Mean and standard deviation of the reference over the sampling points.
    """

    volume: Volume
    affine: NDArray[np.float64]
    centre_mm: NDArray[np.float64]
    coarse: Level
    fine: Level
    basis: NDArray[np.float64]
    mean_intensity: float
    sd_intensity: float


def prepare_reference(
    volume: Volume,
    affine: NDArray[np.float64],
    settings: EstimateSettings,
    in_plane: bool = False,
    missing: NDArray[np.bool_] | None = None,
) -> Reference:
    """Sampling points, Jacobians and normal matrices of a reference volume.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Finite voxels; never modified.
    affine : (4, 4) float64
        World mm (RAS+) from voxel (x, y, z).
    settings : EstimateSettings
    in_plane : bool
        Whether steps are held to the plane of the grid's first two axes.
    missing : (nz, ny, nx) bool, optional
        Voxels that were no numbers and have been filled.

    Raises
    ------
    EmptyVolumeError
        If no voxel stands out from the background.
    """
    points_mask = _without_border(head_mask(volume, rim_voxels=3))
    if missing is not None:
        points_mask &= ~missing
    if not points_mask.any():
        raise EmptyVolumeError("the reference shows no head: no voxel stands out from background")
    z, y, x = np.nonzero(points_mask)
    centre_voxel = np.array([x.mean(), y.mean(), z.mean()])
    centre_mm = geometry.world(affine, centre_voxel)
    smooth = lowpass(volume, settings.lowpass_fwhm_voxels)
    gradient = world_gradient(volume, affine)
    smooth_gradient = world_gradient(smooth, affine)
    rows = _rows(points_mask)
    levels = []
    for chosen, rough in ((_coarse(rows), True), (rows, False)):
        points = _points(chosen, (volume, smooth), (gradient, smooth_gradient), affine, centre_mm)
        levels.append(Level(points, normal_matrix(points), rough))
    return Reference(
        volume=volume,
        affine=affine,
        centre_mm=centre_mm,
        coarse=levels[0],
        fine=levels[1],
        basis=_in_plane_basis(affine) if in_plane else np.eye(N_COLUMNS),
        mean_intensity=float(volume[points_mask].mean(dtype=np.float64)),
        sd_intensity=float(volume[points_mask].std(dtype=np.float64)),
    )


def world_gradient(volume: Volume, affine: NDArray[np.float64]) -> list[Volume]:
    """Derivatives of a volume's quintic spline along world x, y, z (per mm), at its voxels."""
    nz, ny, nx = volume.shape
    padded = np.empty((nz + 2 * PAD, ny + 2 * PAD, nx + 2 * PAD + LANES), np.float32)
    block = np.empty((nx, LANES), np.float32)
    fill_coefficients(volume, np.array(POLES[5], np.float32), GAINS[5], padded, block)
    coefficients = padded[2:-2, 2:-2, 2 : nx + 6]
    by_voxel = []
    for slope_axis in (2, 1, 0):
        part = coefficients
        for axis in range(3):
            taps = _QUINTIC_SLOPE if axis == slope_axis else _QUINTIC_VALUE
            part = valid_filtered(part, taps, axis)
        by_voxel.append(part)
    voxel_from_world = geometry.inverse(affine)
    to_world = voxel_from_world.astype(np.float32)
    return [
        to_world[0, w] * by_voxel[0] + to_world[1, w] * by_voxel[1] + to_world[2, w] * by_voxel[2]
        for w in range(3)
    ]


def _in_plane_basis(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Steps (7, 4) along the grid's x and y, about its z, and of intensity."""
    axes = affine[:3, :3] / geometry.voxel_sizes_mm(affine)
    basis = np.zeros((N_COLUMNS, 4))
    basis[0:3, 0], basis[0:3, 1], basis[3:6, 2], basis[6, 3] = *axes[:, :2].T, axes[:, 2], 1.0
    return basis


def _without_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    mask = mask.copy()
    for axis, size in enumerate(mask.shape):
        if size >= _SHORTEST_AXIS_WITH_BORDER:
            edge = np.moveaxis(mask, axis, 0)
            edge[0] = edge[-1] = False
    return mask


def _rows(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows (y, z, first x, number), by y: each from its first to its last masked voxel."""
    y, z = np.nonzero(mask.any(axis=2).T)
    first = mask.argmax(axis=2)[z, y]
    last = mask.shape[2] - 1 - mask[:, :, ::-1].argmax(axis=2)[z, y]
    return np.column_stack([y, z, first, last - first + 1]).astype(np.int64)


def _coarse(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of every fourth y."""
    ys = np.unique(rows[:, 0])
    return rows[np.isin(rows[:, 0], ys[(ys.size - 1) % _COARSE_STEP // 2 :: _COARSE_STEP])]


def _points(
    rows: NDArray[np.int64],
    volumes: tuple[Volume, Volume],
    gradients: tuple[list[Volume], list[Volume]],
    affine: NDArray[np.float64],
    centre_mm: NDArray[np.float64],
) -> Points:
    """Sampling points of some rows, from (plain, low-passed) volumes and gradients."""
    sizes = rows[:, 3]
    begins = np.cumsum(sizes) - sizes
    row = np.repeat(np.arange(len(rows)), sizes)
    x = np.arange(row.size) - begins[row] + rows[row, 2]
    voxels = rows[row, 1], rows[row, 0], x
    at = geometry.world(affine, np.stack(voxels[::-1], axis=-1))
    arm = (at - centre_mm).astype(np.float32)
    jacobians = [np.empty((N_COLUMNS, row.size), np.float32) for _ in volumes]
    for jacobian, volume, gradient in zip(jacobians, volumes, gradients, strict=True):
        g = [component[voxels] for component in gradient]
        jacobian[0:3] = g
        jacobian[3] = arm[:, 1] * g[2] - arm[:, 2] * g[1]
        jacobian[4] = arm[:, 2] * g[0] - arm[:, 0] * g[2]
        jacobian[5] = arm[:, 0] * g[1] - arm[:, 1] * g[0]
        jacobian[6] = volume[voxels]
    return Points(np.column_stack([rows, begins]), volumes[0][voxels], *jacobians)
