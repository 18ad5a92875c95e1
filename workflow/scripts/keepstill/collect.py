"""Collecting a realigned run: from the stage root to the output directory, manifest last."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import __version__, figures, geometry, write
from keepstill.bids import derivative_name
from keepstill.errors import OutputError
from keepstill.files import put_file
from keepstill.manifest import (
    Manifest,
    Stamp,
    describe_outputs,
    remember_input,
    write_manifest,
)
from keepstill.masks import brain_mask, dilated
from keepstill.nifti import made_header
from keepstill.read import StagedRun, open_staged
from keepstill.reslice import coverage
from keepstill.settings import RealignSettings
from keepstill.stage import MOTION

CODE_URL = "https://github.com/keepstill/keepstill"
BIDSIGNORE = (
    "*.html",
    "pages",
    "logs",
    "figures",
    "manifests",
    "*_xfm.*",
    "*_boldref.*",
    "*_timeseries.*",
    "*_boldmap.*",
)
# Fields of the raw sidecar that stay true of a realigned run.
_NOT_CARRIED_OVER = ("Sources", "RawSources", "SkullStripped", "SpatialReference")


@dataclass(frozen=True)
class Realigned:
    """A realigned run, ready to be written.

    Attributes
    ----------
    run : StagedRun
    settings : RealignSettings
    moving_from_reference : (n, 4, 4) float64
    per_volume : dict of str to (n,) arrays
        ``status``, ``iterations``, ``cost``, ``overlap``, ``scale``.
    reference : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel of the reference.
    series : (n, nz, ny, nx) float32 or None
        The realigned volumes, mapped; None where only transforms are wanted.
    missing : (nz, ny, nx) bool or None
        Voxels of the run's grid that are no number in some volume.
    warnings : tuple of str
    """

    run: StagedRun
    settings: RealignSettings
    moving_from_reference: NDArray[np.float64]
    per_volume: dict[str, NDArray[Any]]
    reference: NDArray[np.float32]
    affine: NDArray[np.float64]
    series: NDArray[np.float32] | None
    missing: NDArray[np.bool_] | None
    warnings: tuple[str, ...]


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
    return Realigned(
        run=run,
        settings=settings,
        moving_from_reference=arrays.pop("moving_from_reference"),
        affine=arrays.pop("affine"),
        per_volume=arrays,
        reference=reference,
        series=series,
        missing=missing if n_missing else None,
        warnings=tuple(warnings),
    )


def collect_run(
    stage_dir: Path, output_dir: Path, settings: RealignSettings, n_threads: int = 1
) -> dict[str, Any]:
    """Write all outputs of a realigned run and, last, the manifest that makes it complete.

    Parameters
    ----------
    stage_dir : Path
    output_dir : Path
        Root of the derivatives, or any folder for a run outside BIDS.
    settings : RealignSettings
    n_threads : int
        For compression; the bytes do not depend on it.

    Returns
    -------
    summary : dict
        Figures of the run, as in the manifest.

    Raises
    ------
    OutputError
        If an output cannot be written.
    """
    result = open_result(stage_dir, settings)
    found = result.run.found
    with _as_output_error(result.run.run, output_dir):
        if found["folder"]:
            describe_dataset(output_dir, found["bids_dir"])
        mask = brain_mask(result.reference)
        table, summary = _tables(result, mask)
        folder = output_dir / PurePosixPath(found["folder"])
        paths = list(_write_all(result, folder, (mask, table), n_threads))
        manifest = Manifest(
            run=result.run.run,
            input_sha256=found["input"]["sha256"],
            input_bytes=found["input"]["bytes"],
            metadata=found["metadata"],
            settings=settings,
            outputs=describe_outputs(output_dir, paths),
            summary=summary,
            warnings=result.warnings,
        )
        if found["folder"]:
            stamp = Stamp(**found["input"]["stamp"])
            remember_input(output_dir, result.run.run, stamp, found["input"]["sha256"])
        write_manifest(output_dir, manifest)
    return summary


@contextlib.contextmanager
def _as_output_error(run: str, output_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{run}: cannot write below {output_dir} ({error.strerror or error}); "
            "free space there or choose another output_dir"
        ) from error


def describe_dataset(output_dir: Path, bids_dir: str | None) -> None:
    """Write the derivative data set's description and its ``.bidsignore``, the same every time."""
    description: dict[str, Any] = {
        "Name": "keepstill: realigned BOLD runs",
        "BIDSVersion": "1.11.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "keepstill", "Version": __version__, "CodeURL": CODE_URL}],
    }
    if bids_dir:
        raw = os.path.relpath(bids_dir, output_dir.absolute())
        description["DatasetLinks"] = {"raw": raw}
        description["SourceDatasets"] = [{"URL": raw}]
    write.put_json(output_dir / "dataset_description.json", description)
    put_file(output_dir / ".bidsignore", ["\n".join(BIDSIGNORE).encode() + b"\n"])


