"""Low-passing volumes, and filling the holes in them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]

_FWHM_PER_SD = 2.3548200450309493
# Holes are filled from this neighbourhood (full width at half maximum, voxels), where it has at
# least this weight of numbers; further inside a hole is 0.
_FILL_FWHM_VOXELS = 3.0
_LEAST_FILL_WEIGHT = 1e-3


def lowpass(volume: Volume, fwhm_voxels: float | Sequence[float]) -> Volume:
    """Gaussian low-pass of a (nz, ny, nx) volume, mirrored borders; width 0 changes nothing.

    One width for all axes, or one for each of z, y, x.
    """
    widths = [fwhm_voxels] * 3 if isinstance(fwhm_voxels, int | float) else fwhm_voxels
    for axis, width in enumerate(widths):
        if width > 0:
            volume = _filtered(volume, _gaussian_taps(width), axis)
    return volume


def _gaussian_taps(fwhm_voxels: float) -> list[float]:
    sd = fwhm_voxels / _FWHM_PER_SD
    reach = int(np.ceil(3.5 * sd))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd) ** 2)
    return [float(tap) for tap in taps / taps.sum()]


def _filtered(volume: Volume, taps: Sequence[float], axis: int) -> Volume:
    reach = len(taps) // 2
    width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
    mode = "reflect" if volume.shape[axis] > reach else "edge"
    return valid_filtered(np.pad(volume, width, mode=mode), taps, axis)  # type: ignore[call-overload]


def valid_filtered(volume: Volume, taps: Sequence[float], axis: int) -> Volume:
    """Sum of shifted copies, where all of them overlap: the axis loses len(taps) - 1."""
    n = volume.shape[axis] - len(taps) + 1
    out = None
    for i, tap in enumerate(taps):
        index = [slice(None)] * 3
        index[axis] = slice(i, i + n)
        term = volume[tuple(index)] * np.float32(tap)
        out = term if out is None else out + term
    assert out is not None
    return out


# A greater value is none: no scanner measures it, and a spline's filter would overflow.
_LARGEST = 1e30


def fill_missing(volume: Volume) -> tuple[Volume, NDArray[np.bool_] | None]:
    """A volume whose voxels are all numbers, and which were not.

    A hole takes the Gaussian-weighted mean of the numbers around it, so that the spline through
    it does not ring.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        NaN, infinite and absurdly large voxels are holes; never modified.

    Returns
    -------
    filled : (nz, ny, nx) float32
        The volume itself if it has no hole.
    missing : (nz, ny, nx) bool or None
        None if it has no hole.
    """
    if volume.min() >= -_LARGEST and volume.max() <= _LARGEST:  # NaN is the least of all
        return volume, None
    missing = ~(np.abs(volume) <= _LARGEST)
    weight = lowpass((~missing).astype(np.float32), _FILL_FWHM_VOXELS)
    mean = lowpass(np.where(missing, np.float32(0), volume), _FILL_FWHM_VOXELS)
    near = weight > _LEAST_FILL_WEIGHT
    filling = np.divide(mean, weight, out=np.zeros_like(volume), where=near)
    return np.where(missing, filling, volume), missing
