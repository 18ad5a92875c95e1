"""Connected parts of masks."""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel


@kernel
def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Largest part of a (nz, ny, nx) mask whose voxels touch by faces; first of equals."""
    nz, ny, nx = mask.shape
    labels = np.zeros(mask.size, np.int32)
    flat = mask.ravel()
    stack = np.empty(mask.size, np.int64)
    best, best_size, label = 0, 0, 0
    for seed in range(mask.size):
        if not flat[seed] or labels[seed] != 0:
            continue
        label += 1
        labels[seed] = label
        stack[0] = seed
        n, size = 1, 0
        while n > 0:
            n -= 1
            here = stack[n]
            size += 1
            x, y, z = here % nx, (here // nx) % ny, here // (nx * ny)
            for inside, there in (
                (x > 0, here - 1),
                (x < nx - 1, here + 1),
                (y > 0, here - nx),
                (y < ny - 1, here + nx),
                (z > 0, here - nx * ny),
                (z < nz - 1, here + nx * ny),
            ):
                if inside and flat[there] and labels[there] == 0:
                    labels[there] = label
                    stack[n] = there
                    n += 1
        if size > best_size:
            best, best_size = label, size
    return ((labels == best) & flat).reshape(mask.shape)
