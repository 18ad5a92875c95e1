"""Maps of a series over time: mean, variance, and temporal signal-to-noise ratio."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.moments import add_volume

# Less of a voxel's power than this beside its straight line is rounding, not noise.
_POWER_TOLERANCE = 1e-12
# A straight line goes through two volumes, whatever they show.
_LEAST_VOLUMES = 3


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every voxel over time.

    Attributes
    ----------
    mean : (nz, ny, nx) float64
    variance : (nz, ny, nx) float64
        About the voxel's own straight line over time; 0 where nothing varies, and NaN where a
        volume holds no number.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def tsnr(self) -> NDArray[np.float32]:
        """Mean / standard deviation, (nz, ny, nx); 0 where nothing varies or is known."""
        out = np.zeros(self.mean.shape, np.float32)
        known = self.variance > 0
        out[known] = self.mean[known] / np.sqrt(self.variance[known])
        return out

    def within(self, mask: NDArray[np.bool_]) -> tuple[float, float] | None:
        """Median tSNR and mean variance of the voxels of a mask that vary; None without any."""
        chosen = mask & (self.variance > 0)
        if not chosen.any():
            return None
        return float(np.median(self.tsnr()[chosen])), float(self.variance[chosen].mean())


def temporal_moments(
    volume_at: Callable[[int], NDArray[np.float32]], chosen: NDArray[np.intp]
) -> Moments:
    """Moments over some volumes of a series, of which one is held at a time.

    Parameters
    ----------
    volume_at : callable
        Number of a volume -> (nz, ny, nx) float32.
    chosen : (n,) int
        Numbers of the volumes, at least one. Times are those numbers: a gap is a gap.

    Returns
    -------
    Moments
        With n - 2 degrees of freedom; variance is 0 for fewer than three volumes.
    """
    sums = MomentSums(chosen)
    for t in chosen:
        sums.add(int(t), volume_at(int(t)))
    return sums.moments()


class MomentSums:
    """Sums that give the moments of a series whose volumes go by once, in their order.

    Parameters
    ----------
    chosen : (n,) int
        As of `temporal_moments`.
    """

    def __init__(self, chosen: NDArray[np.intp]) -> None:
        times = chosen.astype(np.float64) - float(chosen.mean())
        self._times = {int(t): float(time) for t, time in zip(chosen, times, strict=True)}
        self._origin = np.zeros((0, 0, 0), np.float32)
        self._sums = np.zeros((3, 0))

    def add(self, t: int, volume: NDArray[np.float32]) -> None:
        """Count volume t, (nz, ny, nx), if it is one of those chosen."""
        if t not in self._times:
            return
        volume = np.array(volume, np.float32)
        if not self._origin.size:
            self._origin, self._sums = volume, np.zeros((3, volume.size))
        origin = self._origin.reshape(-1)
        add_volume(self._sums, volume.reshape(-1), origin, self._times[t])

    def moments(self) -> Moments:
        """Mean and variance, once all are counted."""
        n, shape = len(self._times), self._origin.shape
        power = _power_about_line(self._sums, np.array(list(self._times.values())))
        mean = self._origin.reshape(-1) + self._sums[0] / n
        return Moments(mean.reshape(shape), (power / max(n - 2, 1)).reshape(shape))


def _power_about_line(sums: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of squares of each voxel about its straight line, from `add_volume`'s sums."""
    n = len(times)
    if n < _LEAST_VOLUMES:
        return np.zeros(sums.shape[1])
    with np.errstate(invalid="ignore"):  # infinite voxels
        power = sums[2] - sums[0] ** 2 / n - sums[1] ** 2 / (times**2).sum()
    power[power <= _POWER_TOLERANCE * sums[2]] = 0.0
    return np.asarray(power)
