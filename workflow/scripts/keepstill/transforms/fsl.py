"""FSL: mcflirt's .mat folder and .par file; moving -> reference, in FSL's scaled mm."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.errors import InputError
from keepstill.figures import centre_of_gravity, fsl_from_voxel
from keepstill.transforms.space import Space
from keepstill.transforms.text import read_numbers

_MATRIX = re.compile(r"MAT_(\d+)")


def read_mat_folder(path: Path, space: Space) -> NDArray[np.float64]:
    """Transforms of the matrices ``MAT_0000``, ... in a folder, (n, 4, 4), RAS+ mm.

    Raises
    ------
    InputError
        If there are none, one is missing, or one is no matrix.
    """
    named = {int(m[1]): file for file in path.iterdir() if (m := _MATRIX.fullmatch(file.name))}
    if not named:
        raise InputError(f"{path}: a folder without files MAT_0000, ...; needs that of mcflirt")
    missing = sorted(set(range(len(named))) - set(named))
    if missing:
        raise InputError(f"{path}: {len(named)} matrices, but MAT_{missing[0]:04d} is missing")
    matrices = [read_numbers(named[t], 4) for t in range(len(named))]
    for t, matrix in enumerate(matrices):
        if matrix.shape != (4, 4):
            raise InputError(f"{named[t]}: {len(matrix)} rows found; needs 4")
    return _ras(np.array(matrices), space)


def read_par(path: Path, space: Space) -> NDArray[np.float64]:
    """Transforms of a .par file, (n, 4, 4), RAS+ mm.

    Its columns are rotations about x, y, z (rad), with R = Rx Ry Rz, and shifts (mm), about the
    reference's centre of gravity. The file does not say where that is: the reference is the
    volume of the run that did not move.

    Raises
    ------
    InputError
        If the reference was no volume of the run.
    """
    rows = read_numbers(path, 6)
    still = np.flatnonzero((rows == 0).all(axis=1))
    if not still.size or still[0] >= space.n_volumes:
        raise InputError(
            f"{path}: no row of zeros: the reference was no volume of the run, and the file does "
            "not hold its centre of gravity; give the .mat folder (mcflirt -mats)"
        )
    voxel = centre_of_gravity(space.volume_at(int(still[0])))
    centre_mm = geometry.world(fsl_from_voxel(space.affine, space.shape), voxel)
    return _ras(np.array([_about(centre_mm, row) for row in rows]), space)


def _about(centre_mm: NDArray[np.float64], row: NDArray[np.float64]) -> NDArray[np.float64]:
    (cos_x, cos_y, cos_z), (sin_x, sin_y, sin_z) = np.cos(row[:3]), np.sin(row[:3])
    about_x = np.array([[1, 0, 0], [0, cos_x, sin_x], [0, -sin_x, cos_x]])
    about_y = np.array([[cos_y, 0, -sin_y], [0, 1, 0], [sin_y, 0, cos_y]])
    about_z = np.array([[cos_z, sin_z, 0], [-sin_z, cos_z, 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = about_x @ about_y @ about_z
    out[:3, 3] = row[3:] + centre_mm - out[:3, :3] @ centre_mm
    return out


def _ras(reference_from_moving: NDArray[np.float64], space: Space) -> NDArray[np.float64]:
    fsl_from_world = geometry.compose(
        fsl_from_voxel(space.affine, space.shape), geometry.inverse(space.affine)
    )
    inverted = np.linalg.inv(reference_from_moving)
    return np.asarray(geometry.inverse(fsl_from_world) @ inverted @ fsl_from_world)
