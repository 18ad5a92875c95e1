"""A realigned run as the ranks left it, and the names of the files that are made of it."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import __version__, geometry
from keepstill.bids import derivative_folder, derivative_name, percent_encoded
from keepstill.read import StagedRun, open_staged
from keepstill.settings import RealignSettings
from keepstill.stage import ITK_NOTE, MOTION

# Each output's ending, and its entities in the order of the name. The realigned run has the desc
# that the settings give it; the others keep theirs, which fMRIPrep looks for.
OUTPUTS: dict[str, tuple[str, dict[str, str]]] = {
    "bold": ("bold.nii.gz", {}),
    "boldref": ("boldref.nii.gz", {"desc": "hmc"}),
    "brain": ("mask.nii.gz", {"desc": "brain"}),
    "coverage": ("mask.nii.gz", {"desc": "coverage"}),
    "tsnr_before": ("boldmap.nii.gz", {"stat": "tsnr", "desc": "raw"}),
    "tsnr_after": ("boldmap.nii.gz", {"stat": "tsnr", "desc": "hmc"}),
    "transforms": (
        "xfm.txt",
        {"from": "orig", "to": "boldref", "mode": "image", "desc": "hmc"},
    ),
    "confounds": ("timeseries.tsv", {"desc": "confounds"}),
}


# What all runs of a session or subject end in; its name begins with theirs.
_SHARED_ENDING, _SHARED_ENTITIES = "boldref.nii.gz", {"desc": "shared"}


@dataclass(frozen=True)
class Realigned:
    """A realigned run, ready to be written.

    Attributes
    ----------
    run : StagedRun
    settings : RealignSettings
    moving_from_reference : (n, 4, 4) float64
    per_volume : dict of str to (n,) arrays
        ``status``, ``iterations``, ``cost``, ``overlap``, ``scale``, ``n_lost_slices``.
    covariance : (n, 6, 6) float64
        Of each volume's motion: shifts (mm) and rotations (rad) about `centre_mm`.
    centre_mm : (3,) float64
    reference : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel of the reference.
    run_from_reference : (4, 4) float64
        World mm of the reference -> world mm of the run's own reference: of the run, what all
        others go by. The identity where the two are one.
    run_centre_voxel : (3,) float64
        Centre of gravity of the run's own reference, in voxels of the run.
    series : (n, nz, ny, nx) float32 or None
        The realigned volumes, mapped; None where only transforms are wanted.
    missing : (nz, ny, nx) bool or None
        Voxels of the run's grid that are no number in some volume.
    warnings : tuple of str
    itk_version : str or None
        Of the ITK that took part.
    check : dict or None
        What ITK said of some volumes, as `itk_engine.check.disagreement` has it, but for its
        warnings.
    """

    run: StagedRun
    settings: RealignSettings
    moving_from_reference: NDArray[np.float64]
    per_volume: dict[str, NDArray[Any]]
    covariance: NDArray[np.float64]
    centre_mm: NDArray[np.float64]
    reference: NDArray[np.float32]
    affine: NDArray[np.float64]
    run_from_reference: NDArray[np.float64]
    run_centre_voxel: NDArray[np.float64]
    series: NDArray[np.float32] | None
    missing: NDArray[np.bool_] | None
    warnings: tuple[str, ...]
    itk_version: str | None = None
    check: dict[str, Any] | None = None

    @property
    def engine(self) -> str:
        """Who estimated the motion and resliced, with its version."""
        by_itk = self.settings.engine == "itk"
        return f"ITK {self.itk_version}" if by_itk else f"keepstill {__version__}"

    @property
    def motion_within_run(self) -> NDArray[np.float64]:
        """Motion against the run's own reference, (n, 4, 4), wherever the run ends."""
        if np.array_equal(self.run_from_reference, np.eye(4)):
            return self.moving_from_reference
        reference_from_run = geometry.inverse(self.run_from_reference)
        return np.array(
            [geometry.compose(matrix, reference_from_run) for matrix in self.moving_from_reference]
        )

    @property
    def own_grid(self) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
        """World mm from voxel of the run as it came, and the shape of its volumes."""
        nx, ny, nz = self.run.layout.shape[:3]
        return self.run.layout.affine, (nx, ny, nz)

    @property
    def failed(self) -> NDArray[np.bool_]:
        """Volumes that could not be realigned, (n,)."""
        return np.asarray(self.per_volume["status"] == "failed")

    @property
    def non_steady(self) -> NDArray[np.bool_]:
        """Volumes before the magnetisation was steady, (n,)."""
        return np.arange(self.run.n_volumes) < self.run.n_dummy

    @property
    def is_on_own_grid(self) -> bool:
        """Whether the reference has the grid of the run."""
        shape = self.run.layout.shape[:3]
        return self.reference.shape[::-1] == shape and np.array_equal(
            self.affine, self.run.layout.affine
        )

    def name(self, output: str) -> str:
        """File name of one of the `OUTPUTS`."""
        return output_name(self.run.run, output, self.settings)

    @property
    def writes_series(self) -> bool:
        """Whether the realigned run is one of the outputs; a multi-echo run leaves it to echoes."""
        return self.series is not None and not self.run.found["is_multi_echo"]

    def uri(self, output: str) -> str:
        """BIDS URI of an output, by its place in the derivative data set."""
        return output_uri(self.run, self.name(output))