def _tables(
    result: Realigned, mask: NDArray[np.bool_]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns of the confounds table, and the run's summary."""
    settings, n = result.settings, result.run.n_volumes
    shape = result.reference.shape[::-1]
    motion = figures.fsl_motion(
        result.moving_from_reference,
        result.affine,
        shape,
        figures.centre_of_gravity(result.reference),
    )
    fd_mm = figures.framewise_displacement_mm(motion, settings.fd_radius_mm)
    rmsd_mm = figures.rms_displacement_mm(
        result.moving_from_reference, geometry.field_centre_mm(result.affine, shape)
    )
    unknown = np.full(n, np.nan)
    series = _series_figures(result, mask)
    dvars = (series.dvars, series.std_dvars) if series else (unknown, unknown)
    _blank_failed(result.per_volume["status"], (fd_mm, rmsd_mm, *dvars))
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    table: dict[str, Any] = {name: motion[:, i] for i, name in enumerate(names)}
    table |= {"framewise_displacement": fd_mm, "rmsd": rmsd_mm}
    table |= {"dvars": dvars[0], "std_dvars": dvars[1]}
    for name in ("status", "iterations", "cost", "overlap", "scale"):
        table[name] = result.per_volume[name]
    return {name: column.tolist() for name, column in table.items()}, _summary(
        result, (fd_mm, dvars), series
    )


def _series_figures(result: Realigned, mask: NDArray[np.bool_]) -> figures.SeriesFigures | None:
    if result.series is None:
        return None
    layout = result.run.layout
    after = figures.Series(result.series)
    before = figures.Series(result.run.voxels, layout.slope, layout.inter)
    if before.voxels.shape != after.voxels.shape:
        before = after  # another grid: there is no voxel to compare
    return figures.series_figures(before, after, mask & _covered(result))


def _covered(result: Realigned) -> NDArray[np.bool_]:
    """Where all volumes that were realigned have data: beyond, figures would see the border."""
    good = result.per_volume["status"] != "failed"
    layout = result.run.layout
    nz, ny, nx = result.reference.shape
    grid = layout.affine, (layout.shape[0], layout.shape[1], layout.shape[2])
    covered = coverage(result.moving_from_reference[good], grid, result.affine, (nz, ny, nx))
    if result.missing is not None and result.missing.shape == covered.shape:
        covered &= ~dilated(result.missing, 1)
    return covered


def _blank_failed(status: NDArray[Any], columns: Iterable[NDArray[np.float64]]) -> None:
    """Differences to and from a failed volume say nothing."""
    failed = status == "failed"
    touched = failed.copy()
    touched[1:] |= failed[:-1]
    for column in columns:
        column[touched] = np.nan


def _summary(
    result: Realigned,
    shown: tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]],
    series: figures.SeriesFigures | None,
) -> dict[str, Any]:
    fd_mm, (dvars, std_dvars) = shown
    settings = result.settings
    failed = np.flatnonzero(result.per_volume["status"] == "failed")
    outlier = (fd_mm > settings.fd_outlier_mm) | (std_dvars > settings.std_dvars_outlier)
    return {
        "n_volumes": result.run.n_volumes,
        "tr_s": None if result.run.found["tr_s"] is None else _number(result.run.found["tr_s"]),
        "mean_fd_mm": _mean(fd_mm),
        "max_fd_mm": _number(np.nanmax(fd_mm)) if np.isfinite(fd_mm).any() else None,
        "n_outliers": int(outlier.sum()),
        "n_failed": int(failed.size),
        "failed_volumes": failed.tolist(),
        "mean_dvars": _mean(dvars),
        "tsnr_before": _number(series.tsnr_before) if series else None,
        "tsnr_after": _number(series.tsnr_after) if series else None,
        "variance_before": _number(series.variance_before) if series else None,
        "variance_after": _number(series.variance_after) if series else None,
    }


