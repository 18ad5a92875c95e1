"""The table of confounds: motion, what it does to the images, and which volumes to leave out."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import figures, geometry
from keepstill.breathing import without_breathing
from keepstill.error_bars import displacement_form, expected_errors_mm
from keepstill.realigned import Realigned
from keepstill.settings import RealignSettings

Columns = dict[str, NDArray[Any]]

MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
RUN_MOTION = tuple(f"run_{name}" for name in MOTION)
FIT = ("status", "iterations", "cost", "overlap", "scale", "n_lost_slices")
# fMRIPrep's names for what is derived from each of the six, and its order.
EXPANSIONS = ("derivative1", "power2", "derivative1_power2")
FILTERED = "framewise_displacement_filtered"
NON_STEADY, OUTLIER = "non_steady_state_outlier", "motion_outlier"


def make_confounds(
    result: Realigned, series: figures.SeriesFigures | None, brain: NDArray[np.bool_]
) -> Columns:
    """Columns of the table, in their fixed order, a row a volume.

    The six motion numbers, framewise displacement, rmsd, DVARS, framewise displacement without
    breathing, if it is wanted, and how each fit ended; for a run that ends in the space of an
    image, where it lies there as a whole; then the 24-parameter expansion; then a column of 0 and
    1 for each volume before the steady state, and for each motion outlier. The last two are as
    many as there are such volumes.

    Motion is that against the run's own reference, wherever the run ends: displacements within a
    run do not depend on what it shares with others.

    Parameters
    ----------
    result : Realigned
    series : SeriesFigures or None
        None where nothing was resliced: DVARS is not known.
    brain : (nz, ny, nx) bool
        Whose displacement the expected error is.
    """
    settings, n = result.settings, result.run.n_volumes
    matrices, (affine, shape) = result.motion_within_run, result.own_grid
    motion = figures.fsl_motion(matrices, affine, shape, result.run_centre_voxel)
    fd_mm = figures.framewise_displacement_mm(motion, settings.fd_radius_mm)
    rmsd_mm = figures.rms_displacement_mm(matrices, geometry.field_centre_mm(affine, shape))
    fd_mm[_touched(result.failed)] = rmsd_mm[_touched(result.failed)] = np.nan
    unknown = np.full(n, np.nan)
    table: Columns = {name: motion[:, i] for i, name in enumerate(MOTION)}
    table |= {"framewise_displacement": fd_mm, "rmsd": rmsd_mm}
    table["dvars"] = series.dvars if series else unknown
    table["std_dvars"] = series.std_dvars if series else unknown
    table |= _filtered(result, motion) | {name: result.per_volume[name] for name in FIT}
    table["expected_error"] = _expected_errors_mm(result, brain)
    table |= _run_motion(result)
    for name in MOTION:
        table |= _expansions(name, table[name])
    outliers = motion_outliers(result, fd_mm, table["std_dvars"])
    table |= _spikes(NON_STEADY, np.flatnonzero(result.non_steady), n)
    table |= _spikes(OUTLIER, np.flatnonzero(outliers), n)
    return table


def _run_motion(result: Realigned) -> Columns:
    """Six numbers of the run as a whole against the image that it is taken to, in every row."""
    if result.settings.image is None:
        return {}
    shape = result.reference.shape[::-1]
    centre = figures.centre_of_gravity(result.reference)
    run_from_reference = result.run_from_reference[None]
    (motion,) = figures.fsl_motion(run_from_reference, result.affine, shape, centre)
    return {
        name: np.full(result.run.n_volumes, number)
        for name, number in zip(RUN_MOTION, motion, strict=True)
    }


def _filtered(result: Realigned, motion: NDArray[np.float64]) -> Columns:
    """Framewise displacement of motion without breathing; no column if it is not wanted."""
    settings = result.settings
    if settings.fd_filter == "none":
        return {}
    tr_s = float(result.run.found["tr_s"])
    slow = without_breathing(motion, result.failed, tr_s, settings)
    fd_mm = figures.framewise_displacement_mm(slow, settings.fd_radius_mm)
    fd_mm[_touched(result.failed)] = np.nan
    return {FILTERED: fd_mm}


def motion_outliers(
    result: Realigned, fd_mm: NDArray[np.float64], std_dvars: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Volumes that a model should leave out because of motion, (n,).

    Those above either threshold, as fMRIPrep flags them; failed ones; and those after a failed
    one, whose displacement is not known. Volumes before the steady state have columns of their
    own, and the fall in brightness behind them is no motion.
    """
    settings = result.settings
    by_dvars = (std_dvars > settings.std_dvars_outlier) & is_steady_change(result)
    above = (fd_mm > settings.fd_outlier_mm) | by_dvars
    return np.asarray((above | _touched(result.failed)) & ~result.non_steady)


