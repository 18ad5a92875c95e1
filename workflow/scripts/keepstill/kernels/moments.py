"""Sums over time of every voxel, one volume after the other."""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel


@kernel
def add_volume(
    sums: NDArray[np.float64],
    volume: NDArray[np.float32],
    origin: NDArray[np.float32],
    time: float,
) -> None:
    """Add a volume, less `origin`, to the sums of x, time x and x^2 of each voxel.

    Parameters
    ----------
    sums : (3, n_voxels) float64
        Changed in place.
    volume, origin : (n_voxels,) float32
        The origin is one of the volumes: what is left is small, and its squares are exact enough.
    time : float
    """
    for i in range(volume.size):
        x = np.float64(volume[i]) - np.float64(origin[i])
        sums[0, i] += x
        sums[1, i] += time * x
        sums[2, i] += x * x
