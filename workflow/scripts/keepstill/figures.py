"""Figures of a run: motion numbers, framewise displacement, rms displacement, DVARS."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry

Motions = NDArray[np.float64]
# Masked voxels that are looked at together, over all volumes.
_VOXELS_AT_ONCE = 4096
# DVARS is reported on data scaled to this median (Nichols 2013).
_SCALED_MEDIAN = 1000.0
_VARIANCE_TOLERANCE = 1e-7
_IQR_PER_SD = 1.349
# Motion numbers are rounded here: below is what rounding errors of the matrices leave.
_MOTION_DECIMALS = 11


def fsl_motion(
    moving_from_reference: Motions, affine: Motions, shape: tuple[int, int, int], centre: Motions
) -> NDArray[np.float64]:
    """The six numbers of an FSL ``.par`` row for every volume, (n, 6).

    Parameters
    ----------
    moving_from_reference : (n, 4, 4) float64
    affine : (4, 4) float64
        World mm from voxel of the reference.
    shape : (nx, ny, nz)
        Of the reference.
    centre : (3,) float64
        The reference's centre of gravity, in voxels.

    Returns
    -------
    motion : (n, 6) float64
        trans_x, trans_y, trans_z (mm) and rot_x, rot_y, rot_z (rad): moving -> reference, in
        FSL's scaled mm (voxel times edge, x flipped when the affine's determinant is positive),
        about `centre`, with R = Rx Ry Rz as mcflirt writes it.
    """
    fsl_from_world = geometry.compose(fsl_from_voxel(affine, shape), geometry.inverse(affine))
    world_from_fsl = geometry.inverse(fsl_from_world)
    centre_mm = geometry.world(fsl_from_voxel(affine, shape), centre)
    out = np.empty((len(moving_from_reference), 6))
    for t, matrix in enumerate(moving_from_reference):
        m = geometry.compose(fsl_from_world, geometry.inverse(matrix), world_from_fsl)
        rotation = m[:3, :3]
        moved = [
            rotation[r, 0] * centre_mm[0]
            + rotation[r, 1] * centre_mm[1]
            + rotation[r, 2] * centre_mm[2]
            for r in range(3)
        ]
        out[t, :3] = m[:3, 3] + moved - centre_mm
        out[t, 3:] = fsl_angles_rad(rotation)
    return np.round(out, _MOTION_DECIMALS)


def fsl_from_voxel(affine: Motions, shape: tuple[int, int, int]) -> Motions:
    """FSL's scaled mm from voxel of a grid, (4, 4)."""
    sizes_mm = geometry.voxel_sizes_mm(affine)
    out = np.diag([*sizes_mm, 1.0])
    if np.linalg.det(affine[:3, :3]) > 0:
        out[0, 0] = -sizes_mm[0]
        out[0, 3] = (shape[0] - 1) * sizes_mm[0]
    return out


def fsl_angles_rad(rotation: Motions) -> tuple[float, float, float]:
    """Angles about x, y, z (rad) with rotation = Rx Ry Rz, +sin at (1, 2), (2, 0) and (0, 1)."""
    cos_y = float(np.hypot(rotation[0, 0], rotation[0, 1]))
    y = float(np.arctan2(-rotation[0, 2], cos_y))
    if cos_y < 1e-4:  # looking straight along x: turns about x and z are one
        return float(np.arctan2(-rotation[2, 1], rotation[1, 1])), y, 0.0
    x = float(np.arctan2(rotation[1, 2], rotation[2, 2]))
    return x, y, float(np.arctan2(rotation[0, 1], rotation[0, 0]))


