"""The reslice loop as numba compiles it, its slices spread over threads.

Compiled code cannot call ITK, so the loop sums ITK's own coefficients. `reslicing.fill_hoisted` is
its slow twin.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_njit: Any = numba.njit  # its stub does not know all options


@_njit(cache=True)
def _weights(offset: float) -> tuple[float, float, float, float]:
    """Cubic B-spline at offset + 1, offset, 1 - offset and 2 - offset."""
    rest = 1 - offset
    return (
        rest**3 / 6,
        2 / 3 - offset**2 * (2 - offset) / 2,
        2 / 3 - rest**2 * (2 - rest) / 2,
        offset**3 / 6,
    )


@_njit(cache=True)
def _mirrored(index: int, n: int) -> int:
    """Index beyond the first or last voxel, reflected there."""
    index = abs(index)
    return index if index < n else 2 * (n - 1) - index


@_njit(cache=True)
def _value(coefficients: NDArray[np.float32], x: float, y: float, z: float) -> float:
    """Sum over the 64 coefficients about a voxel position; 0 outside the volume."""
    nz, ny, nx = coefficients.shape
    if not (0 <= x <= nx - 1 and 0 <= y <= ny - 1 and 0 <= z <= nz - 1):
        return 0.0
    ix, iy, iz = int(x), int(y), int(z)
    wx, wy, wz = _weights(x - ix), _weights(y - iy), _weights(z - iz)
    total = 0.0
    for k in range(4):
        for j in range(4):
            row = coefficients[_mirrored(iz + k - 1, nz), _mirrored(iy + j - 1, ny)]
            for i in range(4):
                total += wz[k] * wy[j] * wx[i] * row[_mirrored(ix + i - 1, nx)]
    return total


@_njit(cache=True, parallel=True)
def fill_compiled(
    out: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    source_from_voxel: NDArray[np.float64],
    slices: NDArray[np.int64],
) -> None:
    """Reslice slices of a volume into `out`, (nz, ny, nx), from B-spline coefficients.

    Parameters
    ----------
    out, coefficients : (nz, ny, nx) float32
    source_from_voxel : (4, 4) float64
        Voxel position in the moving volume from that in the reference.
    slices : (n,) int64
    """
    a = source_from_voxel
    for s in numba.prange(slices.size):
        z = slices[s]
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                out[z, y, x] = _value(
                    coefficients,
                    a[0, 0] * x + a[0, 1] * y + a[0, 2] * z + a[0, 3],
                    a[1, 0] * x + a[1, 1] * y + a[1, 2] * z + a[1, 3],
                    a[2, 0] * x + a[2, 1] * y + a[2, 2] * z + a[2, 3],
                )
