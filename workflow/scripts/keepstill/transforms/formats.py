"""Which format a file of transforms has."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError
from keepstill.transforms.afni import read_aff12
from keepstill.transforms.fsl import read_mat_folder, read_par
from keepstill.transforms.itk import MAGIC, read_itk
from keepstill.transforms.space import Space
from keepstill.transforms.spm import read_rp
from keepstill.transforms.text import read_text

KNOWN = (
    "ITK text, an mcflirt .mat folder or .par file, AFNI's .aff12.1D (-1Dmatrix_save) or SPM's "
    "rp_*.txt"
)
# A motion neither stretches nor mirrors: a determinant beyond these is something else.
_DETERMINANTS = (0.5, 2.0)


def read_any(path: Path, space: Space) -> NDArray[np.float64]:
    """Transforms of a run, one a volume, from any tool's file that is known.

    Parameters
    ----------
    path : Path
        File, or mcflirt's folder; told apart by name, ITK's by its first line.
    space : Space
        The run. Its own grid is what FSL's and AFNI's transforms count from.

    Returns
    -------
    moving_from_reference : (n, 4, 4) float64
        RAS+ world mm.

    Raises
    ------
    InputError
        If the format is not known, or these are no transforms of this run.
    """
    matrices = _read(path, space)
    if len(matrices) != space.n_volumes:
        raise InputError(
            f"{path}: {len(matrices)} transforms found, the run has {space.n_volumes} volumes; "
            "needs one a volume"
        )
    with np.errstate(all="ignore"):
        determinants = np.linalg.det(matrices[:, :3, :3])
    is_odd = ~np.isfinite(matrices).all(axis=(1, 2))
    is_odd |= ~((determinants > _DETERMINANTS[0]) & (determinants < _DETERMINANTS[1]))
    if is_odd.any():
        t = int(np.flatnonzero(is_odd)[0])
        raise InputError(
            f"{path}: the transform of volume {t} is no motion (determinant "
            f"{determinants[t]:.3g}); needs rotations and shifts"
        )
    return matrices


def _read(path: Path, space: Space) -> NDArray[np.float64]:
    name = path.name.lower()
    if path.is_dir():
        return read_mat_folder(path, space)
    if name.endswith(".par"):
        return read_par(path, space)
    if name.endswith(".aff12.1d"):
        return read_aff12(path, space)
    if name.startswith("rp_") and name.endswith(".txt"):
        return read_rp(path)
    if name.endswith(".1d"):
        raise InputError(
            f"{path}: the numbers of a .1D file do not say what they turn about; give the "
            "matrices, .aff12.1D (3dvolreg -1Dmatrix_save)"
        )
    if not read_text(path).startswith(MAGIC):
        raise InputError(f"{path}: unknown kind of transforms; needs {KNOWN}")
    return read_itk(path)
