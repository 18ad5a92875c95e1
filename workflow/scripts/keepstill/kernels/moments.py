"""Sums over time of every voxel, a few volumes at a time."""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel

# Voxels that are looked at together: their sums stay in the nearest cache.
_LANES = 256


@kernel
def add_volumes(
    sums: NDArray[np.float64],
    volumes: NDArray[np.float32],
    origin: NDArray[np.float32],
    times: NDArray[np.float64],
) -> None:
    """Add volumes, less `origin`, to the sums of x, time x and x^2 of each voxel.

    Parameters
    ----------
    sums : (3, n_voxels) float64
        Changed in place, one volume after the other.
    volumes : (m, n_voxels) float32
    origin : (n_voxels,) float32
        One of the series' volumes: what is left is small, and its squares are exact enough.
    times : (m,) float64
    """
    for first in range(0, origin.size, _LANES):
        last = min(origin.size, first + _LANES)
        start, of_x = origin[first:last], sums[0, first:last]
        of_time_x, of_square = sums[1, first:last], sums[2, first:last]
        for t in range(times.size):
            volume, time = volumes[t, first:last], times[t]
            for i in range(volume.size):
                x = np.float64(volume[i]) - np.float64(start[i])
                of_x[i] += x
                of_time_x[i] += time * x
                of_square[i] += x * x
