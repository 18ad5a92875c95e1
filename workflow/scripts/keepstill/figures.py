"""Figures of a run: motion numbers, framewise displacement, rms displacement, DVARS, tSNR."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.series import (
    HALF_BITS,
    LAG1,
    MEAN,
    VARIANCE,
    add_squared_steps,
    count_halves,
    fill_moments,
    fill_ranked,
    float_of,
)

Motions = NDArray[np.float64]
# Values that are looked at together: masked voxels times volumes.
_VALUES_AT_ONCE = 1 << 20
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
class Series:
    """A mapped series, as stored.

    Attributes
    ----------
    voxels : (n, nz, ny, nx)
    slope, inter : float
        Intensity = voxel * slope + inter.
    """

    voxels: NDArray[Any]
    slope: float = 1.0
    inter: float = 0.0

    def masked(self, t: int, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Intensity in volume t of some voxels, by flat index; what is no number is 0."""
        volume = np.asarray(self.voxels)[t]
        stored = volume.reshape(-1).take(chosen).astype(np.float32, copy=False)
        if self.voxels.dtype.kind == "f" and not np.isfinite(stored).all():
            stored = np.nan_to_num(stored, posinf=0, neginf=0)
        if self.slope != 1.0 or self.inter != 0.0:
            stored = stored * np.float32(self.slope) + np.float32(self.inter)
        return stored

    def block(self, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Intensity of some voxels in all volumes, (n, m)."""
        out = np.empty((len(self.voxels), chosen.size), np.float32)
        for t in range(len(out)):
            out[t] = self.masked(t, chosen)
        return out


@dataclass(frozen=True)
class SeriesFigures:
    """What a realigned series says in its brain mask.

    Attributes
    ----------
    dvars, std_dvars : (n,) float64
        NaN first; data scaled to median 1000.
    tsnr_before, tsnr_after : float
        Median over the mask of mean / standard deviation, linear trend removed.
    variance_before, variance_after : float
        Mean over the mask of the temporal variance, linear trend removed.
    """

    dvars: NDArray[np.float64]
    std_dvars: NDArray[np.float64]
    tsnr_before: float
    tsnr_after: float
    variance_before: float
    variance_after: float


def series_figures(before: Series, after: Series, mask: NDArray[np.bool_]) -> SeriesFigures:
    """DVARS of the realigned series, and tSNR and variance of both series.

    Parameters
    ----------
    before, after : Series
        The run as it came, and realigned, on one grid.
    mask : (nz, ny, nx) bool

    Notes
    -----
    DVARS: Nichols 2013, with FSL's lower percentiles, as nipype's `compute_dvars`. Voxels that
    do not vary are left out.
    """
    n, voxels = len(after.voxels), np.flatnonzero(mask)
    median = _median(after, voxels)
    scale = _SCALED_MEDIAN / median if median > 0 else 1.0
    squares, n_voxels, sd_sum = np.zeros(n - 1), 0, 0.0
    nothing = np.zeros((3, 0))
    moments: dict[str, list[NDArray[np.float64]]] = {"before": [nothing], "after": [nothing]}
    n_at_once = max(1, _VALUES_AT_ONCE // n)
    for first in range(0, voxels.size, n_at_once):
        chosen = voxels[first : first + n_at_once]
        moments["before"].append(_moments(before.block(chosen)))
        block = after.block(chosen)
        moments["after"].append(_moments(block))
        sd = _robust_sd(block) * scale
        keep = sd > _VARIANCE_TOLERANCE
        add_squared_steps(block, keep.astype(np.float64), squares)
        lag1 = moments["after"][-1][LAG1]
        sd_sum += float((sd * np.sqrt(2.0 * (1.0 - lag1)))[keep].sum())
        n_voxels += int(keep.sum())
    dvars = np.full(n, np.nan)
    expected = 0.0
    if n_voxels > 0:
        dvars[1:] = scale * np.sqrt(squares / n_voxels)
        expected = sd_sum / n_voxels
    stats = {name: _summary(np.concatenate(parts, axis=1)) for name, parts in moments.items()}
    return SeriesFigures(
        dvars=dvars,
        std_dvars=dvars / expected if expected > 0 else np.full(n, np.nan),
        tsnr_before=stats["before"][0],
        tsnr_after=stats["after"][0],
        variance_before=stats["before"][1],
        variance_after=stats["after"][1],
    )


def _moments(block: NDArray[np.float32]) -> NDArray[np.float64]:
    out = np.empty((3, block.shape[1]))
    fill_moments(block, out)
    return out


def _robust_sd(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Interquartile range / 1.349 of each voxel, lower percentiles."""
    n, m = block.shape
    low, high = np.empty(m, np.float32), np.empty(m, np.float32)
    fill_ranked(block, int(0.25 * (n - 1)), low)
    fill_ranked(block, int(0.75 * (n - 1)), high)
    return (high.astype(np.float64) - low) / _IQR_PER_SD


def _median(series: Series, voxels: NDArray[np.int64]) -> float:
    """Median over some voxels and time, exactly, without holding the series.

    Values are counted by the upper half of their bits, and then, among those with the upper half
    of the value that is looked for, by the lower.
    """
    n_values = voxels.size * len(series.voxels)
    if n_values == 0:
        return 0.0
    by_upper = _counted(series, voxels, -1)
    by_lower: dict[int, NDArray[np.int64]] = {}
    middle = []
    for rank in ((n_values - 1) // 2, n_values // 2):
        upper, rest = _ranked(by_upper, rank)
        if upper not in by_lower:
            by_lower[upper] = _counted(series, voxels, upper)
        lower, _ = _ranked(by_lower[upper], rest)
        middle.append(float_of((upper << HALF_BITS) + lower))
    return sum(middle) / 2


def _counted(series: Series, voxels: NDArray[np.int64], upper: int) -> NDArray[np.int64]:
    counts = np.zeros(1 << HALF_BITS, np.int64)
    for t in range(len(series.voxels)):
        count_halves(series.masked(t, voxels), upper, counts)
    return counts


def _ranked(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Where the value of a rank stands among counted ones, and its rank among its equals."""
    until = np.cumsum(counts)
    place = int(np.searchsorted(until, rank, side="right"))
    return place, rank - int(until[place] - counts[place])


def _summary(moments: NDArray[np.float64]) -> tuple[float, float]:
    """Median tSNR and mean variance over voxels; 0 where nothing varies."""
    mean, variance = moments[MEAN], moments[VARIANCE]
    varies = variance > 0
    tsnr = float(np.median(mean[varies] / np.sqrt(variance[varies]))) if varies.any() else 0.0
    return tsnr, float(variance.mean()) if variance.size else 0.0
