"""Voxels as whole numbers of a file."""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel

_MOST = np.float32(32767)


@kernel
def fill_int16(
    voxels: NDArray[np.float32], slope: np.float32, inter: np.float32, out: NDArray[np.int16]
) -> None:
    """Stored value of each voxel, rounded to the nearest, half to the even one.

    Parameters
    ----------
    voxels : (n,) float32
        Only read.
    slope, inter : float32
        Voxel = stored value * slope + inter.
    out : (n,) int16
        Filled; values beyond +-32767 are set to that.
    """
    for i in range(voxels.size):
        stored = np.rint((voxels[i] - inter) / slope)
        out[i] = np.int16(max(min(stored, _MOST), -_MOST))