def _number(value: float) -> float:
    """Nine significant digits: enough for any use, and the same on every machine."""
    return float(f"{float(value):.9g}")


def _mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return _number(float(finite.mean())) if finite.size else None


def _write_all(
    result: Realigned,
    folder: Path,
    made: tuple[NDArray[np.bool_], dict[str, list[Any]]],
    n_threads: int,
) -> Iterator[Path]:
    """Write every output; yield its path."""
    mask, table = made
    run, desc = result.run.run, result.settings.output_desc
    header = result.run.layout.header

    def path(ending: str, **entities: str) -> Path:
        return folder / derivative_name(run, ending, entities)

    confounds = path("timeseries.tsv", desc="confounds")
    write.put_table(confounds, table)
    yield confounds
    yield _sidecar(confounds, _confounds_json(result))
    transforms = path(
        "xfm.txt", **{"from": "orig", "to": "boldref", "mode": "image", "desc": "hmc"}
    )
    put_file(transforms, [write.itk_transforms(result.moving_from_reference).encode()])
    yield transforms
    yield _sidecar(transforms, _transforms_json(result))
    boldref = path("boldref.nii.gz", desc="hmc")
    shape = result.reference.shape[::-1]
    write.put_volume(
        boldref, made_header(header, result.affine, shape, "float32"), result.reference
    )
    yield boldref
    yield _sidecar(boldref, {**_provenance(result), "SkullStripped": False})
    brain = path("mask.nii.gz", desc="brain")
    write.put_volume(
        brain, made_header(header, result.affine, shape, "uint8"), mask.astype(np.uint8)
    )
    yield brain
    yield _sidecar(brain, {**_provenance(result), "Type": "Brain", "SkullStripped": False})
    if result.series is not None:
        bold = path("bold.nii.gz", desc=desc)
        _write_series(result, bold, n_threads)
        yield bold
        yield _sidecar(bold, _bold_json(result))


def _write_series(result: Realigned, path: Path, n_threads: int) -> None:
    series = result.series
    assert series is not None
    shape = series.shape[::-1]
    dtype = result.settings.output_dtype
    header = made_header(result.run.layout.header, result.affine, shape, dtype)
    header["pixdim"][4] = result.run.found["tr_s"] or 0
    _set_seconds(header)
    if dtype == "int16":
        slope, inter = write.int16_scaling(series)
        header["scl_slope"], header["scl_inter"] = slope, inter
        parts = (write.as_int16(volume, slope, inter).tobytes() for volume in series)
    else:
        parts = (volume.tobytes() for volume in series)
    write.put_nifti(path, header, parts, n_threads)


def _set_seconds(header: Any) -> None:
    """Lengths are mm and the repetition time is in seconds, whatever unit the run came with."""
    header.set_xyzt_units(xyz="mm", t="sec")


