"""Maps of a series over time: mean, variance, and temporal signal-to-noise ratio."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.moments import add_volumes
from keepstill.team import in_threads

# Less of a voxel's power than this beside its straight line is rounding, not noise.
_POWER_TOLERANCE = 1e-12
# A straight line goes through two volumes, whatever they show.
_LEAST_VOLUMES = 3
# Parts of a volume that threads share: 2, 3, 4 or 6 have equally many.
_SLABS = 12
_VALUES_AT_ONCE = 1 << 19  # of one slab, that a thread holds


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
    slab_of: Callable[[NDArray[np.intp], slice], NDArray[np.float32]],
    chosen: NDArray[np.intp],
    shape: tuple[int, int, int],
    n_threads: int = 1,
) -> Moments:
    """Moments over some volumes of a series, of which a little is held at a time.

    Parameters
    ----------
    slab_of : callable
        Numbers of m volumes, and which of their slices -> (m, n_slices, ny, nx) float32.
    chosen : (n,) int
        Numbers of the volumes, at least one. Times are those numbers: a gap is a gap.
    shape : (nz, ny, nx)
    n_threads : int
        The bytes do not depend on it: every voxel's sums are made by one thread, in time's order.

    Returns
    -------
    Moments
        With n - 2 degrees of freedom; variance is 0 for fewer than three volumes.
    """
    nz, ny, nx = shape
    n_slices = -(-nz // _SLABS)
    n_volumes = max(1, _VALUES_AT_ONCE // (n_slices * ny * nx))

    def of_slab(first: int) -> Moments:
        slices, sums = slice(first, first + n_slices), MomentSums(chosen)
        for start in range(0, len(chosen), n_volumes):
            volumes = chosen[start : start + n_volumes]
            sums.add(volumes, slab_of(volumes, slices))
        return sums.moments()

    slabs = in_threads(n_threads, of_slab, range(0, nz, n_slices))
    mean, variance = ([getattr(slab, name) for slab in slabs] for name in ("mean", "variance"))
    return Moments(np.concatenate(mean), np.concatenate(variance))


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

    def add(self, numbers: NDArray[np.intp], volumes: NDArray[np.float32]) -> None:
        """Count volumes by their numbers, (m,), that are among those chosen.

        Parameters
        ----------
        numbers : (m,) int
        volumes : (m, nz, ny, nx) float32
        """
        if not self._origin.size:
            self._origin = volumes[0].copy()
            self._sums = np.zeros((3, self._origin.size))
        times = np.array([self._times[t] for t in numbers.tolist()])
        lines = np.ascontiguousarray(volumes, np.float32).reshape(len(times), -1)
        add_volumes(self._sums, lines, self._origin.reshape(-1), times)

    def moments(self) -> Moments:
        """Mean and variance, once all are counted."""
        n, shape = len(self._times), self._origin.shape
        power = _power_about_line(self._sums, np.array(list(self._times.values())))
        mean = self._origin.reshape(-1) + self._sums[0] / n
        return Moments(mean.reshape(shape), (power / max(n - 2, 1)).reshape(shape))


def _power_about_line(sums: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of squares of each voxel about its straight line, from `add_volumes`'s sums."""
    n = len(times)
    if n < _LEAST_VOLUMES:
        return np.zeros(sums.shape[1])
    with np.errstate(invalid="ignore"):  # infinite voxels
        power = sums[2] - sums[0] ** 2 / n - sums[1] ** 2 / (times**2).sum()
    power[power <= _POWER_TOLERANCE * sums[2]] = 0.0
    return np.asarray(power)