def is_steady_change(result: Realigned) -> NDArray[np.bool_]:
    """Volumes whose difference from the one before is one between steady volumes, (n,)."""
    return ~_touched(result.non_steady)


def is_known_change(result: Realigned) -> NDArray[np.bool_]:
    """Volumes of which neither they nor the one before have failed, (n,)."""
    return ~_touched(result.failed)


def describe_columns(result: Realigned, names: Iterable[str]) -> dict[str, Any]:
    """What a JSON sidecar says of each column: description, and units or levels."""
    known = _motion_columns(result) | _figure_columns(result) | _FIT_COLUMNS
    for name in MOTION:
        known |= _expansion_columns(name, known[name]["Units"])
    return {name: known.get(name) or _spike_column(result, name) for name in names}


def _expected_errors_mm(result: Realigned, brain: NDArray[np.bool_]) -> NDArray[np.float64]:
    voxels = np.argwhere(brain)[:, ::-1].astype(np.float64)
    arms_mm = geometry.world(result.affine, voxels) - result.centre_mm
    form = displacement_form(arms_mm) if len(arms_mm) else np.zeros((6, 6))
    of_reference = np.flatnonzero(result.per_volume["status"] == "reference")
    reference = int(of_reference[0]) if of_reference.size else None
    return expected_errors_mm(result.covariance, form, reference)


