"""How far a realigned run is from the truth, where a simulated data set says what that is."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.errors import InputError
from keepstill.transforms.itk import read_itk

TRUTH = Path("derivatives") / "truth"
TRANSFORMS = "from-orig_to-boldref_mode-image_desc-truth_xfm.txt"
SBREF_TRANSFORM = "from-sbref_to-boldref_mode-image_desc-truth_xfm.txt"
BRAIN = "desc-brain_mask.nii.gz"
BOUND = "CramerRaoBoundMillimetres"


@dataclass(frozen=True)
class Truth:
    """True motion of a run.

    Attributes
    ----------
    moving_from_first : (n, 4, 4) float64
        World mm (RAS+) of volume 0 -> world mm of each volume.
    brain_mm : (m, 3) float64
        Voxels of volume 0 that are brain, world mm.
    bound_mm : float
        Cramér-Rao bound of the mean displacement error against a volume of the run.
    """

    moving_from_first: NDArray[np.float64]
    brain_mm: NDArray[np.float64]
    bound_mm: float

    def error_mm(
        self, moving_from_reference: NDArray[np.float64], reference: int
    ) -> NDArray[np.float64]:
        """Mean displacement error over the brain of each volume, (n,) mm.

        Parameters
        ----------
        moving_from_reference : (n, 4, 4) float64
        reference : int
            The volume that they are relative to.
        """
        first_from_reference = geometry.inverse(self.moving_from_first[reference])
        truth = np.array([matrix @ first_from_reference for matrix in self.moving_from_first])
        points = geometry.world(self.moving_from_first[reference], self.brain_mm)
        return geometry.displacement_mm(moving_from_reference, truth, points)


def truth_path(bids_dir: Path, source: Path) -> Path:
    """Where a data set has the true transforms of a run, whether it has them or not."""
    stem = source.name.removesuffix(".gz").removesuffix(".nii").removesuffix("bold")
    return bids_dir / TRUTH / source.relative_to(bids_dir).parent / f"{stem}{TRANSFORMS}"


def read_truth(path: Path) -> Truth:
    """Truth of a run, from its transforms and what lies beside them.

    Raises
    ------
    InputError
        If a file is missing or is not what `keepstill simulate` writes.
    """
    import nibabel as nib  # 0.2 s, needed for simulated runs only

    try:
        bound = json.loads(path.with_suffix(".json").read_text())[BOUND]["NoisyReference"]
        mask = nib.Nifti1Image.from_filename(
            path.with_name(path.name.removesuffix(TRANSFORMS) + BRAIN)
        )
        voxel = np.argwhere(np.asarray(mask.dataobj)).astype(np.float64)
        brain_mm = geometry.world(np.asarray(mask.affine, np.float64), voxel)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path.name}: truth unreadable ({type(error).__name__}: {error}); simulate the "
            "study again"
        ) from error
    return Truth(read_itk(path), brain_mm, float(bound))
