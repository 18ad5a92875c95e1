"""A simulated run's error, as its page shows it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill.report.run_record import Confounds, RunRecord, finite_mean
from keepstill.transforms.itk import read_itk
from keepstill.truth import read_truth

TRANSFORMS_SUFFIX = "_xfm.txt"


@dataclass(frozen=True)
class TruthError:
    """How far a run is from the truth.

    Attributes
    ----------
    volumes_mm : (n,) float64
        Mean displacement error over the brain; NaN at the reference and at failed volumes.
    bound_mm : float
        Cramér-Rao bound of its mean.
    """

    volumes_mm: NDArray[np.float64]
    bound_mm: float

    @property
    def mean_mm(self) -> float:
        """Mean over the volumes that have an error; NaN if none has."""
        return finite_mean(self.volumes_mm)

    @property
    def worst_mm(self) -> float:
        """Largest error; NaN if no volume has one."""
        return float(np.fmax.reduce(self.volumes_mm))


def error_against(
    truth: Path, record: RunRecord, confounds: Confounds, output_dir: Path
) -> TruthError | None:
    """Error of a run; None where its reference is no volume of the run.

    Raises
    ------
    InputError
        If the truth or the run's transforms cannot be read.
    """
    references = np.flatnonzero(confounds.status == "reference")
    paths = [path for path in record.outputs if path.endswith(TRANSFORMS_SUFFIX)]
    if len(references) != 1 or len(paths) != 1:
        return None
    known, reference = read_truth(truth), int(references[0])
    error_mm = known.error_mm(read_itk(output_dir / paths[0]), reference)
    error_mm[confounds.failed] = np.nan
    error_mm[reference] = np.nan
    return TruthError(error_mm, known.bound_mm)