def _touched(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The marked volumes, and the one after each: their differences see a marked one."""
    out = marked.copy()
    out[1:] |= marked[:-1]
    return out


def _expansions(name: str, values: NDArray[np.float64]) -> Columns:
    change = np.full(len(values), np.nan)
    change[1:] = np.diff(values)
    made = (change, values**2, change**2)
    return {f"{name}_{kind}": column for kind, column in zip(EXPANSIONS, made, strict=True)}


def _spikes(name: str, volumes: NDArray[np.intp], n: int) -> Columns:
    """One column for each of the volumes, 1 there and 0 elsewhere."""
    columns = {}
    for k, volume in enumerate(volumes):
        column = np.zeros(n, np.uint8)
        column[volume] = 1
        columns[f"{name}{k:02d}"] = column
    return columns


def _motion_columns(result: Realigned) -> dict[str, Any]:
    if result.settings.image is None:
        return _six_columns("", "volume -> reference", result.run_centre_voxel)
    image = result.settings.image.name
    within = _six_columns("", "volume -> the run's own reference", result.run_centre_voxel)
    return within | _six_columns(
        "run_",
        f"the run's own reference -> {image}, the same for all volumes",
        figures.centre_of_gravity(result.reference),
    )


def _six_columns(prefix: str, what: str, centre_voxel: NDArray[np.float64]) -> dict[str, Any]:
    """Descriptions of six numbers of motion."""
    fsl = f"as in an FSL .par file: {what}, FSL scaled mm"
    about = {
        "CentreVoxel": [float(f"{c:.9g}") for c in centre_voxel],
        "Handedness": "FSL scaled mm: voxel times edge, x flipped where the affine is RAS-like",
        "EulerOrder": "R = Rx Ry Rz",
    }
    columns: dict[str, Any] = {}
    for axis in "xyz":
        shift = {"Description": f"Shift along {axis}, {fsl}", "Units": "mm"}
        turn = {"Description": f"Turn about {axis}, {fsl}", "Units": "rad"}
        columns |= {f"{prefix}trans_{axis}": shift | about, f"{prefix}rot_{axis}": turn | about}
    return columns


def _figure_columns(result: Realigned) -> dict[str, Any]:
    radius_mm = result.settings.fd_radius_mm
    unknown = "not known for a failed volume and the one after it"
    where = "in the voxels that both the brain mask and the coverage mask hold"
    return {
        "framewise_displacement": {
            "Description": "Power 2012: sum of the absolute changes of the six motion numbers "
            f"from the volume before, rotations on a sphere of {radius_mm:g} mm; {unknown}",
            "Units": "mm",
        },
        FILTERED: {
            "Description": "framewise_displacement of motion numbers without breathing: "
            f"{_filter_text(result.settings)}; {unknown}",
            "Units": "mm",
        },
        "rmsd": {
            "Description": "Jenkinson 1999: rms displacement, from the volume before, of a sphere "
            f"of 80 mm about the centre of the field of view; {unknown}",
            "Units": "mm",
        },
        "dvars": {
            "Description": f"Rms change of intensity from the volume before, {where}, "
            "the data scaled to a median of 1000",
            "Units": "1",
        },
        "std_dvars": {
            "Description": "dvars over the value expected without motion (Nichols 2013)",
            "Units": "1",
        },
    }


def _filter_text(settings: RealignSettings) -> str:
    """How the motion numbers were filtered."""
    both_ways = "forwards and backwards, failed volumes from their neighbours"
    if settings.fd_filter == "lowpass":
        return (
            f"a Butterworth low-pass of order 2 at {settings.fd_lowpass_per_min:g} cycles/min, "
            f"{both_ways} (after Gratton 2020)"
        )
    return (
        f"a notch from {settings.fd_notch_low_per_min:g} to {settings.fd_notch_high_per_min:g} "
        f"breaths/min, twice {both_ways} (Fair 2020)"
    )


_FIT_COLUMNS: dict[str, Any] = {
    "status": {
        "Description": "How the fit ended",
        "Levels": {
            "reference": "the volume that the others are realigned to",
            "ok": "converged",
            "failed": "could not be realigned; its motion must not be used",
        },
    },
    "iterations": {"Description": "Gauss-Newton steps", "Units": "1"},
    "cost": {
        "Description": "Rms residual over the reference's mean, at the last step",
        "Units": "1",
    },
    "overlap": {
        "Description": "Part of the sampling points inside the field of view, 0 to 1",
        "Units": "1",
    },
    "scale": {
        "Description": "Factor from the volume's intensity to the reference's",
        "Units": "1",
    },
    "n_lost_slices": {
        "Description": "Slices without their signal, which the fit left out",
        "Units": "1",
    },
    "expected_error": {
        "Description": "Displacement over the brain (rms) that the error of the volume's motion is "
        "below with a probability of 68%, by its residuals",
        "Units": "mm",
    },
}


def _expansion_columns(name: str, unit: str) -> dict[str, Any]:
    change = f"Change of {name} from the volume before"
    described = (
        {"Description": change, "Units": unit},
        {"Description": f"{name}, squared", "Units": f"{unit}^2"},
        {"Description": f"{change}, squared", "Units": f"{unit}^2"},
    )
    return {f"{name}_{kind}": said for kind, said in zip(EXPANSIONS, described, strict=True)}


def _spike_column(result: Realigned, name: str) -> dict[str, Any]:
    settings = result.settings
    levels = {"0": "any other volume", "1": "the volume that this column stands for"}
    if name.startswith(NON_STEADY):
        return {"Description": "A volume before the steady state", "Levels": levels}
    return {
        "Description": "A volume with a framewise displacement above "
        f"{settings.fd_outlier_mm:g} mm or a std_dvars above {settings.std_dvars_outlier:g}, one "
        "that failed, or one after it",
        "Levels": levels,
    }