def output_name(run: str, output: str, settings: RealignSettings) -> str:
    """File name of one of a run's `OUTPUTS`."""
    ending, entities = OUTPUTS[output]
    return derivative_name(run, ending, entities or {"desc": settings.output_desc})


def shared_reference_path(scope: str) -> PurePosixPath:
    """Place in the data set of the reference that the runs of a scope, ``sub-01_ses-1``, share."""
    return derivative_folder(scope) / derivative_name(scope, _SHARED_ENDING, _SHARED_ENTITIES)


def is_shared_reference(path: Path) -> bool:
    """Whether a file is named like the reference of a scope."""
    return path.name.endswith(derivative_name("", _SHARED_ENDING, _SHARED_ENTITIES))


def shared_reference_uri(path: Path) -> str:
    """BIDS URI of a scope's reference, wherever the data set is."""
    return f"bids::{percent_encoded((derivative_folder(path.name) / path.name).as_posix())}"


def output_uri(run: StagedRun, name: str) -> str:
    """BIDS URI of a file beside a run's outputs, by its place in the derivative data set.

    A run of a data set that is written to a plain folder has the same URI, so that its
    sidecars are the same; a run outside any data set has a relative reference instead.
    """
    folder = PurePosixPath(run.found["folder"])
    if run.found["bids_dir"] and not folder.name:
        folder = derivative_folder(run.run)
    path = percent_encoded((folder / name).as_posix())
    return f"bids::{path}" if folder.name else path


def open_result(stage_dir: Path, settings: RealignSettings) -> Realigned:
    """What the ranks left in a stage directory."""
    run = open_staged(stage_dir)
    with np.load(stage_dir / MOTION) as saved:
        arrays = {name: saved[name] for name in saved.files}
    reference = arrays.pop("reference")
    shape = (run.n_volumes, *reference.shape)
    series = np.memmap(run.realigned_path, np.float32, "r", 0, shape) if settings.reslice else None
    missing, n_missing = arrays.pop("missing"), int(arrays.pop("n_missing"))
    warnings = list(run.found["warnings"])
    if n_missing:
        warnings.append(
            f"{run.run}: {n_missing} values, in {int(missing.sum())} voxels, are no numbers; they "
            "were filled from their neighbours and are left out of the figures"
        )
    itk: dict[str, Any] = {"version": None, "check": None}
    if warning := str(arrays.pop("warning")):
        warnings.append(warning)
    if settings.uses_itk:
        itk = json.loads((stage_dir / ITK_NOTE).read_text())
    warnings += (itk["check"] or {}).pop("warnings", [])
    return Realigned(
        run=run,
        settings=settings,
        moving_from_reference=arrays.pop("moving_from_reference"),
        affine=arrays.pop("affine"),
        run_from_reference=arrays.pop("run_from_reference"),
        run_centre_voxel=arrays.pop("run_centre_voxel"),
        covariance=arrays.pop("covariance"),
        centre_mm=arrays.pop("centre_mm"),
        per_volume=arrays,
        reference=reference,
        series=series,
        missing=missing if n_missing else None,
        warnings=tuple(warnings),
        itk_version=itk["version"],
        check=itk["check"],
    )
