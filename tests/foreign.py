"""Known motion in other tools' files, written by nitransforms and scipy."""

import nibabel as nib
import numpy as np
from nitransforms.io.afni import AFNILinearTransformArray
from nitransforms.io.fsl import FSLLinearTransformArray
from scipy.spatial.transform import Rotation

from keepstill import figures, phantom
from keepstill.transforms import Space
from keepstill.write import itk_transforms

SHAPE = (20, 22, 14)
STILL = 3


def space_of(affine):
    volume = phantom.ball(SHAPE, 0.1).T
    return Space(affine, SHAPE, 5, lambda t: volume * (1 if t == STILL else 0))


def poses():
    """(5, 4, 4) moving_from_reference; volume `STILL` is the reference."""
    out = phantom.drawn_poses("spikes", 5, 2)
    out = out @ np.linalg.inv(out[STILL])
    out[STILL] = np.eye(4)
    return out


def image(affine):
    return nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)


def matrices_of(array):
    return [transform.structarr["parameters"] for transform in array.xforms]


def put_rows(path, rows):
    path.write_text("".join(" ".join(map(repr, map(float, row))) + "\n" for row in rows))
    return path


def fsl_matrices(moving_from_reference, affine):
    """moving -> reference in FSL's mm, by nitransforms."""
    array = FSLLinearTransformArray.from_ras(moving_from_reference, image(affine), image(affine))
    return np.array(matrices_of(array))


def put_mat_folder(folder, moving_from_reference, affine):
    folder.mkdir()
    for t, matrix in enumerate(fsl_matrices(moving_from_reference, affine)):
        put_rows(folder / f"MAT_{t:04d}", matrix)
    return folder


def put_par(path, moving_from_reference, affine):
    """Angles by scipy: FSL's and ours have the opposite sign on all axes."""
    voxel = figures.centre_of_gravity(space_of(affine).volume_at(STILL))
    centre = (figures.fsl_from_voxel(affine, SHAPE) @ [*voxel, 1])[:3]
    rows = []
    for matrix in fsl_matrices(moving_from_reference, affine):
        turn = matrix[:3, :3]
        angles = -Rotation.from_matrix(turn).as_euler("XYZ")
        rows.append([*angles, *(matrix[:3, 3] + turn @ centre - centre)])
    rows[STILL] = [0.0] * 6
    return put_rows(path, rows)


def put_rp(path, moving_from_reference):
    """Angles by scipy: SPM's sign about y is the usual one, about x and z the opposite."""
    rows = []
    for matrix in np.linalg.inv(moving_from_reference):
        angles = Rotation.from_matrix(matrix[:3, :3]).as_euler("XYZ") * [-1, 1, -1]
        rows.append([*matrix[:3, 3], *angles])
    return put_rows(path, rows)


def put_aff12(path, moving_from_reference, affine):
    array = AFNILinearTransformArray.from_ras(moving_from_reference, image(affine), image(affine))
    rows = [matrix[:3].ravel() for matrix in matrices_of(array)]
    put_rows(path, rows)
    path.write_text("# 3dvolreg matrices (DICOM-to-DICOM, row-by-row):\n" + path.read_text())
    return path


def put_all(folder, moving_from_reference, affine):
    """One and the same motion in every format."""
    itk = folder / "a_xfm.txt"
    itk.write_text(itk_transforms(moving_from_reference))
    return {
        "itk": itk,
        "mat": put_mat_folder(folder / "a.mat", moving_from_reference, affine),
        "par": put_par(folder / "a.par", moving_from_reference, affine),
        "rp": put_rp(folder / "rp_a.txt", moving_from_reference),
        "aff12": put_aff12(folder / "a.aff12.1D", moving_from_reference, affine),
    }
