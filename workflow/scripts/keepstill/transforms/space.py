"""What transforms count from that name no world: the grid and the volumes of their run."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Space:
    """The run that transforms belong to.

    Attributes
    ----------
    affine : (4, 4) float64
        World mm from voxel.
    shape : (nx, ny, nz)
    n_volumes : int
    volume_at : callable
        Number of a volume -> (nz, ny, nx) float32.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    n_volumes: int
    volume_at: Callable[[int], NDArray[np.float32]]
