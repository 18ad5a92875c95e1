"""Figures of a run: motion numbers, framewise displacement, rms displacement, DVARS."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.series import (
    HALF_BITS,
    LAG1,
    add_squared_steps,
    count_halves,
    fill_chosen,
    fill_moments,
    fill_ranked,
    float_of,
)
from keepstill.team import in_threads

Motions = NDArray[np.float64]
# Values that are looked at together: masked voxels times volumes.
_VALUES_AT_ONCE = 1 << 20
# Of so many volumes one is counted first: where the median is among these, it is likely to be.
_SAMPLED = 16
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
    series: NDArray[np.float32],
    good: NDArray[np.intp],
    mask: NDArray[np.bool_],
    n_threads: int = 1,
) -> SeriesFigures:
    """DVARS of the realigned series.

    Parameters
    ----------
    series : (n, nz, ny, nx) float32
        May be mapped; masked voxels of a few thousand are held at a time by each thread.
    good : (m,) int
        Numbers of the volumes that could be realigned. They alone say what change is to be
        expected; the others' changes are held against it.
    mask : (nz, ny, nx) bool
    n_threads : int
        The bytes do not depend on it: blocks of voxels are the same ones, and summed in order.

    Notes
    -----
    DVARS: Nichols 2013, with FSL's lower percentiles, as nipype's `compute_dvars`. Voxels that
    do not vary are left out.
    """
    flat, voxels = _flat(series), np.flatnonzero(mask)
    n = len(flat)
    median = _median(flat, good, voxels, n_threads)
    scale = _SCALED_MEDIAN / median if median > 0 else 1.0

    def of_block(chosen: NDArray[np.intp]) -> tuple[NDArray[np.float64], float, int]:
        block = _chosen(flat, np.arange(n), chosen)
        steady = block if len(good) == n else np.ascontiguousarray(block[good])
        sd, squares = _robust_sd(steady) * scale, np.zeros(n - 1)
        keep = sd > _VARIANCE_TOLERANCE
        add_squared_steps(block, keep.astype(np.float64), squares)
        expected = (sd * np.sqrt(2.0 * (1.0 - _lag1(steady))))[keep]
        return squares, float(expected.sum()), int(keep.sum())

    squares, sd_sum, n_voxels = np.zeros(n - 1), 0.0, 0
    for more in in_threads(n_threads, of_block, _parts(voxels, _VALUES_AT_ONCE // n)):
        squares, sd_sum, n_voxels = squares + more[0], sd_sum + more[1], n_voxels + more[2]
    dvars, std_dvars = np.full((2, n), np.nan)
    if n_voxels > 0:
        dvars[1:] = scale * np.sqrt(squares / n_voxels)
    if sd_sum > 0:
        std_dvars = dvars * (n_voxels / sd_sum)
    return SeriesFigures(dvars, std_dvars)


def _flat(series: NDArray[np.float32]) -> NDArray[np.float32]:
    """A series as (n, n_voxels), mapped if it was; read-only, for which kernels are compiled."""
    flat = np.asarray(series).reshape(len(series), -1)
    flat.flags.writeable = False
    return flat


def _parts(numbers: NDArray[np.intp], n_at_once: int) -> list[NDArray[np.intp]]:
    """Numbers, so many at a time, but at least one."""
    step = max(1, n_at_once)
    return [numbers[first : first + step] for first in range(0, len(numbers), step)]


def _chosen(
    flat: NDArray[np.float32], volumes: NDArray[np.intp], voxels: NDArray[np.intp]
) -> NDArray[np.float32]:
    """Some voxels, by flat index, of some volumes, (n, m)."""
    out = np.empty((volumes.size, voxels.size), np.float32)
    fill_chosen(flat, volumes, voxels, out)
    return out


def _lag1(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Lag-1 autocorrelation of each voxel about its mean (Yule-Walker, biased sums)."""
    moments = np.empty((3, block.shape[1]))
    fill_moments(block, moments)
    return moments[LAG1]


def _robust_sd(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Interquartile range / 1.349 of each voxel, lower percentiles."""
    n, m = block.shape
    low, high = np.empty(m, np.float32), np.empty(m, np.float32)
    fill_ranked(block, int(0.25 * (n - 1)), low)
    fill_ranked(block, int(0.75 * (n - 1)), high)
    return (high.astype(np.float64) - low) / _IQR_PER_SD


def _median(
    flat: NDArray[np.float32],
    volumes: NDArray[np.intp],
    voxels: NDArray[np.intp],
    n_threads: int = 1,
) -> float:
    """Median over some volumes and voxels of (n, n_voxels), exactly, without holding the series.

    Values are counted by the upper half of their bits, and those with the upper half of the value
    that is looked for by the lower. What a few volumes say of that upper half mostly holds: then
    the series is read once.
    """
    n_values = voxels.size * len(volumes)
    if n_values == 0:
        return 0.0

    def counted(some: NDArray[np.intp], upper: int) -> NDArray[np.int64]:
        def of_thread(k: int) -> NDArray[np.int64]:
            counts = np.zeros((2, 1 << HALF_BITS), np.int64)
            count_halves(flat, (some[k::n_threads].copy(), voxels), upper, counts)
            return counts

        # Whole numbers: their sum is the same for any number of threads.
        return np.asarray(sum(in_threads(n_threads, of_thread, range(n_threads))))

    sample = volumes[::_SAMPLED]
    likely, _ = _ranked(counted(sample, 0)[0], len(sample) * voxels.size // 2)
    by_upper, lower_of_likely = counted(volumes, likely)
    by_lower = {likely: lower_of_likely}
    middle = []
    for rank in ((n_values - 1) // 2, n_values // 2):
        upper, rest = _ranked(by_upper, rank)
        if upper not in by_lower:
            by_lower[upper] = counted(volumes, upper)[1]
        lower, _ = _ranked(by_lower[upper], rest)
        middle.append(float_of((upper << HALF_BITS) + lower))
    return sum(middle) / 2


def _ranked(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Where the value of a rank stands among counted ones, and its rank among its equals."""
    until = np.cumsum(counts)
    place = int(np.searchsorted(until, rank, side="right"))
    return place, rank - int(until[place] - counts[place])