def _sidecar(path: Path, values: dict[str, Any]) -> Path:
    """Write the JSON beside a file."""
    beside = path.with_name(path.name.removesuffix(".gz").rsplit(".", 1)[0] + ".json")
    write.put_json(beside, values)
    return beside


def _provenance(result: Realigned) -> dict[str, Any]:
    found = result.run.found
    return {
        "Sources": [found["source_uri"]],
        "KeepstillVersion": __version__,
        "KeepstillSettings": asdict(result.settings)
        | {"reference": Path(result.settings.reference).name},
    }


def _bold_json(result: Realigned) -> dict[str, Any]:
    carried = {
        name: value
        for name, value in result.run.found["metadata"].items()
        if name not in _NOT_CARRIED_OVER
    }
    made = {"SkullStripped": False, "OutsideFieldOfView": 0}
    if result.run.found["tr_s"] is not None:
        made["RepetitionTime"] = result.run.found["tr_s"]
    if result.run.n_dummy:
        made["NumberOfVolumesNotSteady"] = result.run.n_dummy
    return carried | _provenance(result) | made


def _transforms_json(result: Realigned) -> dict[str, Any]:
    return _provenance(result) | {
        "Format": "ITK text, one affine transform a volume, in the order of the volumes",
        "Direction": "a point of the reference -> the point of the volume (pull)",
        "CoordinateSystem": "LPS+ (ITK)",
        "TranslationUnits": "mm",
        "RotationCentre": "world origin",
    }


def _confounds_json(result: Realigned) -> dict[str, Any]:
    centre = figures.centre_of_gravity(result.reference)
    fsl = "as in an FSL .par file: volume -> reference, FSL scaled mm"
    about = {
        "CentreVoxel": [_number(c) for c in centre],
        "Handedness": "FSL scaled mm: voxel times edge, x flipped where the affine is RAS-like",
        "EulerOrder": "R = Rx Ry Rz",
    }
    columns: dict[str, Any] = {}
    for axis in "xyz":
        columns[f"trans_{axis}"] = {
            "Description": f"Shift along {axis}, {fsl}",
            "Units": "mm",
            **about,
        }
        columns[f"rot_{axis}"] = {
            "Description": f"Turn about {axis}, {fsl}",
            "Units": "rad",
            **about,
        }
    radius_mm = result.settings.fd_radius_mm
    columns |= {
        "framewise_displacement": {
            "Description": f"Power 2012, rotations on a sphere of {radius_mm:g} mm",
            "Units": "mm",
        },
        "rmsd": {
            "Description": "Jenkinson 1999, rms displacement of an 80 mm sphere about the centre "
            "of the field of view, between neighbouring volumes",
            "Units": "mm",
        },
        "dvars": {"Description": "DVARS in the brain mask, data scaled to median 1000"},
        "std_dvars": {"Description": "DVARS over its expected value (Nichols 2013)"},
        "status": {
            "Description": "How the fit ended",
            "Levels": {
                "reference": "the volume that the others are realigned to",
                "ok": "converged",
                "failed": "could not be realigned; its motion must not be used",
            },
        },
        "iterations": {"Description": "Gauss-Newton steps"},
        "cost": {"Description": "Rms residual over the reference's mean, at the last step"},
        "overlap": {"Description": "Part of the sampling points inside the field of view"},
        "scale": {"Description": "Factor from the volume's intensity to the reference's"},
    }
    return _provenance(result) | columns


def summary_line(run: str, summary: dict[str, Any]) -> str:
    """One line for people: what the run was like."""
    fd_mm = summary["mean_fd_mm"]
    shown = "n/a" if fd_mm is None else f"{fd_mm:.3f} mm"
    failed = summary["failed_volumes"]
    tail = f"; volumes that failed: {', '.join(map(str, failed))}" if failed else ""
    return (
        f"{run}: {summary['n_volumes']} volumes, mean framewise displacement {shown}, "
        f"{summary['n_outliers']} outliers, {summary['n_failed']} failed{tail}"
    )
