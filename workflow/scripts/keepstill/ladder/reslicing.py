"""The reslice loop: with an inverse at each voxel, with none, and compiled.

Motion is kept as tables have it, from the moving volume to the reference; a loop over the
reference's voxels needs the inverse.
"""

from collections.abc import Callable, Sequence

import numpy as np

from keepstill.ladder import itk_bridge
from keepstill.ladder.classic import Matrix, value_at
from keepstill.ladder.itk_bridge import Sampled, Volume

Fill = Callable[[Volume, Sequence[int]], None]
_MOST_SCALING = 1e-6


def prepare_reslice(loop: str, volume: Volume, affine: Matrix, motion: Matrix) -> Fill:
    """What reslices some slices of a volume into another, (nz, ny, nx), the spline being ready.

    Parameters
    ----------
    loop : str
        ``inverting``, ``hoisted`` or ``compiled``.
    volume : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel.
    motion : (4, 4) float64
        World mm of the reference from that of the moving volume.
    """
    if loop == "compiled":
        from keepstill.ladder.loops import fill_compiled

        splined = itk_bridge.coefficients(volume)
        source_from_voxel = np.linalg.inv(affine) @ np.linalg.inv(motion) @ affine
        return lambda out, slices: fill_compiled(
            out, splined, source_from_voxel, np.array(slices, np.int64)
        )
    moving = itk_bridge.sampled(volume, affine)
    fill = {"inverting": fill_inverting, "hoisted": fill_hoisted}[loop]
    return lambda out, slices: fill(out, moving, motion, slices)


def fill_inverting(out: Volume, moving: Sampled, motion: Matrix, slices: Sequence[int]) -> None:
    """Reslice slices of a volume into `out`, (nz, ny, nx): the matrix is inverted at each voxel."""
    for z in slices:
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                point = moving.image.TransformIndexToPhysicalPoint([x, y, z])
                _check_rigid(motion)
                source = np.linalg.inv(motion) @ [*point, 1.0]
                out[z, y, x] = value_at(moving, source[:3], 0.0)


def fill_hoisted(out: Volume, moving: Sampled, motion: Matrix, slices: Sequence[int]) -> None:
    """`fill_inverting` with the determinant and the inverse taken once, before the loop."""
    _check_rigid(motion)
    moving_from_reference = np.linalg.inv(motion)
    for z in slices:
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                point = moving.image.TransformIndexToPhysicalPoint([x, y, z])
                source = moving_from_reference @ [*point, 1.0]
                out[z, y, x] = value_at(moving, source[:3], 0.0)


def _check_rigid(motion: Matrix) -> None:
    if abs(np.linalg.det(motion[:3, :3]) - 1) > _MOST_SCALING:
        raise ValueError("not a rigid matrix")