def centre_of_gravity(volume: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intensity-weighted mean voxel (x, y, z) of a (nz, ny, nx) volume, its minimum as zero.

    As FSL's newimage computes it, so that our numbers are those of a ``.par`` file.
    """
    weights = volume.astype(np.float64) - float(volume.min())
    total = float(weights.sum())
    if total <= 0:
        return (np.array(volume.shape[::-1], dtype=np.float64) - 1) / 2
    sums = [weights.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in (2, 1, 0)]
    return np.array([float((s * np.arange(s.size)).sum()) / total for s in sums])


def framewise_displacement_mm(motion: NDArray[np.float64], radius_mm: float) -> Motions:
    """Power 2012 (NeuroImage 59:2142): (n,) mm, NaN first; `motion` as from `fsl_motion`."""
    change = np.abs(np.diff(motion, axis=0))
    out = np.full(len(motion), np.nan)
    out[1:] = change[:, :3].sum(axis=1) + radius_mm * change[:, 3:].sum(axis=1)
    return out


def rms_displacement_mm(moving_from_reference: Motions, centre_mm: Motions) -> Motions:
    """Jenkinson 1999 (TR99MJ1) between neighbouring volumes: (n,) mm, NaN first.

    Parameters
    ----------
    moving_from_reference : (n, 4, 4) float64
    centre_mm : (3,) float64
        World point in the middle of the head: the centre of the field of view.
    """
    out = np.full(len(moving_from_reference), np.nan)
    forward = [geometry.inverse(matrix) for matrix in moving_from_reference]
    for t in range(1, len(forward)):
        change = geometry.compose(forward[t], geometry.inverse(forward[t - 1])) - np.eye(4)
        a = change[:3, :3]
        v = change[:3, 3] + (a * centre_mm).sum(axis=1)
        out[t] = np.sqrt((v * v).sum() + geometry.HEAD_RADIUS_MM**2 / 5.0 * (a * a).sum())
    return out


@dataclass(frozen=True)
class SeriesFigures:
    """What a realigned series says in its brain mask.

    Attributes
    ----------
    dvars, std_dvars : (n,) float64
        NaN first; data scaled to median 1000.
    """

    dvars: NDArray[np.float64]
    std_dvars: NDArray[np.float64]


def series_figures(
    series: NDArray[np.float32], good: NDArray[np.intp], mask: NDArray[np.bool_]
) -> SeriesFigures:
    """DVARS of the realigned series.

    Parameters
    ----------
    series : (n, nz, ny, nx) float32
        May be mapped; masked voxels of a few thousand are held at a time.
    good : (m,) int
        Numbers of the volumes that could be realigned. They alone say what change is to be
        expected; the others' changes are held against it.
    mask : (nz, ny, nx) bool

    Notes
    -----
    DVARS: Nichols 2013, with FSL's lower percentiles, as nipype's `compute_dvars`. Voxels that
    do not vary are left out.
    """
    squares, n_voxels, sd_sum = np.zeros(len(series) - 1), 0, 0.0
    median = _masked_median(series, good, mask)
    scale = np.float32(_SCALED_MEDIAN / median) if median > 0 else np.float32(1)
    for block in _blocks(series, mask):
        scaled = block * scale
        steady = np.ascontiguousarray(scaled[:, good])
        sd = _robust_sd(steady)
        keep = sd > _VARIANCE_TOLERANCE
        sd_sum += float((sd[keep] * np.sqrt(2.0 * (1.0 - _lag1(steady[keep])))).sum())
        step = np.diff(scaled[keep], axis=1)
        squares += np.square(step, dtype=np.float64).sum(axis=0)
        n_voxels += int(keep.sum())
    dvars, std_dvars = np.full((2, len(series)), np.nan)
    if n_voxels > 0:
        dvars[1:] = np.sqrt(squares / n_voxels)
    if sd_sum > 0:
        std_dvars = dvars * (n_voxels / sd_sum)
    return SeriesFigures(dvars, std_dvars)


def _blocks(series: NDArray[np.float32], mask: NDArray[np.bool_]) -> Iterator[NDArray[np.float32]]:
    """Masked voxels over time, (at most 4096, n) float32 at a time."""
    voxels = np.flatnonzero(mask)
    for first in range(0, voxels.size, _VOXELS_AT_ONCE):
        some = voxels[first : first + _VOXELS_AT_ONCE]
        block = np.empty((some.size, len(series)), np.float32)
        for t in range(len(series)):
            block[:, t] = series[t].reshape(-1)[some]
        yield block


def _masked_median(
    series: NDArray[np.float32], chosen: NDArray[np.intp], mask: NDArray[np.bool_]
) -> float:
    """Median over mask and chosen volumes."""
    voxels = np.flatnonzero(mask)
    values = np.empty((len(chosen), voxels.size), np.float32)
    for row, t in zip(values, chosen, strict=True):
        row[:] = series[t].reshape(-1)[voxels]
    return float(np.median(values)) if values.size else 0.0


def _robust_sd(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Interquartile range / 1.349 of each row, lower percentiles."""
    n = block.shape[1]
    low, high = int(0.25 * (n - 1)), int(0.75 * (n - 1))
    ordered = np.partition(block, (low, high), axis=1)
    return (ordered[:, high].astype(np.float64) - ordered[:, low]) / _IQR_PER_SD


def _lag1(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Lag-1 autocorrelation of each row about its mean (Yule-Walker, biased sums)."""
    centred = block - block.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    power = np.square(centred, dtype=np.float64).sum(axis=1)
    lagged = np.multiply(centred[:, 1:], centred[:, :-1], dtype=np.float64).sum(axis=1)
    return np.divide(lagged, power, out=np.zeros_like(power), where=power > 0)
