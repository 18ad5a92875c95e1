"""AFNI: .aff12.1D; base -> input, LPS mm, in the plumb frame of an oblique grid."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.transforms.itk import RAS_FROM_LPS
from keepstill.transforms.space import Space
from keepstill.transforms.text import read_numbers


def read_aff12(path: Path, space: Space) -> NDArray[np.float64]:
    """Transforms of an .aff12.1D file (3dvolreg -1Dmatrix_save), (n, 4, 4), RAS+ mm.

    To AFNI the axes of an oblique grid are those of the scanner that they are nearest to, with
    the first voxel where it is; its matrices are true in that frame.
    """
    rows = read_numbers(path, 12).reshape(-1, 3, 4)
    plumb_from_world = geometry.compose(_plumb(space.affine), geometry.inverse(space.affine))
    matrices = np.tile(np.eye(4), (len(rows), 1, 1))
    matrices[:, :3] = rows
    plumb = RAS_FROM_LPS @ matrices @ RAS_FROM_LPS
    return np.asarray(geometry.inverse(plumb_from_world) @ plumb @ plumb_from_world)


def _plumb(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """World from voxel of a grid whose axes are turned to the nearest ones of the scanner."""
    sizes_mm = geometry.voxel_sizes_mm(affine)
    out = np.eye(4)
    out[:3, 3] = affine[:3, 3]
    out[:3, :3] = 0
    for axis in range(3):
        nearest = int(np.abs(affine[:3, axis]).argmax())
        out[nearest, axis] = np.copysign(sizes_mm[axis], affine[nearest, axis])
    return out
